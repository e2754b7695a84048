"""When things happen: the learning rate's factor at a step, and what is due after one."""

from __future__ import annotations

import math
from collections.abc import Callable

from vtrain.config.tables import LrScheduleTable
from vtrain.contract import Duration

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
