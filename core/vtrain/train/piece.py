"""What a checkpoint is made of: pieces, each gathered from processes and devices, written, and loaded.

The pieces themselves: `vtrain.train.pieces`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class State:
    """What a piece has gathered. tensors: name -> tensor on the CPU. values: what JSON can hold."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


Keep = bool | Path
"""Whether a process wants what is gathered; a folder: it does, and what several processes put together goes into files there, a
tensor at a time, so that it is never in main memory as a whole."""


class Copies:
    """Main memory that copies of a piece's tensors lie in. It stays from one checkpoint to the next: to write to memory that the
    system has just given takes three times as long."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, name: str, value: Tensor) -> Tensor:
        """A contiguous copy on the CPU, there until the next one of this name."""
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
            kept = self._kept[name] = value.new_empty(value.shape, device="cpu")
        return kept.copy_(value)

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self._kept.values())


class Piece(Protocol):
    """One part of what a checkpoint keeps, such as the denoiser's weights or the optimizer's state."""

    @property
    def name(self) -> str:
        """What the manifest and messages call it; no two pieces of a checkpoint alike."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """Paths in the checkpoint, with /, that it always has; it may have more. (): whoever writes it chooses, at least one."""
        ...

    @property
    def bytes(self) -> int:
        """Of the tensors that would be gathered now. Headers of files and numbers add a few KiB."""
        ...

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        """The whole state. Every process calls it, for all pieces in order, since parts of it may lie with each.

        keep: whether it is this process that writes; what the others get is empty. copy: where what it gives is to lie, so that it
        stays as it is while training continues; None: wherever it does. Raises OSError where `keep` is a folder, after all have
        done their part.
        """
        ...

    def write(self, folder: Path, state: State) -> None:
        """Write what was gathered below `folder`. It looks at nothing live, and one process alone calls it. Raises OSError."""
        ...

    def load(self, folder: Path) -> None:
        """Put what `write` wrote into the live objects, bit for bit. Raises CheckpointError if it does not fit them."""
        ...
