"""`prodigy`: Adam that finds its learning rate itself (Mishchenko and Defazio, arXiv 2306.06101), of the package prodigyopt.

The rate is d x lr: d is an estimate of how far the weights have to go, and grows from d0. The library estimates one d for all
groups, and refuses groups of unequal rates; parameters with an lr_factor, such as a regularizer's, have a d of their own here.
It reads two numbers of each weight from the device at each step, which on a GPU waits for it: its authors' code, kept as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from vtrain.contract import OptimizedRun, OptimizerSpec, Options, ParameterGroup, fixed
from vtrain_builtin.optimizer_groups import Betas, torch_groups

if TYPE_CHECKING:
    import torch


class ProdigyOptions(Options):
    """Options of `prodigy`."""

    lr: float = Field(1.0, gt=0, examples=[1.0], description="factor of the learning rate that it finds; 1 is meant")
    betas: Betas = Field((0.9, 0.999), description="decay of the running mean of gradients, and of their squares")
    beta3: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="decay of the means that d is estimated from; absent: the root of the second of betas"
    )
    eps: float = Field(1e-8, gt=0, description="added to the root of the squares, times d")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay: a step scales weights by 1 - d x lr x this")
    bias_correction: bool = Field(True, description="Adam's, of the first steps' means")
    safeguard_warmup: bool = Field(
        False, description="keep the warm-up of the learning rate out of the estimate of d; for use with a warm-up"
    )
    d0: float = fixed(1e-6, gt=0, description="first estimate of d, which is never lowered")
    d_coef: float = Field(1.0, gt=0, description="multiplies the estimate of d; 0.5 to 2 are usual")
    growth_rate: float | None = Field(
        None, gt=1, description="d grows at most by this factor in a step, such as 1.02; absent: without a limit"
    )
    slice_p: int = fixed(1, ge=1, description="d is estimated from every n-th number of a weight: less memory")


def build_prodigy(options: ProdigyOptions, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """Raises ValueError when no group has a parameter."""
    from prodigyopt import Prodigy

    from vtrain_builtin.torch_optimizers import JoinedOptimizer

    made = torch_groups(groups, options.lr, options.weight_decay)
    parts = [
        # weight_decay is in the groups alone: given here too, the library would print a line about it.
        Prodigy(
            [group for group in made if group["lr"] == rate],
            lr=rate,
            betas=options.betas,
            beta3=options.beta3,
            eps=options.eps,
            use_bias_correction=options.bias_correction,
            safeguard_warmup=options.safeguard_warmup,
            d0=options.d0,
            d_coef=options.d_coef,
            growth_rate=float("inf") if options.growth_rate is None else options.growth_rate,
            slice_p=options.slice_p,
        )
        for rate in dict.fromkeys(group["lr"] for group in made)
    ]
    return JoinedOptimizer(parts)


def advice(options: ProdigyOptions, run: OptimizedRun) -> Sequence[str]:
    """What of [lr_schedule] does not go with it, and what it costs."""
    found = ["prodigy reads two numbers of each weight from the device at each step: on a GPU its steps wait for them"]
    if run.warms_up and not options.safeguard_warmup:
        found.append(
            "lr_schedule.warmup beside prodigy: small rates mislead its estimate; set optimizer.safeguard_warmup = true, "
            "or leave the warm-up out (it starts from d0 by itself)"
        )
    if run.schedule not in ("constant", "cosine"):
        found.append(f'lr_schedule.use = "{run.schedule}" beside prodigy: its authors use "constant" or "cosine"')
    return found


PRODIGY = OptimizerSpec(
    name="prodigy",
    summary="Adam that finds its learning rate itself (prodigyopt)",
    options=ProdigyOptions,
    build=build_prodigy,
    # d is of all weights together.
    moves=frozenset({"fp32"}),
    state_bytes=16.0,
    usual_lr=(0.1, 10.0),
    sensible_lr=1000.0,
    library=("prodigyopt", "vtrain[optimizers]"),
    advice=advice,
)
