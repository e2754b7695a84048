"""The types in which weights are stored, in one table: what each takes, how exact it is, and what it may be used for. No torch.

Choices of the configuration, the plan, estimates of memory and the documentation follow from it. The quantised ones are
optimum-quanto's: whole numbers or short floats with a scale for each output channel, or for each group of numbers of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

StorageName = Literal["fp32", "bf16", "int8", "fp8", "int4"]
"""Names of storage types in configurations and plans."""

Use = Literal["trained", "frozen"]
"""What weights are for: they are trained, or an adapter is trained on them."""

GROUPS = (128, 96, 64, 32)
"""Sizes of the groups of a row of numbers that share a scale in int4: the largest that divides a longer row (optimum-quanto)."""

_TOGETHER = 16
"""Outputs that torch's int4 product takes together; quanto uses it for a Linear with groups of 128."""

_SCALE = 2
"""Bytes of a scale, or of a shift: they are in the type in which the weights were loaded, bf16."""


@dataclass(frozen=True)
class StorageType:
    """A type of stored weights. title: in words. torch: what torch calls the type that holds the numbers.

    bits: of a number, without scales. uses: what weights of it may be for; what is trained in bf16 needs an optimizer that
    moves such (OptimizerSpec.moves). quanto: optimum-quanto's name of it, "" where it is not quantised. error: of a whole
    model's prediction, relative to bf16 and by 2-norm, measured (`benchmarks/quantised.py`, 104 M parameters); None: of fp32,
    which is more exact, and of bf16 itself.
    """

    name: StorageName
    title: str
    torch: str
    bits: int
    uses: frozenset[Use]
    quanto: str = ""
    error: float | None = None

    @property
    def quantised(self) -> bool:
        return bool(self.quanto)

    def fault(self, shape: tuple[int, ...]) -> str:
        """Why a layer with a weight (out, in, ...) is not quantised to it; "" where it is."""
        row = math.prod(shape[1:])
        if shape[0] == 1:
            return "it has one output channel"
        if self.bits < 8 and row > GROUPS[0] and not self._group(shape):
            return f"{row} numbers an output channel are not divisible by {', '.join(map(str, GROUPS))}"
        if self.bits < 8 and len(shape) == 2 and row > GROUPS[0] and row % GROUPS[0] == 0 and shape[0] % _TOGETHER:
            return f"its {shape[0]} outputs are not divisible by {_TOGETHER}"
        return ""

    def _group(self, shape: tuple[int, ...]) -> int:
        """How many numbers share a scale; 0 for none that fits."""
        row = math.prod(shape[1:])
        if self.bits == 8 or row <= GROUPS[0]:
            return row
        return next((size for size in GROUPS if row % size == 0), 0)

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Of a weight (out, in, ...) that `fault` does not refuse, with its scales."""
        count = math.prod(shape)
        if not self.quantised:
            return count * self.bits // 8
        group = self._group(shape)
        groups = count // group
        if self.bits == 8:
            return count + groups * _SCALE
        return math.ceil(groups / 2) * group + groups * 2 * _SCALE  # two to a byte; a scale and a shift each


STORAGE: Mapping[StorageName, StorageType] = {
    each.name: each
    for each in (
        StorageType("fp32", "32-bit floating point", "float32", 32, frozenset(get_args(Use))),
        StorageType("bf16", "16-bit floating point (bfloat16)", "bfloat16", 16, frozenset(get_args(Use))),
        StorageType("int8", "8-bit whole numbers", "int8", 8, frozenset({"frozen"}), "qint8", 0.007),
        StorageType(
            "fp8", "8-bit floating point (e4m3)", "float8_e4m3fn", 8, frozenset({"frozen"}), "qfloat8_e4m3fn", 0.019
        ),
        StorageType("int4", "4-bit whole numbers", "uint8", 4, frozenset({"frozen"}), "qint4", 0.043),
    )
}
"""By name."""


def is_layer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight of a block is a Linear's or a Conv2d's, which are quantised: not a norm's, a bias or a table."""
    return name.endswith(".weight") and len(shape) in (2, 4)
