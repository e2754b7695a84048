"""The pieces of a checkpoint: the denoiser or its adapter, regularizers, the optimizer, where the run stands, the configuration.

Tensors go into safetensors, all else into JSON and text: nothing is ever pickled or unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vtrain.contract import CheckpointError, Denoiser, Problem, SupportsLora
from vtrain.train.adapter import changes_nothing, read_back
from vtrain.train.checkpoint import misread
from vtrain.train.parameters import load_lora_state, lora_state
from vtrain.train.piece import Copies, Keep, State
from vtrain.train.resume import STATE, RunState, write_state

if TYPE_CHECKING:
    pass

CONFIG = "config.toml"


def on_cpu(tensors: Mapping[str, Tensor], *, keep: Keep = True, copy: Copies | None = None) -> dict[str, Tensor]:
    """The same on the CPU, contiguous and out of the graph, as files take them. Raises OSError where `keep` is a folder.

    What lies in shares with several processes is put together, one tensor after the other: all of them call it. keep: whether this
    process wants any, and where (`Keep`); nothing is copied for one that does not.

    What lies there so already is not copied unless there is a `copy`: it is training's own memory, and must be written before the
    next step. What lies on a card is: two billion fp32 weights take 8 GB of main memory until they are written, their two moments
    16 GB.
    """
    found: dict[str, Tensor] = {}
    failed: OSError | None = None
    for name, value in tensors.items():
        try:
            got = _gathered(name, value, keep if failed is None else False, copy)
        except OSError as error:  # the others wait for this process's part of what is left
            failed = error
        else:
            found |= {} if got is None else {name: got}
    if failed is not None:
        raise failed
    return found


def _gathered(name: str, value: Tensor, keep: Keep, copy: Copies | None) -> Tensor | None:
    """One of them. No name holds what was put together when it is in a file."""
    # Of a DTensor, whose import takes seconds.
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    if not keep:
        return None
    if copy is not None:
        return copy.of(name, whole.detach())
    got = whole.detach().contiguous().to("cpu")
    return _in_a_file(got, keep) if isinstance(keep, Path) and whole is not value and got.numel() else got


def _in_a_file(value: Tensor, folder: Path) -> Tensor:
    """The same, read from a file without a name, which is gone when the tensor is: the system takes its memory when it needs it.

    Written, not mapped to be written: a full disk is an error then, and no signal that ends the process.
    """
    flat = value.reshape(-1)
    with NamedTemporaryFile(dir=folder) as file:
        file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        read = torch.from_file(file.name, shared=False, size=flat.numel(), dtype=flat.dtype)
    return read.view(value.shape)


def size_of(tensors: Iterable[Tensor]) -> int:
    """In bytes."""
    return sum(value.numel() * value.element_size() for value in tensors)


@dataclass(frozen=True)
class DenoiserPiece:
    """All weights of the denoiser, in the family's published format. reload: reads what it wrote, on the CPU in fp32, where that
    format holds them in another form; None: it does not."""

    denoiser: Denoiser
    reload: Callable[[Path], Denoiser] | None = None
    name: ClassVar[str] = "denoiser"
    files: ClassVar[tuple[str, ...]] = ()
    cheap: ClassVar[bool] = False

    @property
    def bytes(self) -> int:
        return size_of(self.live().values())

    def live(self) -> dict[str, Tensor]:
        """What it gathers, where it lies in training."""
        return self.denoiser.module.state_dict()

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        return State(on_cpu(self.live(), keep=keep, copy=copy))

    def write(self, folder: Path, state: State) -> None:
        self.denoiser.save(folder, state.tensors)

    def load(self, folder: Path) -> None:
        """Nothing: Family.load_denoiser read them as it built the denoiser, without those of the model folder before."""

    def reread(self, folder: Path) -> Mapping[str, Tensor]:
        """Raises ModelError."""
        return {} if self.reload is None else self.reload(folder).module.state_dict()

    def remarks(self, folder: Path) -> tuple[str, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class AdapterPiece:
    """The weights of an adapter, as the field's tools load them. settings: what its file says of it (`lora_settings`)."""

    denoiser: Denoiser
    settings: Mapping[str, object]
    name: ClassVar[str] = "adapter"
    files: ClassVar[tuple[str, ...]] = ()
    cheap: ClassVar[bool] = True

    @property
    def lora(self) -> SupportsLora:
        assert isinstance(self.denoiser, SupportsLora)  # add_lora has refused any other
        return self.denoiser

    @property
    def bytes(self) -> int:
        return size_of(self.live().values())

    def live(self) -> dict[str, Tensor]:
        """What it gathers, where it lies in training."""
        return lora_state(self.denoiser.module)

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        return State(on_cpu(self.live(), keep=keep, copy=copy))

    def write(self, folder: Path, state: State) -> None:
        self.lora.save_lora(folder, state.tensors, self.settings)

    def load(self, folder: Path) -> None:
        odd = load_lora_state(self.denoiser.module, self.lora.load_lora(folder))
        if odd:
            what = f"the adapter there does not fit this model: {', '.join(odd[:5])}."
            raise CheckpointError(Problem(str(folder), what))

    def reread(self, folder: Path) -> Mapping[str, Tensor]:
        """Raises ModelError."""
        return read_back(self.lora, folder, self.settings)

    def remarks(self, folder: Path) -> Iterator[str]:
        """Of what was written: an adapter that changes nothing."""
        if changes_nothing(self.lora.load_lora(folder)):
            yield "the adapter changes nothing: each of its lora_B is zero, so the model predicts as without it"


