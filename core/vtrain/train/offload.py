"""Frozen weights of a denoiser's blocks that wait in the machine's memory, or on a disk, until their block runs.

A module is given other Parameters when its group comes to the card, and those of home when it leaves: what the backward pass has
kept still holds what it computed with. Two facts make it right in training, and small. Blocks are checkpointed as a whole, so
that the forward pass keeps no weights, and the backward pass calls each block again, which brings its group again. And what is
trained, the adapter, never moves. diffusers' own apply_group_offloading is made for generating: in a backward pass it leaves
recomputed blocks on the card (checkpointing stops a recomputation as soon as it has all it needs, before the hook that would let
the weights go), computes the last blocks of a group of several before the first of them has brought its weights, fetches the
block after the one that is needed, and moves adapters too, whose updates it then forgets.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vtrain.config.tables import OffloadTable
from vtrain.contract import CheckpointError, Denoiser, Device, Problem
from vtrain.contract.transfers import Arriving, Transfers
from vtrain.data.caching.sharing import lock

LOCK = "in-use"
FOLDER = "vtrain-offload-"
"""Begins the names of sub-folders of offload.disk, one for each process of a run; the file in it that its process has locked."""


@dataclass(frozen=True)
class Frozen:
    """A weight that moves: a parameter by its owner and name there."""

    owner: nn.Module
    name: str

    @property
    def weight(self) -> nn.Parameter:
        found: nn.Parameter = getattr(self.owner, self.name)
        return found

    def become(self, tensor: Tensor) -> None:
        setattr(self.owner, self.name, nn.Parameter(tensor, requires_grad=False))


class Home(Protocol):
    """Where the weights of a group wait."""

    def leave(self, weights: Sequence[Frozen]) -> None:
        """Let go of what is on the card."""
        ...

    def fetch(self) -> Sequence[Tensor]:
        """The weights on the CPU, in their order."""
        ...


class InMemory:
    """Page-locked memory of the machine: the weights themselves, where everybody else can read them."""

    def __init__(self, weights: Sequence[Frozen], device: Device) -> None:
        self._tensors = [_pinned(each.weight.detach(), device) for each in weights]

    def leave(self, weights: Sequence[Frozen]) -> None:
        for weight, tensor in zip(weights, self._tensors, strict=True):
            weight.become(tensor)

    def fetch(self) -> Sequence[Tensor]:
        return self._tensors


def _pinned(tensor: Tensor, device: Device) -> Tensor:
    """Quantised weights are tensors made of tensors, which are not page-locked as one."""
    home = tensor.cpu()
    return device.pin(home) if type(home) is Tensor else home


class OnDisk:
    """A file of the run's own folder. A weight that is away has no values: who reads it fails, and is not given others."""

    def __init__(self, weights: Sequence[Frozen], file: Path) -> None:
        self._file = file
        try:
            save_file(
                {str(number): each.weight.detach().cpu().contiguous() for number, each in enumerate(weights)}, file
            )
        except (OSError, SafetensorError) as error:  # a full disk is one or the other
            if not isinstance(error, OSError) and "No space" not in str(error) and "I/O" not in str(error):
                raise
            raise _disk_problem(file.parent, error) from error

    def leave(self, weights: Sequence[Frozen]) -> None:
        for each in weights:
            each.become(torch.empty(0, dtype=each.weight.dtype))

    def fetch(self) -> Sequence[Tensor]:
        found = load_file(self._file)
        return [found[str(number)] for number in range(len(found))]


@dataclass
class Group:
    """Weights that come and go together. here: whether they are on the card. coming: on their way."""

    weights: tuple[Frozen, ...]
    home: Home
    here: bool = False
    coming: Arriving | None = field(default=None, repr=False)


class Offload:
    """Groups of frozen weights, and where they are. In memory at most one is on the card, and the next one that comes."""

    def __init__(self, groups: Sequence[Group], transfers: Transfers, *, ahead: bool = False) -> None:
        """ahead: whether the next group is sent for while one is in use."""
        self.groups = list(groups)
        self._transfers, self._ahead = transfers, ahead
        self._latest, self._down = 0, False

    def enter(self, number: int) -> None:
        """Have a group on the card, and no other but the next."""
        following = self._following(number)
        for other, each in enumerate(self.groups):
            if other != number and (each.here or (each.coming is not None and other != following)):
                self._drop(each)
        self._bring(self.groups[number])
        if self._ahead and following is not None and self.groups[following].coming is None:
            self._send(self.groups[following])
        self._latest = number

    def visit(self, number: int) -> None:
        """Have a group on the card beside others; `leave` ends it."""
        self._bring(self.groups[number])

    def leave(self, number: int) -> None:
        self._drop(self.groups[number])

    def clear(self) -> None:
        """Have none on the card: for the time in which something else needs it."""
        for group in self.groups:
            self._drop(group)

    def _following(self, number: int) -> int | None:
        """The group that runs after this one: forward passes go up, backward passes down, and turn at the last group."""
        last = len(self.groups) - 1
        if number != self._latest or number == last:  # else another block of the same group
            self._down = number < self._latest or number == self._latest
        other = number - 1 if self._down and number else number + 1
        return other if other <= last else None

    def _send(self, group: Group) -> None:
        group.coming = self._transfers.send(group.home.fetch())

    def _bring(self, group: Group) -> None:
        if group.here:
            return
        if group.coming is None:
            self._send(group)
        assert group.coming is not None
        for weight, tensor in zip(group.weights, self._transfers.receive(group.coming), strict=True):
            weight.become(tensor)
        group.here, group.coming = True, None

    def _drop(self, group: Group) -> None:
        group.home.leave(group.weights)
        group.here, group.coming = False, None


