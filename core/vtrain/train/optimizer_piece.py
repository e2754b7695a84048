"""The piece of a checkpoint that is the optimizer: what it keeps of each parameter, and in its groups.

Tensors go into safetensors, numbers into JSON: nothing is ever pickled or unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtrain.contract import CheckpointError, Problem
from vtrain.contract.run_rules import SET_BY_THE_RUN, Built, built_groups, kept_in_groups, lost_state, state_fits
from vtrain.registry.blame import PartFault
from vtrain.train.checkpoint import misread, read_json
from vtrain.train.piece import Copies, Keep, State
from vtrain.train.pieces import on_cpu, size_of
from vtrain.train.resume import MOST

if TYPE_CHECKING:
    from vtrain.train.sharding import Shares

TENSORS = "optimizer.safetensors"
SCALARS = "optimizer.json"
MARK = "::"
"""Between the name of a parameter and that of a part of its state."""


@dataclass(frozen=True)
class OptimizerPiece:
    """The state of each named parameter, and what an optimizer keeps in its groups (schedule-free's k, prodigy's d).

    own: settings of groups that the configuration file gives. They, and learning rates, never come from a checkpoint.
    stateful: whether its plugin says that it keeps something of each parameter. With some options it may keep nothing.
    built: its groups as they were built: what is as it was is a setting, and stays what the file makes it. None: as they are
    now, before its first step. shares: of what `named` are this process's shares; None: they are whole.
    """

    optimizer: torch.optim.Optimizer
    named: list[tuple[str, Tensor]]
    own: Collection[str] = ()
    stateful: bool = False
    built: Built | None = None
    shares: Shares | None = None
    name: ClassVar[str] = "optimizer"
    files: ClassVar[tuple[str, ...]] = (TENSORS, SCALARS)

    def __post_init__(self) -> None:
        if self.built is None:
            object.__setattr__(self, "built", built_groups(self.optimizer, self.own))

    @property
    def bytes(self) -> int:
        """0 before the first step of a new run: the state comes with it."""
        return size_of(value for value in self._state().values() if isinstance(value, Tensor))

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        if not keep and self.shares is None:
            return State()
        self.check()
        state = self._state()
        tensors = {key: self._joined(key, value) for key, value in state.items() if isinstance(value, Tensor)}
        scalars = {key: value for key, value in state.items() if key not in tensors}
        groups = self._groups()
        tensors |= {
            f"{_group(at)}{MARK}{key}": value
            for at, group in enumerate(groups)
            for key, value in group.items()
            if isinstance(value, Tensor)
        }
        counted = [{k: v for k, v in group.items() if not isinstance(v, Tensor)} for group in groups]
        return State(on_cpu(tensors, keep=keep, copy=copy), {"state": scalars, "groups": counted} if keep else {})

    def write(self, folder: Path, state: State) -> None:
        save_file(dict(state.tensors), folder / TENSORS)
        (folder / SCALARS).write_text(json.dumps(state.values), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Raises CheckpointError when it cannot be read, or is of other parameters."""
        found, counted = _read(folder)
        in_groups = [found.pop(_group(at), {}) for at in range(len(counted))]
        # All of it is compared before anything is changed.
        kept = {_group(at): group for at, group in enumerate(in_groups)}
        if faults := [*_state_faults(found), *_state_faults(kept), *self._group_faults(counted)]:
            raise misread(folder / SCALARS, f"{'; '.join(faults[:5])}.")
        odd = self._misfits(found, counted)
        if odd:
            more = ", ..." if len(odd) > 5 else ""
            what = f"the optimizer's state is of other parameters ({', '.join(odd[:5])}{more})."
            raise CheckpointError(Problem(str(folder), what))
        fixed = {*SET_BY_THE_RUN, *self.own}
        for group, numbers, tensors in zip(self.optimizer.param_groups, counted, in_groups, strict=True):
            group.update({key: value for key, value in {**numbers, **tensors}.items() if key not in fixed})
        counts_on_device = {
            id(parameter)
            for group in self.optimizer.param_groups
            if group.get("fused") or group.get("capturable")
            for parameter in group["params"]
        }
        for name, parameter in self.named:
            if name in found:
                # Not by load_state_dict: that goes by a parameter's number and casts its moments to its type.
                self.optimizer.state[parameter] = {
                    field: _place(self._own(name, value), field, parameter, id(parameter) in counts_on_device)
                    for field, value in found[name].items()
                }

    def check(self, *, stepped: bool = True) -> None:
        """Raises PartFault where the optimizer keeps what a checkpoint does not bring back: a resumed run would be another run.

        stepped: whether it has made a step, so that there may be a state. Nothing is read from the device.
        """
        parameters = (parameter for _, parameter in self.named)
        assert self.built is not None
        found = lost_state(self.optimizer, parameters, self.own, self.built, stateful=stepped and self.stateful)
        if lost := list(dict.fromkeys(found)):
            what = f"it keeps what no checkpoint brings back: {'; '.join(lost[:3])}{'; ...' if len(lost) > 3 else ''}"
            raise PartFault("optimizer", "", what, _KEPT)

    def _groups(self) -> Built:
        assert self.built is not None
        return kept_in_groups(self.optimizer, self.own, self.built)

    def _state(self) -> dict[str, object]:
        """Name of the parameter, MARK, name of the part -> what the optimizer keeps there."""
        return {
            f"{name}{MARK}{key}": value
            for name, parameter in self.named
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def _group_faults(self, counted: list[dict[str, Any]]) -> Iterator[str]:
        """What is stored of a group and can be none of it: a number where it has another thing, a flag where it has no flag."""
        for at, (numbers, group) in enumerate(zip(counted, self.optimizer.param_groups, strict=False)):
            for key, value in numbers.items():
                now = group.get(key)
                if isinstance(value, bool) and (isinstance(now, bool) or (key in group and now is None)):
                    continue
                if not _is_number(value) or math.isnan(value):
                    yield f"groups[{at}].{key} is {json.dumps(value)}, which is no number"
                elif now is not None and not _is_number(now):
                    yield f"groups[{at}].{key} is {value}, and it is no count of this optimizer"

    def _misfits(self, found: Mapping[str, Mapping[str, object]], counted: list[dict[str, Any]]) -> list[str]:
        """What is stored for parameters that there are not, or not in this shape."""
        odd = sorted(found.keys() - {name for name, _ in self.named})
        if len(counted) != len(self.optimizer.param_groups):
            odd.append(f"{len(counted)} groups instead of {len(self.optimizer.param_groups)}")
        return odd + [
            name
            for name, parameter in self.named
            if name in found and not state_fits(found[name], self._whole(name, parameter))
        ]

    def _whole(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter, or what it is a share of."""
        return parameter if self.shares is None else self.shares.whole[name]

    def _joined(self, key: str, value: Tensor) -> Tensor:
        """A part of a parameter's state; of a share's number for number, as a part of the whole."""
        name = key.rpartition(MARK)[0]
        if self.shares is None or not self.shares.alike(name, value):
            return value
        return self.shares.joined(name, value)

    def _own(self, name: str, value: object) -> object:
        """What this process needs of a part of a parameter's state."""
        if self.shares is None or not isinstance(value, Tensor) or value.shape != self.shares.whole[name].shape:
            return value
        return self.shares.share(name, value)


_KEPT = (
    "What an optimizer keeps are tensors and numbers in optimizer.state[parameter], and numbers, flags and tensors on the CPU "
    "in its groups: "
    "state_dict and load_state_dict are not called. Report it to the author of its plugin, or use another optimizer."
)


def _group(at: int) -> str:
    """What stands for a parameter's name before a tensor of a group."""
    return f"groups[{at}]"


def _is_number(value: object) -> TypeGuard[int | float]:
    # To Python a bool is an int: a flag such as amsgrad is a setting and no count.
    return isinstance(value, int | float) and not isinstance(value, bool)


def _state_faults(found: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """Single numbers of parameters' states that can be none: not finite, or a count of steps below 0."""
    for name, state in found.items():
        for field, value in state.items():
            number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if field == "step" and not isinstance(number, Tensor) and not _is_number(number):
                yield f"{name}{MARK}{field} is {json.dumps(number)}, which is no number"
            elif isinstance(number, float) and math.isnan(number):
                yield f"{name}{MARK}{field} is not a number"
            elif field == "step" and isinstance(number, int | float) and not 0 <= number <= MOST:
                yield f"{name}{MARK}{field} is {number:g}, which is no number of steps"


def _read(folder: Path) -> tuple[dict[str, dict[str, object]], list[dict[str, Any]]]:
    """Parameter -> part of its state -> value; and what each group counted."""
    stored = read_json(folder / SCALARS)
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise misread(folder / TENSORS, f"cannot be read: {error}.") from error
    table = stored if isinstance(stored, dict) else {}
    scalars, counted = table.get("state"), table.get("groups")
    if not isinstance(scalars, dict):
        raise misread(folder / SCALARS, '"state" is no table.')
    if not isinstance(counted, list) or not all(isinstance(group, dict) for group in counted):
        raise misread(folder / SCALARS, '"groups" is no list of tables.')
    values: dict[str, object] = {**tensors, **scalars}
    found: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        name, _, field = key.rpartition(MARK)
        found.setdefault(name, {})[field] = value
    return found, counted


def _place(value: object, field: str, parameter: Tensor, count_on_device: bool) -> object:
    """To the parameter's device, but for the step count, which torch keeps on the CPU unless fused or capturable."""
    if not isinstance(value, Tensor) or (field == "step" and not count_on_device):
        return value
    return value.to(parameter.device)