@dataclass(frozen=True)
class RegularizerPiece:
    """What a regularizer has learned. part: its name in the configuration."""

    part: str
    module: nn.Module

    @property
    def name(self) -> str:
        return f"regularizer {self.part}"

    @property
    def files(self) -> tuple[str, ...]:
        return (f"regularizers/{self.part}.safetensors",)

    @property
    def bytes(self) -> int:
        return size_of(self.module.state_dict().values())

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        return State(on_cpu(self.module.state_dict(), keep=keep, copy=copy))

    def write(self, folder: Path, state: State) -> None:
        file = folder / self.files[0]
        file.parent.mkdir(exist_ok=True)
        save_file(dict(state.tensors), file)

    def load(self, folder: Path) -> None:
        file = folder / self.files[0]
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise misread(file, f"cannot be read: {error}.") from error
        for name, _ in self.module.named_parameters():
            if name in found and not bool(found[name].isfinite().all()):
                raise misread(file, f"{name} has numbers that are not finite.")
        try:
            self.module.load_state_dict(found)
        except ValueError as error:  # of a state of its own, such as a running mean
            raise misread(file, f"{error}.") from error
        except RuntimeError as error:
            # torch tells each weight on a line of its own, after one that names the class.
            lines = [line.strip().rstrip(".") for line in str(error).splitlines()[1:]]
            what = f"what this regularizer has learned does not fit it as it is now: {'; '.join(lines)}."
            remedy = "Restore what it was made with, such as its encoder's files, or start again with another run.output_dir."
            raise CheckpointError(Problem(str(file), what, remedy)) from error


@dataclass(frozen=True)
class CountersPiece:
    """Where the run stands. It is read first of all, by `vtrain.train.resume`, since it says what else there is."""

    state: RunState
    name: ClassVar[str] = "counters"
    files: ClassVar[tuple[str, ...]] = (STATE,)
    bytes: ClassVar[int] = 0

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        return State(values=asdict(self.state)) if keep else State()

    def write(self, folder: Path, state: State) -> None:
        write_state(folder, RunState(**state.values))

    def load(self, folder: Path) -> None:
        """Nothing: the run began with it."""


@dataclass(frozen=True)
class ConfigPiece:
    """The text of the configuration file, for people: a resumed run goes by its own file."""

    text: str
    name: ClassVar[str] = "configuration"
    files: ClassVar[tuple[str, ...]] = (CONFIG,)
    bytes: ClassVar[int] = 0

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        return State(values={"text": self.text}) if keep else State()

    def write(self, folder: Path, state: State) -> None:
        (folder / CONFIG).write_text(state.values["text"], encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Nothing."""
