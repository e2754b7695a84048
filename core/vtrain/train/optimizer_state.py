"""An optimizer's state as safetensors and JSON: nothing is ever unpickled.

Kept are the state of each parameter, under its name, and numbers that an optimizer counts in its groups (schedule-free's k,
prodigy's d). Learning rates and other settings come from the configuration file, never from a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtrain.contract import CheckpointError, Problem

TENSORS = "optimizer.safetensors"
SCALARS = "optimizer.json"
MARK = "::"


def save_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, named: list[tuple[str, Tensor]], own: Collection[str] = ()
) -> None:
    """Write the state of each named parameter below `folder`. own: settings of groups that are the file's."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, object] = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}{MARK}{key}"] = value.detach().contiguous().cpu()
            else:
                scalars[f"{name}{MARK}{key}"] = value
    save_file(tensors, folder / TENSORS)
    groups = [_counted(group, own) for group in optimizer.param_groups]
    (folder / SCALARS).write_text(json.dumps({"state": scalars, "groups": groups}), encoding="utf-8")


def _counted(group: Mapping[str, object], own: Collection[str]) -> dict[str, int | float]:
    """Numbers of a group that no configuration gives. What torch's own classes keep there are settings of theirs."""
    fixed = {"lr", "initial_lr", *own}
    return {
        key: value
        for key, value in group.items()
        if key not in fixed and isinstance(value, int | float) and not isinstance(value, bool)
    }


def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, named: list[tuple[str, Tensor]], own: Collection[str] = ()
) -> None:
    """Read back what `save_optimizer` wrote, bit for bit.

    Raises CheckpointError when the state is of other parameters.
    """
    found: dict[str, dict[str, object]] = {}
    stored, groups = _read(folder)
    for key, value in stored:
        name, _, field = key.rpartition(MARK)
        found.setdefault(name, {})[field] = value
    odd = sorted(found.keys() - {name for name, _ in named})
    if len(groups) != len(optimizer.param_groups):
        odd.append(f"{len(groups)} groups instead of {len(optimizer.param_groups)}")
    odd += [name for name, p in named if name in found and not _fits(found[name], p)]
    if odd:
        what = f"the optimizer's state is of other parameters ({', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''})."
        raise CheckpointError(Problem(str(folder), what))
    for group, counted in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in counted.items() if key not in own})
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


def _read(folder: Path) -> tuple[list[tuple[str, object]], list[dict[str, int | float]]]:
    try:
        tensors: dict[str, object] = dict(load_file(folder / TENSORS))
        stored = json.loads((folder / SCALARS).read_text(encoding="utf-8"))
        scalars: dict[str, object] = dict(stored["state"])
        groups: list[dict[str, int | float]] = [dict(group) for group in stored["groups"]]
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(Problem(str(folder), f"the optimizer's state cannot be read: {error}.")) from error
    return [*tensors.items(), *scalars.items()], groups


def _fits(state: dict[str, object], parameter: Tensor) -> bool:
    shaped = [v for v in state.values() if isinstance(v, Tensor) and v.ndim == parameter.ndim and v.ndim > 0]
    return all(value.shape == parameter.shape for value in shaped)


def _place(value: object, field: str, parameter: Tensor, count_on_device: bool) -> object:
    """To the parameter's device, but for the step count, which torch keeps on the CPU unless fused or capturable."""
    if not isinstance(value, Tensor) or (field == "step" and not count_on_device):
        return value
    return value.to(parameter.device)
