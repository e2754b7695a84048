"""`schedulefree-adamw`: AdamW whose running average takes the place of a schedule (Defazio et al., arXiv 2405.15682).

It has three sequences of weights. Gradients are taken at y, which is what training holds; z takes AdamW's steps; x is their
average, and y = beta1 x + (1 - beta1) z. x is what the model is good at: validation, EMA and export take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from vtrain.contract import OptimizedRun, OptimizerSpec, ParameterGroup
from vtrain_builtin.optimizer_groups import SENSIBLE_LR, USUAL_LR, Beta, DecoupledDecay, decay_advice, torch_groups

if TYPE_CHECKING:
    import torch


class ScheduleFreeOptions(DecoupledDecay):
    """Options of `schedulefree-adamw`."""

    lr: float = Field(gt=0, examples=[2e-4], description="learning rate; usual are 1 to 10 times that of AdamW")
    # At 0 the training weights are z, from which the average cannot be told.
    betas: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], Beta], Field(strict=False)] = Field(
        (0.9, 0.999), description="weight of the average in the training weights, and decay of the squares of gradients"
    )
    eps: float = Field(1e-8, gt=0, description="added to the root of the squares")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay, of the training weights")
    warmup_steps: int = Field(
        0,
        ge=0,
        description="steps in which the rate rises from 0; they count less in the average. Its authors advise some",
    )
    r: float = Field(0.0, ge=0, description="step k counts k to the power r in the average")
    weight_lr_power: float = Field(
        2.0, ge=0, description="a step counts in the average as the largest rate so far to this power"
    )


def build_schedule_free(options: ScheduleFreeOptions, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """In training mode. Raises ValueError when no group has a parameter."""
    from vtrain_builtin.averaging_optimizer import AveragingAdamW

    optimizer = AveragingAdamW(
        torch_groups(groups, options.lr, options.weight_decay), **options.model_dump(exclude={"weight_decay"})
    )
    optimizer.train()
    return optimizer


def advice(options: ScheduleFreeOptions, run: OptimizedRun) -> Sequence[str]:
    """What of [lr_schedule], and of the run's length, does not go with it."""
    found = decay_advice(options, run)
    if run.schedule != "constant":
        found.append(
            f'lr_schedule.use = "{run.schedule}" beside schedulefree-adamw: its average takes the place of a schedule; '
            'its authors leave the rate as it is (use = "constant")'
        )
    if run.warms_up and options.warmup_steps:
        found.append(
            "lr_schedule.warmup and optimizer.warmup_steps both raise the learning rate from 0: they are multiplied"
        )
    elif not run.warms_up and not options.warmup_steps:
        found.append(
            "schedulefree-adamw without a warm-up: its authors advise one, of about a twentieth of the run "
            "(optimizer.warmup_steps or lr_schedule.warmup; either way its steps count less in the average)"
        )
    if run.steps is not None and options.warmup_steps >= run.steps:
        found.append(
            f"optimizer.warmup_steps is {options.warmup_steps} and the run {run.steps} steps: the learning rate never gets past "
            "its warm-up"
        )
    return found


SCHEDULE_FREE = OptimizerSpec(
    name="schedulefree-adamw",
    summary="AdamW without a schedule: a running average of the weights is what it trains for (schedulefree)",
    options=ScheduleFreeOptions,
    build=build_schedule_free,
    moves=frozenset({"fp32", "sharded"}),
    state_bytes=8.0,
    usual_lr=USUAL_LR,
    sensible_lr=SENSIBLE_LR,
    library=("schedulefree", "vtrain[optimizers]"),
    advice=advice,
    eval_weights=True,
)
