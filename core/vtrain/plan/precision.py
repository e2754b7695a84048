"""The denoiser's storage type: whether it works with what is trained, and what is quantised of a model. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from vtrain.config.record import Config
from vtrain.contract import DType, Family, Problem, SupportsBlockWeights
from vtrain.contract.adapters import SupportsAdapterNames, matches
from vtrain.contract.precision import STORAGE, StorageName, StorageType, is_layer
from vtrain.contract.specs import bytes_text

SHOWN = 3
"""How many of many layers a message names."""


def base_of(train: str) -> StorageName:
    """Storage type of the denoiser where the file says none. What is trained is fp32: an adapter on a bf16 base, or all
    weights (see plan/optimizer.py)."""
    return "bf16" if train == "lora" else "fp32"


def loaded_in(base: str) -> DType:
    """The type in which weights are read that are then stored as `base`: those that are quantised in bf16."""
    return "fp32" if base == "fp32" else "bf16"


def storage_of(config: Config) -> StorageType:
    """The denoiser's storage type, by the file or by default."""
    return STORAGE[config.precision.base or base_of(config.model.table.train)]


def precision_problems(config: Config) -> list[Problem]:
    """Why the weights, as they are stored, cannot be trained. Of what is trained the optimizer decides (plan/optimizer.py)."""
    storage = storage_of(config)
    return list(_quantised_problems(config, storage)) if storage.quantised else []


def _quantised_problems(config: Config, storage: StorageType) -> Iterator[Problem]:
    """Of a quantised base alone."""
    where = config.where("precision", "base")
    if "trained" not in storage.uses and config.model.table.train == "full":
        what = f"full training of weights in {storage.name}: what is quantised is frozen, so the weights would not move at all."
        yield Problem(where, what, 'Train an adapter on it (model.train = "lora"), or use base = "fp32".')
    try:
        version("optimum-quanto")
    except PackageNotFoundError:
        what = f'base = "{storage.name}" needs optimum-quanto, which is not installed.'
        yield Problem(where, what, 'Install it: pip install "vtrain[quanto]"')


@dataclass(frozen=True)
class Quantised:
    """What becomes of a model's weights in a quantised type.

    numbers, bytes: of the weights that are quantised, scales included. rest: numbers of all others, which are bf16. layers:
    how many are quantised. kept: layers of blocks that are not, by name -> why.
    """

    numbers: int
    bytes: int
    rest: int
    layers: int
    kept: dict[str, str]

    @property
    def total_bytes(self) -> int:
        """Of the whole model."""
        return self.bytes + 2 * self.rest


def quantised(family: Family, storage: StorageType, targets: tuple[str, ...]) -> Quantised | None:
    """None where the family does not tell its weights' shapes. targets: of the adapter."""
    if not isinstance(family, SupportsBlockWeights):
        return None
    numbers = taken = layers = 0
    kept: dict[str, str] = {}
    for name, shape in family.block_weights().items():
        if not is_layer(name, shape):
            continue
        layer = name.removesuffix(".weight")
        if fault := adapted(layer, shape, targets) or storage.fault(shape):
            kept[layer] = fault
            continue
        layers, numbers, taken = layers + 1, numbers + math.prod(shape), taken + storage.bytes(shape)
    return Quantised(numbers, taken, family.parameters - numbers, layers, kept)


def adapted(layer: str, shape: tuple[int, ...], targets: tuple[str, ...]) -> str:
    """Why a convolution stays as it is: peft has no adapter for a quantised one."""
    return "an adapter is put on it" if len(shape) == 4 and any(matches(layer, each) for each in targets) else ""


def kept_words(kept: dict[str, str], storage: StorageType) -> str:
    """What of the blocks is not quantised, counted and named; "" for nothing."""
    if not kept:
        return ""
    reasons = Counter(kept.values())
    parts = []
    for reason, count in reasons.items():
        names = [name for name, why in kept.items() if why == reason]
        more = ", ..." if count > SHOWN else ""
        parts.append(f"{', '.join(names[:SHOWN])}{more}: {reason}")
    layers = f"{len(kept)} layer{'s' if len(kept) > 1 else ''} of blocks"
    return f"{layers} cannot be quantised to {storage.name} and stay bf16 ({'; '.join(parts)})"


def adapter_targets(config: Config, own: tuple[str, ...] | None) -> tuple[str, ...]:
    """What gets an adapter. own: the family's targets, None where it does not say them before it is loaded."""
    lora = config.model.table.lora
    return () if lora is None else lora.targets or own or ()


def _targets(config: Config, family: Family) -> tuple[str, ...]:
    return adapter_targets(config, family.lora_targets if isinstance(family, SupportsAdapterNames) else None)


def layer_problems(config: Config, family: Family) -> list[Problem]:
    """A base of which nothing can be quantised."""
    storage = storage_of(config)
    found = quantised(family, storage, _targets(config, family)) if storage.quantised else None
    if found is None or found.layers:
        return []
    what = f"no layer of this model can be quantised to {storage.name}: {kept_words(found.kept, storage) or 'it has none'}."
    return [Problem(config.where("precision", "base"), what, 'Use base = "bf16" or "int8".')]


def precision_warnings(config: Config, family: Family) -> Iterator[str]:
    """What of [precision] has no effect, or less than is meant."""
    storage = storage_of(config)
    if not storage.quantised:
        if ("precision", "quantize_on") in config.lines:
            yield f'precision.quantize_on has no effect: base = "{storage.name}" is not quantised'
        return
    found = quantised(family, storage, _targets(config, family))
    if found is not None and (words := kept_words(found.kept, storage)):
        yield f"precision.base: {words}"


def storage_words(config: Config, family: Family) -> str:
    """Of the denoiser's weights, for the plan: how many numbers in which type, how many bytes."""
    storage = storage_of(config)
    total = f"{family.parameters:,} parameters"
    if not storage.quantised:
        return f"{total}, {storage.name}"
    found = quantised(family, storage, _targets(config, family))
    if found is None:
        return f"{total}: Linear and Conv2d layers of blocks in {storage.name}, the rest in bf16"
    share = f"{100 * found.numbers / family.parameters:.0f}%"
    return (
        f"{total}: {share} ({found.layers} layers of blocks) in {storage.name}, the rest in bf16, "
        f"{bytes_text(found.total_bytes)} (in bf16 it takes {bytes_text(2 * family.parameters)})"
    )


def error_words(storage: StorageType) -> str:
    """How far its predictions are from those of bf16, "" where it is not quantised."""
    return f", predictions about {100 * storage.error:.2g}% from bf16's" if storage.error else ""
