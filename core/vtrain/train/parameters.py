"""Which parameters are trained, and in which groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from vtrain.contract import ParameterGroup, SupportsLearningRate


def trained(module: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, parameter) of all that take a gradient, in the module's order."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def groups(named: Iterable[tuple[str, Tensor]], factors: Mapping[str, float] | None = None) -> list[ParameterGroup]:
    """By two: matrices and kernels decay; vectors (norms, biases, scale tables of one row) do not.

    factors: beginning of a name -> learning-rate factor, for parameters with a rate of their own.
    """
    found: dict[tuple[float, bool], list[tuple[str, Tensor]]] = {}
    for name, parameter in named:
        factor = next((value for start, value in (factors or {}).items() if name.startswith(start)), 1.0)
        found.setdefault((factor, _decays(name, parameter)), []).append((name, parameter))
    order = sorted(found, key=lambda key: (key[0] != 1.0, key[0], not key[1]))
    return [ParameterGroup(tuple(found[key]), decay=key[1], lr_factor=key[0]) for key in order]


def own_rates(regularizers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Beginning of the names of a regularizer's parameters in a Step -> its learning-rate factor."""
    return {
        f"regularizers.{name}.": module.lr_factor
        for name, module in regularizers.items()
        if isinstance(module, SupportsLearningRate)
    }


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and not name.endswith("scale_shift_table")
