"""The learning rate over a run: a pure function of the step, for training, the plan and its drawing."""

from __future__ import annotations

from collections.abc import Callable

from vtrain.config.tables import LrScheduleTable
from vtrain.contract import Decay, scheduled

Factor = Callable[[int], float]
"""Zero-based optimizer step -> factor of the optimizer's lr, in [0, 1]."""


def lr_factor(table: LrScheduleTable, steps: int, steps_per_epoch: float) -> Factor:
    """The schedule over `steps` optimizer steps: warm-up, then the rest of the run, its last step at `end` exactly."""
    warmup = table.warmup.in_steps(steps_per_epoch) or 0 if table.warmup else 0
    # From the last step of the warm-up, the first at the full rate, to the last step of the run.
    length = steps - 1 - max(warmup - 1, 0)
    restarts = table.use == "cosine_with_restarts"
    decay: Decay = "cosine" if table.use == "cosine_with_restarts" else table.use
    cycles = table.cycles if restarts else 1

    def factor(step: int) -> float:
        return scheduled(
            step, full=1.0, end=table.end, warmup=warmup, length=length, decay=decay, power=table.power, cycles=cycles
        )

    return factor
