"""Averages of the weights (EMA), and other weights in the place of those in training for a while."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from vtrain.config.tables import EmaTable
from vtrain.contract import Denoiser, Device, SupportsLora
from vtrain.train.adapter import read_back
from vtrain.train.checkpoint import misread, read_model
from vtrain.train.parameters import DENOISER, adapter_names
from vtrain.train.piece import Copies, Keep, State
from vtrain.train.pieces import on_cpu, size_of
from vtrain.train.resume import MOST

if TYPE_CHECKING:
    from vtrain.train.sharding import Shares


@contextmanager
def swapped(named: Iterable[tuple[str, Tensor]], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, each parameter holds what `values` has under its name, cast to its type; afterwards training's exact bits again,
    also after an exception.

    values: of any type and device, each asked for once, so that a mapping may make them one at a time. A name that it lacks
    keeps its weights. Raises ValueError, with nothing changed, where a shape is another.

    Everything is copied in place: compiled code, DDP and offload keep the addresses of parameters. A value of a parameter's own
    device and type is exchanged with it, which takes no memory beyond one parameter's: until the end it holds training's
    weights, and nobody may read or change it. For any other, training's weights wait in main memory, as many bytes as they
    have; the device holds no second set.

    named: parameters themselves. An alias (`detach`) would follow the memory that a parameter has now, and inside its module may
    leave the card and come back to other memory (`offload.resting`).
    """
    held: list[
        tuple[Tensor, Tensor, bool]
    ] = []  # a parameter, where its bits are, whether those are in the value itself
    with torch.no_grad():
        try:
            for name, parameter in named:
                if name in values:
                    held.append(_exchanged(name, parameter, values[name].detach()))
        except BaseException:
            _given_back(held)
            raise
    try:
        yield
    finally:
        with torch.no_grad():
            _given_back(held)


def _exchanged(name: str, weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Put the value into the weights. Nothing is changed where it raises: what can fail comes before the first copy."""
    if weights.shape != value.shape:
        raise ValueError(f"{name} is {tuple(weights.shape)}, and its value {tuple(value.shape)}")
    alike = (value.dtype, value.device) == (weights.dtype, weights.device)
    if alike:
        one = value.clone()
        value.copy_(weights)
        weights.copy_(one)
        return weights, value, True
    # A copy also where the weights lie in main memory already: `to` would give themselves.
    kept = weights.to("cpu", copy=True)
    weights.copy_(value)
    return weights, kept, False


def _given_back(held: list[tuple[Tensor, Tensor, bool]]) -> None:
    while held:
        weights, kept, exchanged = held.pop()  # each stash is let go as it is used
        if exchanged:
            one = weights.clone()
            weights.copy_(kept)
            kept.copy_(one)
        else:
            weights.copy_(kept)


def decay_at(table: EmaTable, step: int) -> float:
    """The decay of one optimizer step. step: how many the average has seen with it, from 1.

    With warm-up min(decay, (1 + n) / (10 + n)), as TensorFlow's ExponentialMovingAverage(num_updates) and diffusers' EMAModel
    have it: an average that began a while ago forgets the weights that it began with.
    """
    return min(table.decay, (1 + step) / (10 + step)) if table.warmup else table.decay


def compounded(table: EmaTable, taken: int, steps: int) -> float:
    """The decay of an update that stands for the steps after `taken` up to `steps`: the product of theirs.

    Weights that do not move meanwhile give the average that an update at each step would have given.
    """
    return math.prod(decay_at(table, step) for step in range(taken + 1, steps + 1))


_AT_ONCE = 32
"""Weights of another type than fp32 that are cast together: a copy of a few of them is in memory, never of all."""


class Average:
    """An exponential moving average of weights, fp32: a <- d a + (1 - d) w after an optimizer step (Polyak & Juditsky 1992 average
    alike; in this form Tarvainen & Valpola, arXiv 1703.01780).

    named: what is averaged, by name. fp32 whatever the weights are stored in: with a decay of 0.999 an average in bf16, whose
    numbers lie 0.4% apart, would not move. steps: optimizer steps since it began; taken: those of them that are in it.

    An update reads nothing from the device and does not wait for it. On the device it is a few kernels in the order of its work.
    In main memory beside a card the weights are copied out in that order, into page-locked memory, and a thread adds them when
    they are there; the host waits only where one update is not done before the next begins.

    Weights of a step whose loss nobody has looked at yet may get in here. None of that gets out: whatever shows, saves or exports
    an average comes after Loop.read and Loop.check_weights, which end the run at such a step with nothing saved; a resumed one
    has the average of the checkpoint before.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, Tensor]],
        table: EmaTable,
        device: Device,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        """It begins as the weights are. device: of the weights. values: what is averaged in their place, made again each time that
        it is asked for (`EvalWeights`); an update then holds a second set of weights for a moment."""
        self._named = list(named)  # the parameters themselves, as in `swapped`
        self._values = values
        self._table, self._device = table, device
        self._apart = table.on == "cpu" and device.accelerated
        self._waiting: list[Tensor] = []
        self._pool: ThreadPoolExecutor | None = None
        self._adding: Future[None] | None = None
        place = Device().torch if self._apart else None
        self._shadow = {
            name: weights.to(place, torch.float32, copy=True, memory_format=torch.contiguous_format)
            for name, weights in self._current()
        }
        self.steps = self.taken = 0

    def _current(self) -> Iterator[tuple[str, Tensor]]:
        """What is averaged, as it is now; of `values`, made one at a time."""
        for name, parameter in self._named:
            yield name, parameter.detach() if self._values is None else self._values[name]

    def update(self) -> None:
        """After each optimizer step: every `update_every` of them the average takes the weights."""
        self.steps += 1
        if self.steps % self._table.update_every:
            return
        share = 1 - compounded(self._table, self.taken, self.steps)
        self.taken = self.steps
        weights = [each for _, each in self._current()]
        if not self._apart:
            _add(list(self._shadow.values()), weights, share)
            return
        self._settle()  # the page-locked copies of the last update are free
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="average")
            self._waiting = [self._device.pin(torch.empty_like(each, device="cpu")) for each in weights]
        arrived = self._device.copy_out(weights, self._waiting)
        self._adding = self._pool.submit(self._add_arrived, arrived, share)

    def _add_arrived(self, arrived: Callable[[], None], share: float) -> None:
        arrived()
        _add(list(self._shadow.values()), self._waiting, share)

    def _settle(self) -> None:
        if self._adding is not None:
            self._adding.result()
            self._adding = None

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The averaged weights by name, fp32, up to the last update."""
        self._settle()
        return self._shadow

    def in_place(self) -> AbstractContextManager[None]:
        """Inside, the model has the averaged weights (`swapped`)."""
        return swapped(self._named, self.weights)

    @property
    def finite(self) -> bool:
        """Whether all of it is. Waits for the device."""
        sums = torch.stack([value.sum() for value in self.weights.values()])
        return bool(sums.isfinite().all())

    def restore(self, weights: Mapping[str, Tensor], steps: int, taken: int) -> None:
        """As it was: weights of the same names and shapes, fp32."""
        for name, value in self.weights.items():
            value.copy_(weights[name])
        self.steps, self.taken = steps, taken

    def close(self) -> None:
        """End its thread."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


