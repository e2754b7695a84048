"""`adamw8bit`: AdamW with 8-bit moments in blocks of 256 with a scale each (arXiv 2110.02861), of bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from vtrain.contract import OptimizerSpec, ParameterGroup, fixed
from vtrain_builtin.adamw import AdamWOptions
from vtrain_builtin.optimizer_groups import SENSIBLE_LR, USUAL_LR, torch_groups

if TYPE_CHECKING:
    import torch


class AdamW8bitOptions(AdamWOptions):
    """Options of `adamw8bit`."""

    min_8bit_size: int = fixed(4096, ge=1, description="a weight of fewer numbers keeps fp32 moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the squares")


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
)