def offload(denoiser: Denoiser, table: OffloadTable, device: Device, held: ExitStack) -> Offload:
    """Put the frozen weights of the denoiser's blocks away, and all else of it on the device.

    The denoiser lies on the CPU, its adapter is there. held: takes the folder on the disk away again. Raises CheckpointError for
    a disk that is full or cannot be written.
    """
    folder = held.enter_context(own_folder(table.disk)) if table.disk is not None else None
    leaf = table.group == "leaf"
    units = list(_leaves(denoiser) if leaf else _grouped(denoiser.blocks, table.blocks_per_group))
    groups = []
    for number, unit in enumerate(units):
        weights = tuple(_frozen(unit.owners))
        home = OnDisk(weights, folder / f"group-{number:04d}.safetensors") if folder else InMemory(weights, device)
        home.leave(weights)  # group by group: the model is in memory once
        groups.append(Group(weights, home))
    ahead = table.stream and not leaf and Transfers.streams(device)
    made = Offload(groups, Transfers(device, beside=ahead), ahead=ahead)
    _move_rest(denoiser.module, {id(each.weight) for group in groups for each in group.weights}, device)
    for number, unit in enumerate(units):
        for module in unit.modules:
            if leaf:
                module.register_forward_pre_hook(_calling(made.visit, number), prepend=True)
                # Also where checkpointing ends a recomputation in the middle, by an exception.
                module.register_forward_hook(_calling(made.leave, number), always_call=True)
            else:
                module.register_forward_pre_hook(_calling(made.enter, number), prepend=True)
    return made


def _calling(act: Callable[[int], None], number: int) -> Callable[..., None]:
    return lambda *_: act(number)


@dataclass(frozen=True)
class _Unit:
    """modules: whose forward pass needs the weights. owners: of the weights."""

    modules: tuple[nn.Module, ...]
    owners: tuple[nn.Module, ...]


def _grouped(blocks: Sequence[nn.Module], many: int) -> Iterator[_Unit]:
    for start in range(0, len(blocks), many):
        together = tuple(blocks[start : start + many])
        yield _Unit(together, tuple(owner for block in together for owner in block.modules()))


def _leaves(denoiser: Denoiser) -> Iterator[_Unit]:
    """Modules of blocks that have frozen weights of their own, each by itself. One with an adapter counts as a whole: the adapter
    may read the weight that it is added to."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for block in denoiser.blocks:
        inside: set[int] = set()
        for module in block.modules():
            if id(module) in inside:
                continue
            owners = tuple(module.modules()) if isinstance(module, BaseTunerLayer) else (module,)
            inside |= {id(owner) for owner in owners}
            if any(_frozen(owners)):
                yield _Unit((module,), owners)


def _frozen(owners: Sequence[nn.Module]) -> Iterator[Frozen]:
    """Their own weights that are not trained."""
    for owner in owners:
        for name, weight in owner.named_parameters(recurse=False):
            if not weight.requires_grad:
                yield Frozen(owner, name)


def _move_rest(module: nn.Module, away: set[int], device: Device) -> None:
    """Adapters, buffers, and what is outside of blocks, to the device."""
    for owner in module.modules():
        for weight in owner.parameters(recurse=False):
            if id(weight) not in away:
                weight.data = device.move(weight.data)
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, device.move(buffer))


# -- on a disk -----------------------------------------------------------------------------------------------------------


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A fresh sub-folder for this process, removed with all in it afterwards; so are those whose process was killed."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f"{FOLDER}*"):
            _remove_dead(left)
        folder, file = _locked_folder(parent)
    except OSError as error:
        raise _disk_problem(parent, error) from error
    with file:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(parent: Path) -> tuple[Path, BinaryIO]:
    """A new one, and its file that this process has locked. A run that starts between its making and its locking takes it for a
    dead one's and removes it: then another is made."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=FOLDER, dir=parent))
        file = (folder / LOCK).open("wb")
        if lock(file, 0) != "taken" and (folder / LOCK).exists():
            return folder, file
        file.close()


def _remove_dead(folder: Path) -> None:
    """Nobody has its lock, which goes with a process, however it ended."""
    with suppress(OSError), (folder / LOCK).open("r+b") as file:
        if lock(file, 0) == "ours":
            shutil.rmtree(folder, ignore_errors=True)


def _disk_problem(folder: Path, error: Exception) -> CheckpointError:
    what = f"weights cannot be put there: {getattr(error, 'strerror', None) or error}."
    return CheckpointError(Problem(str(folder), what, "Set offload.disk to another folder, or leave it out."))


@contextmanager
def resting(module: nn.Module, offloaded: Offload | None, *, to_cpu: bool, device: Device) -> Iterator[None]:
    """The denoiser leaves the card inside, as far as it may: groups do, and with `to_cpu` all of its weights."""
    if offloaded is not None:
        offloaded.clear()
    if not (to_cpu and device.accelerated):
        yield
        return
    module.to("cpu")
    device.release()
    try:
        yield
    finally:
        module.to(device.torch)
