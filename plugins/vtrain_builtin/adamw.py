"""`adamw`: torch's own AdamW (Loshchilov and Hutter, arXiv 1711.05101), fused where the device has the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from vtrain.contract import Device, OptimizerSpec, Options, ParameterGroup
from vtrain_builtin.optimizer_groups import SENSIBLE_LR, USUAL_LR, Betas, torch_groups

if TYPE_CHECKING:
    import torch

FUSED = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Device types for which torch has a fused AdamW of floating-point weights."""


class AdamWOptions(Options):
    """Options of `adamw`. All may change at a resume: the state does not depend on them."""

    lr: float = Field(gt=0, examples=[1e-4], description="learning rate")
    betas: Betas = Field((0.9, 0.999), description="decay of the running mean of gradients, and of their squares")
    eps: float = Field(1e-8, gt=0, description="added to the root of the squares")
    weight_decay: float = Field(
        0.01, ge=0, description="decoupled decay: a step scales weights by 1 - lr x weight_decay"
    )


def build_adamw(options: AdamWOptions, groups: Sequence[ParameterGroup]) -> torch.optim.AdamW:
    """groups: with `decay` False, weight decay is 0; lr_factor multiplies lr. Raises ValueError when no group has a parameter."""
    import torch

    settings = torch_groups(groups, options.lr, options.weight_decay)
    weights = [weight for group in groups for _, weight in group.parameters]
    fused = all(Device.of(weight).kind in FUSED and weight.is_floating_point() for weight in weights)
    # None and not False: torch then chooses among its other forms itself.
    return torch.optim.AdamW(settings, lr=options.lr, betas=options.betas, eps=options.eps, fused=fused or None)


ADAMW = OptimizerSpec(
    name="adamw",
    summary="AdamW, torch's own, fused where the device allows",
    options=AdamWOptions,
    build=build_adamw,
    moves=frozenset({"fp32", "sharded"}),
    state_bytes=8.0,
    usual_lr=USUAL_LR,
    sensible_lr=SENSIBLE_LR,
)
