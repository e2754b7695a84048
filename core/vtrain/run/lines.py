"""The files of lines that a run writes: appended to, cut back to a checkpoint, and compared with what they were there.

A checkpoint says how many lines they had and a hash of what these said. The hash of metrics.jsonl leaves out what is measured,
so that it is the same for every run that is the same, resumed or not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field

from vtrain.contract.events import MEASURED
from vtrain.estimate.render import counted
from vtrain.train.checkpoint import MANIFEST, read_model
from vtrain.train.piece import Copies, Keep, State
from vtrain.train.resume import MOST


class Written(BaseModel):
    """What a checkpoint says of a file of lines: how many it had, and the SHA-256 of what they said."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    lines: int = Field(ge=0, le=MOST)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Chain:
    """The lines of a file, one after the other: how many, and a hash of all."""

    def __init__(self) -> None:
        self.lines, self._digest = 0, hashlib.sha256()

    def add(self, line: Mapping[str, Any]) -> None:
        """A line, without what is measured: a run that is resumed says the same as one that never stopped."""
        said = {key: value for key, value in line.items() if key not in MEASURED}
        self._digest.update(json.dumps(said, sort_keys=True).encode() + b"\n")
        self.lines += 1

    def written(self) -> Written:
        return Written(lines=self.lines, sha256=self._digest.hexdigest())


def append(path: Path, records: Iterable[Mapping[str, Any]], *, durable: bool) -> None:
    """Add a line for each record. durable: synced to the disk. Raises OSError, the file then being as it was."""
    data = memoryview("".join(json.dumps(record) + "\n" for record in records).encode())
    # Without a buffer: what it still held would be written when the file is closed, after the truncation.
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            # What was written of a line would run into the next one.
            os.truncate(path, before)
            raise


UNREAD = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a line raises that is no line of ours."""


@dataclass(frozen=True)
class CutBack:
    """What became of a file's lines. dropped: whole ones that were not to be kept. odd: whole ones that are none of the run's,
    or come twice or too late. aside: the file with them, None where there were none. lacks: lines that a checkpoint knows of and
    that are gone; edited: whether others say something else than they did."""

    dropped: int = 0
    odd: int = 0
    aside: Path | None = None
    lacks: int = 0
    edited: bool = False

    def faults(self, name: str, *, told: bool = False) -> Iterator[str]:
        """What is wrong with the file. told: that lines are gone has been said."""
        if self.odd:
            yield f"{name}: {counted(self.odd, 'line')} not of this run or out of order, removed; as it was: {self.aside}"
        if self.lacks and not told:
            yield f"{name} lacks {counted(self.lacks, 'line')} that it had at the checkpoint"
        if self.edited:
            yield f"{name} does not say what it said at the checkpoint: it was edited, or is of another run"


def cut_back(
    path: Path, kept: Callable[[Mapping[str, Any]], bool], chain: Chain | None = None, before: Written | None = None
) -> CutBack:
    """Drop the lines that are not to be kept, and a torn last one. Raises OSError.

    kept: raises one of UNREAD for a line that cannot stand there. chain: all that stay are added to it. before: what the file
    said at the checkpoint, of its first lines.
    """
    chain = chain or Chain()
    if not path.exists():
        return CutBack(lacks=before.lines if before is not None else 0)
    dropped, odd, edited = 0, 0, False
    aside = path.with_suffix(".jsonl.partial")
    with path.open("rb") as lines, aside.open("wb") as file:
        for raw in lines:
            try:
                line = json.loads(raw)
                keep = kept(line)
            except UNREAD:
                odd += raw.endswith(b"\n")  # else a line that a killed run did not end
                continue
            if not keep:
                dropped += 1
                continue
            file.write(raw.rstrip(b"\r\n") + b"\n")
            chain.add(line)
            edited |= before is not None and before.lines == chain.lines and before != chain.written()
        file.flush()
        os.fsync(file.fileno())
    kept_as = _spare(path) if odd else None
    if kept_as is not None:
        shutil.copyfile(path, kept_as)
    # Aside, then renamed: a crash leaves the old file or the new one.
    aside.replace(path)
    return CutBack(dropped, odd, kept_as, max(0, before.lines - chain.lines) if before is not None else 0, edited)


def _spare(path: Path) -> Path:
    """A free name for a file that was not as it should be."""
    return next(new for n in count(1) if not (new := path.with_name(f"{path.name}.as-found-{n}")).exists())


def whole(value: object, least: int = 0) -> int:
    """A number of steps or sessions. Raises ValueError for what is none."""
    if type(value) is not int or not least <= value <= MOST:
        raise ValueError(f"{value!r} is no number from {least} on")
    return value


def gaps(steps: Sequence[int], last: int) -> str:
    """Which of the steps from 1 to `last` are not among `steps`, which ascend from 0: "steps 3 to 5 and 9"."""
    ends = [*steps, last + 1]
    lost = [(one + 1, other - 1) for one, other in pairwise(ends) if other - one > 1]
    named = [str(first) if first == final else f"{first} to {final}" for first, final in lost[:SHOWN]]
    named += [f"{len(lost) - SHOWN} more stretches"] if len(lost) > SHOWN else []
    words = " and ".join([", ".join(named[:-1]), named[-1]] if named[1:] else named)
    return f"step{'' if sum(final - first + 1 for first, final in lost) == 1 else 's'} {words}" if lost else ""


SHOWN = 5
"""Stretches of missing steps that are named."""


# -- in a checkpoint -----------------------------------------------------------------------------------------------------

RECORDS = "records.json"


class Link(BaseModel):
    """A checkpoint as the next one of its run names it: its step, and the SHA-256 of its manifest."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    step: int = Field(ge=0, le=MOST)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def to(cls, step: int, folder: Path) -> Self:
        """Raises OSError."""
        return cls(step=step, sha256=hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest())


class Records(BaseModel):
    """What a checkpoint says of the records beside it. session: the one that wrote it. files: name -> what it said by then.

    before: the checkpoint that the run saved before, or went on from; None for the first, and in one of before it was kept.
    unwritten: steps whose numbers could not be written to metrics.jsonl by then, as on a full disk.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    session: int = Field(ge=0, le=MOST)
    files: dict[str, Written]
    before: Link | None = None
    unwritten: int = Field(0, ge=0, le=MOST)

    @classmethod
    def read(cls, folder: Path | None) -> Self | None:
        """Of a checkpoint; None for none, and in one of before. Raises CheckpointError if it cannot be read."""
        if folder is None or not (folder / RECORDS).exists():
            return None
        return read_model(folder / RECORDS, cls)


@dataclass(frozen=True)
class RecordsPiece:
    """How far the records beside a checkpoint had come, and what they said."""

    said: Callable[[], Records]
    name: ClassVar[str] = "records"
    files: ClassVar[tuple[str, ...]] = (RECORDS,)
    bytes: ClassVar[int] = 0

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        return State(values=self.said().model_dump()) if keep else State()

    def write(self, folder: Path, state: State) -> None:
        (folder / RECORDS).write_text(json.dumps(state.values, indent=1), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Nothing: the run begins with `Records.read`."""
