"""`muon`: torch's Muon for weights that are matrices, torch's AdamW for the rest, as one optimizer.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) makes the momentum of a matrix orthogonal; the learning rate of each
is scaled by 0.2 sqrt(max(rows, columns)), so that its step is as large as AdamW's and both go by one rate (Liu et al., arXiv
2502.16982). Which weights are matrices, as its author has it: those of two dimensions, and convolution kernels over several input
channels, as (outputs, inputs x kernel). AdamW takes what is none: norms, biases, tables of vectors (what does not decay), and
depthwise kernels, each of whose channels is a filter of its own; and the model's first and last layers, named by `adamw_modules`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from vtrain.contract import OptimizedRun, OptimizerSpec, ParameterGroup, fixed
from vtrain_builtin.adamw import AdamWOptions, build_adamw
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
    from torch import Tensor


class MuonOptions(DecoupledDecay):
    """Options of `muon`. betas and eps are AdamW's, lr and weight_decay both have."""

    lr: float = Field(gt=0, examples=[1e-4], description="learning rate; one that is right for AdamW is right here")
    momentum: Beta = Field(0.95, description="of Muon: decay of the running mean of gradients")
    nesterov: bool = Field(True, description="Muon looks one step ahead along the momentum")
    ns_steps: int = Field(5, ge=1, lt=100, description="Newton-Schulz iterations that make a matrix orthogonal, nearly")
    weight_decay: float = Field(
        0.01, ge=0, description="decoupled decay: a step scales weights by 1 - lr x weight_decay"
    )
    # A weight's state is that of the one that moves it.
    adamw_modules: Annotated[tuple[str, ...], Field(strict=False)] = fixed(
        ("patch_embedding", "patch_embed", "proj_out"),
        description="modules whose weights AdamW moves too (parts of their names between dots): Muon is meant for layers "
        "between others, not for a model's first and last. The default names them as diffusers' video transformers do",
    )
    betas: Betas = Field((0.9, 0.999), description="of AdamW: decay of the running mean of gradients, and of squares")
    eps: float = Field(1e-8, gt=0, description="of AdamW: added to the root of the squares")


def build_muon(options: MuonOptions, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """Raises ValueError when no group has a parameter."""
    from vtrain_builtin.torch_optimizers import JoinedOptimizer, MatrixMuon

    def taken(name: str, weight: Tensor, decays: bool) -> bool:
        return decays and is_matrix(weight) and not set(name.split(".")) & set(options.adamw_modules)

    matrices = [_where(group, lambda *each: taken(*each)) for group in groups]
    others = [_where(group, lambda *each: not taken(*each)) for group in groups]
    parts: list[Any] = []
    if any(group.parameters for group in matrices):
        made = torch_groups(matrices, options.lr, options.weight_decay)
        parts.append(MatrixMuon(made, options.momentum, options.nesterov, options.ns_steps))
    if any(group.parameters for group in others) or not parts:
        same = AdamWOptions(lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay)
        parts.append(build_adamw(same, others))
    return JoinedOptimizer(parts)


def is_matrix(weight: Tensor) -> bool:
    """Whether it maps several inputs to several outputs. In memory of its own order, or its flat view would be a copy."""
    return weight.ndim >= 2 and min(weight.shape[:2]) > 1 and weight.is_contiguous()


def _where(group: ParameterGroup, chosen: Callable[[str, Tensor, bool], bool]) -> ParameterGroup:
    return replace(group, parameters=tuple(each for each in group.parameters if chosen(*each, group.decay)))


def advice(options: MuonOptions, run: OptimizedRun) -> Sequence[str]:
    """Modules that the file names and the model does not have."""
    found = decay_advice(options, run)
    if run.names is None or "adamw_modules" not in options.model_fields_set:
        return found
    parts = {part for name in run.names for part in name.split(".")}
    return found + [
        f'optimizer.adamw_modules: nothing of the model that is trained is called "{module}"'
        for module in options.adamw_modules
        if module not in parts
    ]


MUON = OptimizerSpec(
    name="muon",
    summary="Muon for matrices and convolution kernels, AdamW for the rest (both torch's own)",
    options=MuonOptions,
    build=build_muon,
    # An update is of a whole matrix, and lost in bf16 as any of its size.
    moves=frozenset({"fp32"}),
    # Of matrices, which nearly all weights are; AdamW keeps 8 of the others.
    state_bytes=4.0,
    usual_lr=USUAL_LR,
    sensible_lr=SENSIBLE_LR,
    advice=advice,
)
