"""Optimizers of torch-optimi (MIT): fp32 weights as the library has it, bf16 weights by its step in fp32 (`split_weights`).

On a CUDA device the library's Triton kernels are used where Triton is installed. Not its Kahan summation, which keeps what rounding
took in bf16: of weights near 1 it lost 85% of the way at a rate of 1e-5, all of it at 5e-6, and the usual decay. Groups are of one
type each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from vtrain.contract import Device, Moved, OptimizedRun, OptimizerSpec, Options, ParameterGroup, fixed
from vtrain_builtin.optimizer_groups import (
    SENSIBLE_LR,
    USUAL_LR,
    Beta,
    Betas,
    DecoupledDecay,
    decay_advice,
    torch_groups,
)

if TYPE_CHECKING:
    import torch

LIBRARY = ("optimi", "vtrain[optimizers]")
_MEANS = "decay of the running mean of gradients, and of their squares"
_DECAY = "decoupled decay: a step scales weights by 1 - lr x weight_decay"


class AdamOptions(Options):
    """Options of `optimi-adam`."""

    lr: float = Field(gt=0, examples=[1e-4], description="learning rate")
    betas: Betas = Field((0.9, 0.99), description=_MEANS)
    eps: float = Field(1e-6, gt=0, description="added to the root of the squares")
    weight_decay: float = Field(
        0.0, ge=0, description="added to the gradient, times the weight (L2); optimi-adamw has the decoupled one"
    )


class AdamWOptions(AdamOptions, DecoupledDecay):
    """Options of `optimi-adamw`."""

    weight_decay: float = Field(0.01, ge=0, description=_DECAY)


class StableAdamWOptions(AdamWOptions):
    """Options of `optimi-stableadamw`."""

    # It lies squared beside the moments, and would come back with them.
    eps: float = fixed(
        1e-6, gt=0, description="added to the root of the squares, and the least of them in the clipping"
    )


class RAdamOptions(AdamOptions, DecoupledDecay):
    """Options of `optimi-radam`."""

    weight_decay: float = Field(0.0, ge=0, description=_DECAY)


class RangerOptions(RAdamOptions):
    """Options of `optimi-ranger`."""

    k: int = Field(6, ge=1, description="steps between two of the slow weights")
    alpha: float = Field(0.5, gt=0, le=1, description="share of the way that the slow weights then go")


class LionOptions(DecoupledDecay):
    """Options of `optimi-lion`. Its authors take a third to a tenth of AdamW's learning rate, and 3 to 10 times its decay."""

    lr: float = Field(gt=0, examples=[3e-5], description="learning rate: how far a step moves each weight")
    betas: Betas = Field((0.9, 0.99), description="share of the momentum in a step, and decay of the momentum")
    weight_decay: float = Field(0.0, ge=0, description=_DECAY)


class AdanOptions(Options):
    """Options of `optimi-adan`."""

    lr: float = Field(gt=0, examples=[1e-4], description="learning rate")
    betas: Annotated[tuple[Beta, Beta, Beta], Field(strict=False)] = Field(
        (0.98, 0.92, 0.99), description="decay of the running means of gradients, of their differences, and of squares"
    )
    eps: float = Field(1e-6, gt=0, description="added to the root of the squares")
    weight_decay: float = Field(0.02, ge=0, description="a step divides weights by 1 + lr x weight_decay")


class SgdOptions(DecoupledDecay):
    """Options of `optimi-sgd`."""

    lr: float = Field(gt=0, examples=[1e-2], description="learning rate: a step is lr times the gradient")
    # At 0 there is none in a state that the other would go on from.
    momentum: float = fixed(0.9, ge=0, lt=1, description="decay of the running sum of gradients; 0: none is kept")
    weight_decay: float = Field(0.0, ge=0, description=_DECAY)


