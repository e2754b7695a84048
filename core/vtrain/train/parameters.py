"""Which parameters are trained, and in which groups."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from vtrain.contract import ParameterGroup


def trained(module: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, parameter) of all that take a gradient, in the module's order."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def groups(named: Iterable[tuple[str, Tensor]]) -> list[ParameterGroup]:
    """Two groups: matrices and kernels decay; vectors (norms, biases, scale tables of one row) do not."""
    named = list(named)
    decayed = tuple((name, parameter) for name, parameter in named if _decays(name, parameter))
    plain = tuple((name, parameter) for name, parameter in named if not _decays(name, parameter))
    both = (ParameterGroup(decayed, decay=True), ParameterGroup(plain, decay=False))
    return [group for group in both if group.parameters]


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and not name.endswith("scale_shift_table")
