"""What was trained again, compared with what a run says: rows of metrics number by number, checkpoints tensor by tensor."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vtrain.contract import CheckpointError
from vtrain.contract.events import MEASURED
from vtrain.plan.places import CONFIG, METRICS
from vtrain.run.lines import RECORDS
from vtrain.run.listeners import FILE as TRACKERS
from vtrain.train import changes
from vtrain.train.changes import SampleMarks
from vtrain.train.checkpoint import MANIFEST, read_json
from vtrain.train.optimizer_piece import MARK, SCALARS, TENSORS
from vtrain.train.resume import STATE
from vtrain.train.spikes import FILE as READINGS

TOLERANCE = 1e-2
"""Largest difference of a number, by its size, that another machine, another version of torch or a card without run.deterministic
may make. Other instructions of one processor made 5e-6 in ten steps of a tiny SANA-Video in fp32; in bf16 9e-5 in ten and 3e-3 in
sixty at a high rate. Known mistakes change a loss by 2e-2 or more (tests/golden)."""

MOVED = 0.5
"""The same of all tensors of a file, by how far these steps moved them (in the norm). The same runs made 3e-6 in fp32, 2e-3 in bf16
and 0.09 in sixty steps of bf16 at a high rate. Weights that these steps did not train differ by 1."""

FOLLOWS = {TENSORS, SCALARS, READINGS}
"""Files whose numbers have no such limit: one gradient more or less decides over an optimizer's moments (a factor of 300 in sixty
steps of bf16, where losses differed by 3e-3). That they have the same tensors is compared, and what they lead to."""

NEVER = {CONFIG, RECORDS, TRACKERS, MANIFEST}
"""Files of a checkpoint that are not compared with those of another run: they are compared with the run's own."""

MEANT = ("step", "micro_batch", "data", "base", "features", "encoders", "adapter")
"""Of state.json: what another run of the same says the same of."""


@dataclass(frozen=True)
class Difference:
    """where: a file; what: which of it differs, and how. size: of the difference, by the measure of `allowed`; inf for what is no
    number. allowed: the largest where bits may differ."""

    where: str
    what: str
    size: float = math.inf
    allowed: float = TOLERANCE


@dataclass
class Compared:
    """How much was compared, and what differs."""

    rows: int = 0
    tensors: int = 0
    files: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def size(self) -> float:
        return max((each.size for each in self.differences), default=0.0)


class Rows:
    """Rows of metrics as they come from training, against those of the file: the first that differs is named."""

    def __init__(self, row: Callable[[int], Mapping[str, Any] | None], out: Compared) -> None:
        """row: of a step, as the file has it."""
        self._row, self._out = row, out
        self._first: Difference | None = None
        self._steps, self._seen = 0, set[int]()

    def take(self, row: Mapping[str, Any]) -> None:
        """The next step's."""
        now = json.loads(json.dumps(row))
        before = self._row(now["step"])
        self._out.rows += 1
        self._seen.add(now["step"])
        if before is None:
            self._note(f"it has no step {now['step']}, and there is one when it is trained again", math.inf)
            return
        for key in sorted({*now, *before} - {*MEASURED}):
            if (size := _gap(before.get(key), now.get(key))) > 0:
                then, again = _short(before.get(key)), _short(now.get(key))
                self._note(f"step {now['step']}: {key} is {then}, and {again} when it is trained again", size)
                break

    def _note(self, what: str, size: float) -> None:
        self._steps += 1
        if self._first is None:
            self._first = Difference(METRICS, what, size)
        elif size > self._first.size:
            self._first = Difference(METRICS, self._first.what, size)

    def end(self, first: int, last: int) -> None:
        """No more come of the steps after `first`, to `last`."""
        for step in range(first + 1, last + 1):
            if step not in self._seen and self._row(step) is not None:
                self._note(f"step {step} is none when it is trained again", math.inf)
        if self._first is not None:
            more = f"; {self._steps} of {self._out.rows} steps differ" if self._out.rows > 1 else ""
            self._out.differences.append(Difference(METRICS, self._first.what + more, self._first.size))


def _gap(one: object, other: object) -> float:
    """How far two values of JSON are from each other: of numbers by the size of the larger; inf of what is no number, or unlike."""
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return 0.0 if one is other or one == other else math.inf
    if isinstance(one, int | float) and isinstance(other, int | float):
        if one == other or (one != one and other != other):
            return 0.0
        found = abs(one - other) / max(abs(one), abs(other))
        return found if math.isfinite(found) else math.inf
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        if one and all(map(_is_number, [*one, *other])):  # of numbers by the largest: some may be near 0
            found = max(abs(a - b) for a, b in zip(one, other, strict=True)) / (max(map(abs, [*one, *other])) or 1.0)
            return found if math.isfinite(found) else max(map(_gap, one, other))
        return max(map(_gap, one, other), default=0.0)
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return max((_gap(one[key], other[key]) for key in one), default=0.0)
    return 0.0 if one == other else math.inf


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def compare_checkpoints(old: Path, new: Path, start: Path | None, sound: bool, out: Compared) -> None:
    """Every file of two checkpoints. old: the run's, new: trained again. start: the one that it began from, None for step 0. sound:
    whether the old one's manifest says what its files are."""
    then, now = _files(old), _files(new)
    for name in sorted(then.keys() ^ now.keys()):
        missing = "it is not there, and comes when it is trained again" if name in now else "nothing writes it"
        out.differences.append(Difference(f"{old.name}/{name}", missing))
    for name in sorted(then.keys() & now.keys()):
        out.files += 1
        if sound and then[name] == now[name]:  # both were hashed as they lie there
            out.tensors += _count(new / name)
            continue
        try:
            found = _file_differences(old, new, start, name, out)
            largest = sys.float_info.max  # what is no number is more
            out.differences += [replace(each, allowed=largest) if name in FOLLOWS else each for each in found]
        except (OSError, ValueError, CheckpointError, SafetensorError) as error:
            out.differences.append(Difference(f"{old.name}/{name}", f"it cannot be read: {error}"))


