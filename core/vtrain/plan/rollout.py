"""Scheduled sampling (train.rollout) in a plan: what it needs of the sampler, what it does, what it costs. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from vtrain.config.record import Config
from vtrain.config.tables import RolloutTable
from vtrain.contract import Problem, Sampler, SupportsRollout
from vtrain.plan.offload import recomputed


def rollout_problems(config: Config, sampler: Sampler) -> Iterator[Problem]:
    """Why a run cannot be rolled out."""
    table = config.train.rollout
    if table is None:
        return
    if not isinstance(sampler, SupportsRollout):
        name = config.sampler.registered.spec.name
        what = f'the sampler "{name}" cannot be rolled out: it lacks the ability SupportsRollout.'
        yield Problem(config.where("train", "rollout"), what, "Remove [train.rollout], or use another sampler.")
    if table.ramp is not None and table.ramp.unit == "seconds":
        what = 'train.rollout.ramp needs "steps" or "epochs": a ramp in seconds would not be the same run twice.'
        yield Problem(config.where("train", "rollout", "ramp"), what)


def rollout_share(table: RolloutTable, steps: int, per_epoch: float) -> float:
    """The share of all clips of a run that are rolled out, at most: levels below min_level and the strategy take from it."""
    ramp = table.ramp.in_steps(per_epoch) or 0 if table.ramp else 0
    # The sum over steps 0 to steps - 1 of min(1, step / ramp).
    climbing = min(ramp, steps)
    full = climbing * (climbing - 1) / 2 / ramp if ramp else 0.0
    return table.probability * (full + steps - climbing) / steps


_LEVELS = {
    "uniform": "at all levels alike",
    "early": "the noisier the likelier: probability x level",
    "late": "the less noisy the likelier: probability x (1 - level)",
}


def rollout_rows(config: Config, steps: int, per_epoch: float) -> Iterator[tuple[str, str]]:
    """What it does and what it costs."""
    table = config.train.rollout
    if table is None:
        return
    ramp = f", from 0 over {table.ramp}" if table.ramp else ""
    yield (
        "rollout",
        f"probability {table.probability:g}{ramp}, {_LEVELS[table.strategy]}; from up to {table.max_offset:g} above, in "
        f"{table.steps} solver step{'s' * (table.steps > 1)}; at levels from {table.min_level:g}",
    )
    more = rollout_share(table, steps, per_epoch) * table.steps
    # In forward passes: a backward pass takes two, under LoRA, which has few gradients of weights, about one; recomputing one more.
    whole = (2 if config.model.table.train == "lora" else 3) + recomputed(config.precision)
    yield (
        "rollout costs",
        f"at most {more:.3g} forward passes for each clip on average, without gradient: about {100 * more / whole:.0f}% of a step",
    )


def rollout_warnings(config: Config, steps: int, per_epoch: float) -> Iterator[str]:
    """What does not go with a run of so many optimizer steps."""
    table = config.train.rollout
    ramp = table.ramp.in_steps(per_epoch) if table is not None and table.ramp is not None else None
    if table is None or table.ramp is None or ramp is None:
        return
    if ramp == 1 and table.ramp.unit == "epochs":
        yield f"train.rollout.ramp = {table.ramp} is one step here: the probability is {table.probability:g} after it"
    if ramp >= steps:
        yield (
            f"train.rollout.ramp is {ramp} steps and the run {steps}: the probability never gets to {table.probability:g}"
        )