@torch.no_grad()
def _add(average: list[Tensor], weights: list[Tensor], share: float) -> None:
    """a <- a + share (w - a), in place."""
    if all(each.dtype is torch.float32 for each in weights):
        torch._foreach_lerp_(average, weights, share)
        return
    for start in range(0, len(average), _AT_ONCE):
        end = start + _AT_ONCE
        torch._foreach_lerp_(average[start:end], [each.float() for each in weights[start:end]], share)


FOLDER = "ema"
COUNTS = "ema.json"


class _Counts(BaseModel):
    """What ema.json says. steps, taken: as in Average."""

    model_config = ConfigDict(strict=True, extra="forbid")

    steps: int = Field(ge=0, le=MOST)
    taken: int = Field(ge=0, le=MOST)


def has_average(folder: Path) -> bool:
    """Whether a checkpoint holds one."""
    return (folder / COUNTS).is_file()


@dataclass(frozen=True)
class AveragePiece:
    """The averaged weights, below ema/ in the format in which the checkpoint has those in training, fp32: tools that load one load
    the other. Every bit of the average is there, so that it is read back from these files.

    settings: of the adapter's file, None where all weights are trained. reload: a folder -> the denoiser that `Denoiser.save` wrote
    there, on the CPU in fp32. shares: of what the average is this process's shares; None: it is whole.
    """

    denoiser: Denoiser
    average: Average
    settings: Mapping[str, object] | None
    reload: Callable[[Path], Denoiser]
    shares: Shares | None = None
    name: ClassVar[str] = "average"
    files: ClassVar[tuple[str, ...]] = (COUNTS,)

    @property
    def bytes(self) -> int:
        return size_of(self.average.weights.values())

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        counts = _Counts(steps=self.average.steps, taken=self.average.taken)
        module, averaged = self.denoiser.module, self.average.weights
        if self.shares is not None:
            averaged = {name: self.shares.joined(DENOISER + name, value) for name, value in averaged.items()}
        # With buffers as they are: an average of counts or tables would be none.
        found = {**module.state_dict(), **averaged}
        if self.settings is not None:
            found = {key: averaged[name] for key, name in adapter_names(module).items()}
        return State(on_cpu(found, keep=keep, copy=copy), counts.model_dump() if keep else {})

    def write(self, folder: Path, state: State) -> None:
        below = folder / FOLDER
        below.mkdir()
        if self.settings is None:
            self.denoiser.save(below, state.tensors)
        else:
            assert isinstance(self.denoiser, SupportsLora)  # add_lora has refused any other
            self.denoiser.save_lora(below, state.tensors, self.settings)
        (folder / COUNTS).write_text(json.dumps(dict(state.values)), encoding="utf-8")

    @property
    def cheap(self) -> bool:
        return self.settings is not None

    def reread(self, folder: Path) -> Mapping[str, Tensor]:
        """Raises ModelError."""
        if self.settings is None:
            return self.reload(folder / FOLDER).module.state_dict()
        assert isinstance(self.denoiser, SupportsLora)
        return read_back(self.denoiser, folder / FOLDER, self.settings)

    def remarks(self, folder: Path) -> tuple[str, ...]:
        """None."""
        return ()

    def load(self, folder: Path) -> None:
        counts = read_model(folder / COUNTS, _Counts)
        if counts.taken > counts.steps:
            raise misread(folder / COUNTS, f"taken is {counts.taken}, and steps {counts.steps}.")
        found = self.reread(folder)
        if self.settings is not None:
            names = adapter_names(self.denoiser.module)
            found = {names[key]: value for key, value in found.items() if key in names}
        for name, value in self.average.weights.items():
            shape = value.shape if self.shares is None else self.shares.whole[DENOISER + name].shape
            if name not in found or found[name].shape != shape or found[name].dtype is not torch.float32:
                raise misread(folder / FOLDER, f"the average there does not fit this model: {name}.")
            if not bool(found[name].isfinite().all()):
                raise misread(folder / FOLDER, f"{name} has numbers that are not finite.")
        if self.shares is not None:
            found = {name: self.shares.share(DENOISER + name, found[name]) for name in self.average.weights}
        self.average.restore(found, counts.steps, counts.taken)