def _files(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 as the manifest has it."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: str(entry["sha256"]) for name, entry in entries.items() if name not in NEVER}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return {name: "" for name in found if name not in NEVER}


def _count(file: Path) -> int:
    if file.suffix != ".safetensors":
        return 0
    with safe_open(file, "pt") as tensors:
        return len(tensors.keys())


def _file_differences(old: Path, new: Path, start: Path | None, name: str, out: Compared) -> Iterator[Difference]:
    where = f"{old.name}/{name}"
    if name.endswith(".safetensors"):
        before = start / name if start is not None and (start / name).is_file() else None
        yield from _tensor_differences(where, old / name, new / name, before, out)
    elif name == changes.FILE:
        one, other = SampleMarks.read(old), SampleMarks.read(new)
        assert one is not None
        assert other is not None
        for what, found in changes.different(one, other):
            if found:
                yield Difference(
                    where, f"{len(found)} of its samples {what} in what is trained on now ({changes.named(found)})"
                )
    elif name.endswith(".json"):
        then, now = read_json(old / name), read_json(new / name)
        if name == STATE:
            then, now = ({key: each.get(key) for key in MEANT} for each in (then, now))
        yield from _json_differences(where, then, now)
    elif (old / name).read_bytes() != (new / name).read_bytes():
        yield Difference(where, "its bytes are others than when it is trained again")


def _json_differences(where: str, then: object, now: object, at: str = "") -> Iterator[Difference]:
    """The first value that differs, with the size of the largest difference."""
    if (size := _gap(then, now)) == 0:
        return
    while True:
        keys: Any = ()
        if isinstance(then, dict) and isinstance(now, dict) and then.keys() == now.keys():
            keys = then.keys()
        elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
            keys = range(len(then))
        inner: Any = next((key for key in keys if _gap(then[key], now[key]) > 0), None)  # type: ignore[index]
        if inner is None:
            break
        then, now, at = then[inner], now[inner], f"{at}{'.' * bool(at)}{inner}"  # type: ignore[index]
    yield Difference(where, f"{at} is {_short(then)}, and {_short(now)} when it is trained again", size)


def _tensor_differences(where: str, old: Path, new: Path, start: Path | None, out: Compared) -> Iterator[Difference]:
    """One for the file: how many tensors differ, and the one that does most."""
    gaps = _Gaps()
    with safe_open(old, "pt") as then, safe_open(new, "pt") as now:
        names = sorted({*then.keys(), *now.keys()})
        for name in names:
            out.tensors += 1
            if name not in then.keys() or name not in now.keys():  # noqa: SIM118 (they are no dictionaries)
                gaps.note(f"{name} is {'not there' if name in now.keys() else 'one too many'}", math.inf)  # noqa: SIM118
                continue
            gaps.add(name, then.get_tensor(name), now.get_tensor(name), _tensor(start, name))
    if gaps.count:
        several = f"{gaps.count} of {len(names)} tensors differ, most of all " if gaps.count > 1 else ""
        yield Difference(where, several + gaps.most, gaps.size, MOVED)


class _Gaps:
    """Differences of the tensors of a file. count: how many differ; most: the one that does most, in words."""

    def __init__(self) -> None:
        self.count, self.most, self._worst, self._odd = 0, "", -1.0, False
        self._sums: dict[str, list[float]] = {}

    @property
    def size(self) -> float:
        """Of all tensors together, of each kind of an optimizer's: the norm of what differs by that of what changed."""
        if self._odd:
            return math.inf
        sizes = [math.sqrt(gap / moved) if moved > 0 else math.inf for gap, moved in self._sums.values() if gap > 0]
        return max(sizes, default=math.inf)

    def note(self, what: str, size: float) -> None:
        self.count += 1
        self._odd |= not math.isfinite(size)
        if size > self._worst or not self.most:
            self.most, self._worst = what, size

    def add(self, name: str, one: Tensor, other: Tensor, start: Tensor | None) -> None:
        """one: the run's; other: trained again; start: where both began, None where that is not known."""
        if one.dtype != other.dtype or one.shape != other.shape:
            shapes = [f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in (one, other)]
            self.note(f"{name} is {shapes[0]}, and {shapes[1]} when it is trained again", math.inf)
            return
        then, now = one.double(), other.double()
        known = start is not None and start.shape == one.shape
        moved = float((then - start.double() if known and start is not None else then).norm()) ** 2
        sums = self._sums.setdefault(name.rpartition(MARK)[2] if MARK in name else "", [0.0, 0.0])
        sums[1] += moved
        if _same(one, other):
            return
        gap = (then - now).abs()
        sums[0] += float(gap.norm()) ** 2
        size = float(gap.norm()) / math.sqrt(moved) if moved > 0 else 0.0
        by = "what these steps changed" if known else "its size"
        text = f"{name}: by {float(gap.max()):.2g} at most from what is trained again, {size:.1g} of {by}"
        self.note(text, size)
        self._odd |= not math.isfinite(sums[0])


def _tensor(file: Path | None, name: str) -> Tensor | None:
    if file is None:
        return None
    with safe_open(file, "pt") as tensors:
        found: Tensor | None = tensors.get_tensor(name) if name in tensors.keys() else None  # noqa: SIM118
        return found


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit: 0 is not -0, and a NaN is itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))
