"""`lion`: the Lion optimizer (Chen et al., arXiv 2302.06675, algorithm 2), as the package lion-pytorch has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from vtrain.contract import OptimizerSpec, Options, ParameterGroup, hookimpl

if TYPE_CHECKING:
    import torch

Beta = Annotated[float, Field(ge=0, lt=1)]


class LionOptions(Options):
    """Options of `lion`. Its authors take a third to a tenth of AdamW's learning rate, and 3 to 10 times its weight decay."""

    lr: float = Field(gt=0, examples=[3e-5], description="learning rate: how far a step moves each weight")
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        (0.9, 0.99), description="share of the momentum in a step, and decay of the momentum"
    )
    weight_decay: float = Field(0.1, ge=0, description="a step scales weights by 1 - lr x weight_decay")


def build_lion(options: LionOptions, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """groups: with `decay` False, weight decay is 0; lr_factor multiplies lr."""
    from lion_pytorch import Lion  # type: ignore[import-untyped]

    settings = [
        {
            "params": list(group.parameters),
            "lr": options.lr * group.lr_factor,
            "weight_decay": options.weight_decay if group.decay else 0.0,
        }
        for group in groups
    ]
    lion: torch.optim.Optimizer = Lion(settings, lr=options.lr, betas=options.betas)
    return lion


LION = OptimizerSpec(
    name="lion",
    summary="Lion: the sign of a momentum, with half of AdamW's state",
    options=LionOptions,
    build=build_lion,
    moves=frozenset({"fp32", "sharded"}),
    state_bytes=4.0,
    usual_lr=(1e-7, 1e-3),
    sensible_lr=0.1,
)


@hookimpl
def vtrain_optimizers() -> tuple[OptimizerSpec, ...]:
    return (LION,)
