"""What became of a run's samples between a checkpoint and its resume.

They are in each checkpoint, as their names and checksums: about 13 bytes for each where names are alike. What encodes them is no
part of it: another encoder is another matter (`vtrain.train.resume`).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from vtrain.contract import Noted
from vtrain.data.index import CONTENTS, Index
from vtrain.estimate.render import counted
from vtrain.train.checkpoint import misread
from vtrain.train.piece import Copies, Keep, State

FILE = "samples.npz"
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


@dataclass(frozen=True, eq=False)
class SampleMarks:
    """Of each, in their order. names: ids, UTF-8. contents: as those of an Index."""

    names: list[bytes]
    contents: np.ndarray[Any, np.dtype[np.uint32]]

    @classmethod
    def of(cls, index: Index) -> SampleMarks:
        return cls([index.names[number] for number in range(len(index))], index.contents)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Those of a checkpoint; None in one of before they were kept. Raises CheckpointError if they cannot be read."""
        file = folder / FILE
        if not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as stored:
                text, lengths, contents = stored["names"], stored["lengths"], stored["contents"]
            types = (text.dtype, lengths.dtype, contents.dtype)
            if types != (np.uint8, np.uint32, np.uint32) or contents.shape != (len(lengths), len(CONTENTS)):
                raise ValueError("its arrays are of other types or shapes")
            ends = np.cumsum(lengths, dtype=np.int64)
            if text.ndim != 1 or lengths.ndim != 1 or len(text) != (int(ends[-1]) if len(ends) else 0):
                raise ValueError("its names do not end where they should")
        except _UNREADABLE as error:
            raise misread(file, f"cannot be read: {error}.") from error
        data = text.tobytes()
        starts = (ends - lengths).tolist()
        return cls([data[start:end] for start, end in zip(starts, ends.tolist(), strict=True)], contents)


@dataclass(frozen=True)
class SamplesPiece:
    """The names of a run's samples and the checksums of what they are made of, in a checkpoint. They never change in a run."""

    index: Index
    name: ClassVar[str] = "samples"
    files: ClassVar[tuple[str, ...]] = (FILE,)
    bytes: ClassVar[int] = 0

    @cached_property
    def packed(self) -> State:
        """The file, made once for all checkpoints."""
        file, names = BytesIO(), self.index.names
        lengths = np.diff(names.ends, prepend=0).astype(np.uint32)
        text = np.frombuffer(names.data, np.uint8)
        np.savez_compressed(file, names=text, lengths=lengths, contents=self.index.contents)
        return State(values={"file": file.getvalue()})

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        return self.packed if keep else State()

    def write(self, folder: Path, state: State) -> None:
        (folder / FILE).write_bytes(state.values["file"])

    def load(self, folder: Path) -> None:
        """Nothing: `data_changes` reads it."""


def data_changes(before: str, now: str, old: SampleMarks | None, new: SampleMarks) -> Iterator[Noted]:
    """What the samples are not any more. before, now: their marks (`Index.mark`), on which the order depends."""
    if old is None:
        if before != now:
            yield Noted(
                f"the data changed since the checkpoint: {before} -> {now}; the order is the new data's from here"
            )
        return
    parts = [f"{counted(len(found), 'sample')} {what} ({named(found)})" for what, found in different(old, new) if found]
    if parts:
        order = "in the same order" if before == now else "in the new data's order"
        changed = "; ".join(parts)
        yield Noted(f"the data changed since the checkpoint: {changed}. Training continues with it as it is, {order}")


def named(found: list[bytes]) -> str:
    return ("first: " if len(found) > 1 else "") + found[0].decode(errors="replace")


def different(old: SampleMarks, new: SampleMarks) -> Iterator[tuple[str, list[bytes]]]:
    """What became of samples, and the names of these."""
    if old.names == new.names:
        before = np.arange(len(new.names))
    else:
        place = {name: number for number, name in enumerate(old.names)}
        before = np.array([place.get(name, -1) for name in new.names], dtype=np.int64)
        there = set(new.names)
        yield "added", [name for name, at in zip(new.names, before.tolist(), strict=True) if at < 0]
        yield "removed", [name for name in old.names if name not in there]
    kept = np.flatnonzero(before >= 0)
    other = new.contents[kept] != old.contents[before[kept]]
    other[:, CONTENTS.index("mask")] &= ~other[:, CONTENTS.index("cut")]  # a mask is cut as its clip is
    ranks = np.argsort(before[kept], kind="stable")
    words = ("with other bytes", "cut or scaled otherwise", "with other captions", "with another mask")
    for what, changed in (
        *zip(words, other.T, strict=True),
        ("at another place in the order", ranks != np.arange(len(kept))),
    ):
        yield what, [new.names[number] for number in kept[changed]]
