"""Parameter groups, the learning rate over the run, and what is due after which step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from vtrain.config.tables import LrScheduleTable
from vtrain.contract import Duration, ParameterGroup, SupportsLearningRate


def trained(module: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, parameter) of all that take a gradient, in the module's order."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def groups(named: Iterable[tuple[str, Tensor]], factors: Mapping[str, float] | None = None) -> list[ParameterGroup]:
    """By two: matrices and kernels decay; vectors (norms, biases, scale tables of one row) do not.

    factors: beginning of a name -> learning-rate factor, for parameters with a rate of their own.
    """
    found: dict[tuple[float, bool], list[tuple[str, Tensor]]] = {}
    for name, parameter in named:
        factor = next((value for start, value in (factors or {}).items() if name.startswith(start)), 1.0)
        found.setdefault((factor, _decays(name, parameter)), []).append((name, parameter))
    order = sorted(found, key=lambda key: (key[0] != 1.0, key[0], not key[1]))
    return [ParameterGroup(tuple(found[key]), decay=key[1], lr_factor=key[0]) for key in order]


def own_rates(regularizers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Beginning of the names of a regularizer's parameters in a Step -> its learning-rate factor."""
    return {
        f"regularizers.{name}.": module.lr_factor
        for name, module in regularizers.items()
        if isinstance(module, SupportsLearningRate)
    }


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and not name.endswith("scale_shift_table")


Factor = Callable[[int], float]
"""Zero-based optimizer step -> factor of the optimizer's lr, in [0, 1]."""


def lr_factor(table: LrScheduleTable, steps: int, steps_per_epoch: float) -> Factor:
    """The schedule over `steps` optimizer steps.

    Warm-up of w steps: step i has (i + 1) / w, so that step w - 1 has the full rate. Then the rest of the run, its last
    step at `end` exactly. Cosine: end + (1 - end) (1 + cos(pi p)) / 2 with p in [0, 1] over that rest.
    """
    warmup = table.warmup.in_steps(steps_per_epoch) or 0 if table.warmup else 0

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if table.use == "constant":
            return 1.0
        first = max(warmup - 1, 0)
        progress = min(1.0, (step - first) / max(steps - 1 - first, 1))
        falling = 1 - progress if table.use == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return table.end + (1 - table.end) * falling

    return factor


class Interval:
    """Tells after which optimizer steps something is due. In steps or epochs it is a pure function of the step.

    In seconds it counts from its making, and again from each `done`.
    """

    def __init__(self, every: Duration, steps_per_epoch: float, now: float) -> None:
        """now: seconds on the clock that `due` and `done` are given."""
        self.steps = every.in_steps(steps_per_epoch)
        self.seconds = every.value
        self.last = now

    def due(self, steps: int, now: float) -> bool:
        """steps: optimizer steps done, >= 1."""
        return steps % self.steps == 0 if self.steps is not None else now - self.last >= self.seconds

    def done(self, now: float) -> None:
        """What was due has been done."""
        self.last = now

    @property
    def timed(self) -> bool:
        return self.steps is None
