"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) in three forms.

`adamw`: torch's own, fused where the device has the kernel. `adamw_bf16`: of bf16 weights with bf16 moments and stochastic
rounding; half the memory of fp32 weights and moments. `adamw8bit`: with 8-bit moments in blocks of 256 with a scale each (arXiv
2110.02861), of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from vtrain.contract import Device, OptimizedRun, OptimizerSpec, ParameterGroup, fixed
from vtrain_builtin.optimizer_groups import SENSIBLE_LR, USUAL_LR, Betas, DecoupledDecay, decay_advice, torch_groups

if TYPE_CHECKING:
    import torch

FUSED = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Device types for which torch has a fused AdamW of floating-point weights."""


class AdamWOptions(DecoupledDecay):
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
    advice=decay_advice,
)


class AdamWBf16Options(AdamWOptions):
    """Options of `adamw_bf16`."""

    seed: int = Field(0, ge=0, lt=2**63, description="of the rounding, beside the step and the weight's name")


def build_adamw_bf16(options: AdamWBf16Options, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """fp32 weights, such as a regularizer's, are moved as `adamw` moves them. Raises ValueError when no group has a parameter."""
    from vtrain_builtin.torch_optimizers import JoinedOptimizer, StochasticAdamW

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


def advice(options: AdamWBf16Options, run: OptimizedRun) -> Sequence[str]:
    """Where there is nothing for it to round."""
    found = decay_advice(options, run)
    if run.trained == "bf16":
        return found
    seed = ", and optimizer.seed does nothing" if "seed" in options.model_fields_set else ""
    return (
        *found,
        f"adamw_bf16 trains fp32 weights here, as adamw does: it rounds nothing, and saves no memory{seed}. It is for full "
        'training with precision.base = "bf16"',
    )


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
    advice=advice,
)


class AdamW8bitOptions(AdamWOptions):
    """Options of `adamw8bit`."""

    min_8bit_size: int = fixed(4096, ge=1, description="a weight of fewer numbers keeps fp32 moments")


def build_adamw8bit(options: AdamW8bitOptions, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """Raises ValueError when no group has a parameter."""
    from vtrain_builtin.blockwise_adamw import BlockwiseAdamW

    return BlockwiseAdamW(
        torch_groups(groups, options.lr, options.weight_decay),
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        min_8bit_size=options.min_8bit_size,
    )


ADAMW8BIT = OptimizerSpec(
    name="adamw8bit",
    summary="AdamW with 8-bit moments (bitsandbytes)",
    options=AdamW8bitOptions,
    build=build_adamw8bit,
    # Blocks of a part are other blocks than those of the whole; and bf16 weights would not move.
    moves=frozenset({"fp32"}),
    # Two moments of a byte, and two scales of 4 bytes for each 256 numbers.
    state_bytes=2.0 + 8 / 256,
    usual_lr=USUAL_LR,
    sensible_lr=SENSIBLE_LR,
    library=("bitsandbytes", "vtrain[bitsandbytes]"),
    advice=decay_advice,
)
