"""`adamw_bf16`: AdamW of bf16 weights with bf16 moments and stochastic rounding; half the memory of fp32 weights and moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from vtrain.contract import OptimizerSpec, ParameterGroup
from vtrain_builtin.adamw import AdamWOptions, build_adamw
from vtrain_builtin.optimizer_groups import SENSIBLE_LR, USUAL_LR, torch_groups

if TYPE_CHECKING:
    import torch


class AdamWBf16Options(AdamWOptions):
    """Options of `adamw_bf16`."""

    seed: int = Field(0, ge=0, lt=2**63, description="of the rounding, beside the step and the weight's name")


def build_adamw_bf16(options: AdamWBf16Options, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """fp32 weights, such as a regularizer's, are moved as `adamw` moves them. Raises ValueError when no group has a parameter."""

    from vtrain_builtin.joined_optimizer import JoinedOptimizer
    from vtrain_builtin.stochastic_adamw import StochasticAdamW

    low = [_only(group, low=True) for group in groups]
    rest = [_only(group, low=False) for group in groups]
    parts: list[torch.optim.Optimizer] = []
    if any(group.parameters for group in low):
        made = torch_groups(low, options.lr, options.weight_decay)
        parts.append(StochasticAdamW(made, options.betas, options.eps, options.seed))
    if any(group.parameters for group in rest) or not parts:
        parts.append(build_adamw(options, rest))
    return JoinedOptimizer(parts)


def _only(group: ParameterGroup, *, low: bool) -> ParameterGroup:
    """Its bf16 parameters, or its others."""
    import torch

    chosen = tuple(each for each in group.parameters if (each[1].dtype == torch.bfloat16) is low)
    return ParameterGroup(chosen, decay=group.decay, lr_factor=group.lr_factor)


ADAMW_BF16 = OptimizerSpec(
    name="adamw_bf16",
    summary="AdamW of bf16 weights, with bf16 moments and stochastic rounding",
    options=AdamWBf16Options,
    build=build_adamw_bf16,
    moves=frozenset({"fp32", "bf16"}),
    state_bytes=8.0,
    state_bytes_of={"bf16": 4.0},
    usual_lr=USUAL_LR,
    sensible_lr=SENSIBLE_LR,
)