def _builder(
    name: str, *, sharded: bool, **settings: object
) -> Callable[[Any, Sequence[ParameterGroup]], torch.optim.Optimizer]:
    """build() of the library's class `name`. settings: of its own that our options do not have."""

    def build(options: Any, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        import optimi

        from vtrain_builtin.split_weights import split

        made = torch_groups(groups, options.lr, options.weight_decay, by_type=True)
        for group in made:
            group |= _kernels([weight for _, weight in group["params"]])
        given = options.model_dump(exclude={"lr", "weight_decay"})
        kind: Any = split(getattr(optimi, name), whole=not sharded)
        optimizer: torch.optim.Optimizer = kind(made, lr=options.lr, **given, **settings)
        return optimizer

    return build


def _kernels(weights: Sequence[torch.Tensor]) -> dict[str, object]:
    """Said here, not left to the library's first step: a resumed run may be on another device."""
    from optimi.utils import HAS_TRITON

    devices = [Device.of(weight) for weight in weights]
    triton = HAS_TRITON and all(device.kind == "cuda" and device.has_bf16 for device in devices)
    return {"kahan_sum": False, "triton": triton, "foreach": False}


SLOWEST = 0.995
"""Decay of a running mean that is kept in bf16: with slower ones a step changes it by less than half of what bf16 can tell apart
(2^-8 of it). After gradients fell to a tenth, optimi-adamw with 0.999 went half of the way of fp32 weights, with 0.99 all of it."""


def _advice(options: Any, run: OptimizedRun) -> Sequence[str]:
    found, given = decay_advice(options, run), options.model_dump()
    slow = [each for each in given.get("betas", (given.get("momentum", 0.0),)) if each > SLOWEST]
    if run.trained != "bf16" or not slow:
        return found
    key = "betas" if "betas" in given else "momentum"
    return (
        *found,
        f"optimizer.{key}: of bf16 weights the running means are bf16 too, and a decay of {slow[0]:g} is lost in rounding, so that "
        f"steps are of a wrong size. Take at most {SLOWEST:g}, or adamw_bf16, which rounds by chance",
    )


def _spec(
    name: str,
    summary: str,
    options: type[Options],
    fp32: float,
    bf16: float | None,
    *,
    sharded: bool = True,
    usual: tuple[float, float] = USUAL_LR,
    **settings: object,
) -> OptimizerSpec:
    """fp32, bf16: bytes of state per parameter; None: it moves no bf16."""
    moves: dict[Moved, bool] = {"fp32": True, "bf16": bf16 is not None, "sharded": sharded}
    how = "; bf16 weights with the bits that rounding takes beside them" if moves["bf16"] else ""
    return OptimizerSpec(
        name=f"optimi-{name.lower()}",
        summary=f"{summary}{how} (torch-optimi)",
        options=options,
        build=_builder(name, sharded=sharded, **settings),
        moves=frozenset(each for each, true in moves.items() if true),
        state_bytes=fp32,
        state_bytes_of={} if bf16 is None else {"bf16": bf16},
        usual_lr=usual,
        sensible_lr=SENSIBLE_LR,
        library=LIBRARY,
        advice=_advice,
    )


OPTIMI = (
    _spec("Adam", "Adam with L2 weight decay", AdamOptions, 8.0, 6.0),
    _spec("AdamW", "AdamW", AdamWOptions, 8.0, 6.0),
    # It clips by the root mean square of a whole tensor's update: a part of one would be clipped otherwise.
    _spec("StableAdamW", "AdamW whose updates are clipped by tensor", StableAdamWOptions, 8.0, 6.0, sharded=False),
    _spec("RAdam", "Adam that warms up by its own variance", RAdamOptions, 8.0, 6.0, decouple_wd=True),
    # Its slow weights would be bf16, and are what the others are set to: the rest of both would be lost.
    _spec("Ranger", "RAdam with lookahead", RangerOptions, 12.0, None, decouple_wd=True),
    _spec("Adan", "Adam with Nesterov's momentum of differences", AdanOptions, 16.0, 10.0),
    _spec("Lion", "the sign of a momentum", LionOptions, 4.0, 4.0, usual=(1e-7, 1e-3)),
    _spec("SGD", "stochastic gradient descent", SgdOptions, 4.0, 4.0, decouple_wd=True, usual=(1e-6, 1.0)),
)
"""References: Adam 1412.6980, AdamW 1711.05101, StableAdamW 2304.13013, RAdam 1908.03265, Ranger (Lookahead 1907.08610), Adan
2208.06677, Lion 2302.06675 (arXiv)."""
