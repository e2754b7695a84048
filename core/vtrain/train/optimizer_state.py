"""An optimizer's state as safetensors and JSON: nothing is ever unpickled.

Only per-parameter state is kept, under the parameter's name. Learning rates and other settings come from the file.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtrain.contract import CheckpointError, Problem

TENSORS = "optimizer.safetensors"
SCALARS = "optimizer.json"
MARK = "::"


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer, named: list[tuple[str, Tensor]]) -> None:
    """Write the state of each named parameter below `folder`."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, object] = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}{MARK}{key}"] = value.detach().contiguous().cpu()
            else:
                scalars[f"{name}{MARK}{key}"] = value
    save_file(tensors, folder / TENSORS)
    (folder / SCALARS).write_text(json.dumps(scalars), encoding="utf-8")


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, named: list[tuple[str, Tensor]]) -> None:
    """Read back what `save_optimizer` wrote, bit for bit.

    Raises CheckpointError when the state is of other parameters.
    """
    found: dict[str, dict[str, object]] = {}
    for key, value in _read(folder):
        name, _, field = key.rpartition(MARK)
        found.setdefault(name, {})[field] = value
    names = {name for name, _ in named}
    odd = sorted(names.symmetric_difference(found)) if found else []
    odd += [name for name, p in named if name in found and not _fits(found[name], p)]
    if odd:
        what = f"the optimizer's state is of other parameters ({', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''})."
        raise CheckpointError(Problem(str(folder), what))
    counts_on_device = {
        id(p)
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for p in group["params"]
    }
    for name, parameter in named:
        if name in found:
            optimizer.state[parameter] = {
                field: _place(value, field, parameter, id(parameter) in counts_on_device)
                for field, value in found[name].items()
            }


def _read(folder: Path) -> list[tuple[str, object]]:
    try:
        tensors: dict[str, object] = dict(load_file(folder / TENSORS))
        scalars: dict[str, object] = dict(json.loads((folder / SCALARS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(Problem(str(folder), f"the optimizer's state cannot be read: {error}.")) from error
    return [*tensors.items(), *scalars.items()]


def _fits(state: dict[str, object], parameter: Tensor) -> bool:
    shaped = [v for v in state.values() if isinstance(v, Tensor) and v.ndim == parameter.ndim and v.ndim > 0]
    return all(value.shape == parameter.shape for value in shaped)


def _place(value: object, field: str, parameter: Tensor, count_on_device: bool) -> object:
    """To the parameter's device, but for the step count, which torch keeps on the CPU unless fused or capturable."""
    if not isinstance(value, Tensor) or (field == "step" and not count_on_device):
        return value
    return value.to(parameter.device)
