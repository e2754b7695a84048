"""Parameter groups as torch's optimizers take them, and options that several optimizers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from vtrain.contract import OptimizedRun, Options, ParameterGroup

if TYPE_CHECKING:
    import torch

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]

USUAL_LR, SENSIBLE_LR = (1e-7, 1e-2), 1.0
"""Of optimizers whose step moves each weight by about lr, whatever its gradient's size: a model's weights are of the order of 0.01
to 1."""


class DecoupledDecay(Options):
    """Options `lr` and `weight_decay`, of a decay that scales weights by 1 - lr x weight_decay in a step (arXiv 1711.05101)."""

    @property
    def scaled(self) -> float:
        """By what less than 1 a step scales weights."""
        return float(math.prod(self.model_dump(include={"lr", "weight_decay"}).values()))


def decay_advice(options: Options, run: OptimizedRun) -> list[str]:
    """A decay by which nothing of a weight is left in a step."""
    if not isinstance(options, DecoupledDecay) or options.scaled < 1:
        return []
    return [
        f"optimizer.weight_decay: lr x weight_decay is {options.scaled:g}, and a step scales weights by 1 less that: nothing of "
        "them is left. 0.01 to 0.1 are usual"
    ]


def torch_groups(
    groups: Sequence[ParameterGroup], lr: float, weight_decay: float, *, by_type: bool = False
) -> list[dict[str, Any]]:
    """With `decay` False, weight decay is 0; lr_factor multiplies lr. Raises ValueError when no group has a parameter.

    by_type: a group holds weights of one type.
    """
    found = [
        {
            "params": list(parameters),
            "lr": lr * group.lr_factor,
            "weight_decay": weight_decay if group.decay else 0.0,
        }
        for group in groups
        for parameters in (_by_type(group) if by_type else [group.parameters])
        if parameters
    ]
    if not found:
        raise ValueError("an optimizer without a parameter")
    return found


def _by_type(group: ParameterGroup) -> list[list[tuple[str, torch.Tensor]]]:
    """Types in the order in which they come."""
    found: dict[torch.dtype, list[tuple[str, torch.Tensor]]] = {}
    for name, weight in group.parameters:
        found.setdefault(weight.dtype, []).append((name, weight))
    return list(found.values())
