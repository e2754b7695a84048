"""What the files of a run say of each other: metrics.jsonl and events.jsonl against what its checkpoints say that they said, each
checkpoint against its manifest and the one after it, its settings against the configuration files. Nothing is trained here."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from vtrain.config import load
from vtrain.config.keys import key_path
from vtrain.contract import CheckpointError, Started, StepSkipped, VtrainError
from vtrain.estimate.render import counted
from vtrain.plan.places import CHECKPOINTS, CONFIG, EVENTS, METRICS, PLAN
from vtrain.plan.savings import SAVINGS
from vtrain.registry import discover
from vtrain.registry.guard import stdout_on_stderr
from vtrain.run.certificate import Finding
from vtrain.run.lines import RECORDS, UNREAD, Chain, Records, Written
from vtrain.train import checkpoint
from vtrain.train.changes import SampleMarks
from vtrain.train.resume import STATE, Relocation, RunState, read_state
from vtrain.train.settings import compare, declared, shown

STARTED, SKIPPED = Started.__name__.lower(), StepSkipped.__name__.lower()
"""Names of events."""


@dataclass(frozen=True)
class Kept:
    """A checkpoint that is there. fault: why it is not sound, "" if it is. manifest: SHA-256 of its manifest, "" without one.

    records, state: what its files say, None where they cannot be read, or where it has none. odd: why they cannot be.
    """

    step: int
    folder: Path
    fault: str
    manifest: str
    records: Records | None
    state: RunState | None
    odd: tuple[Finding, ...] = ()

    @classmethod
    def read(cls, step: int, folder: Path) -> Kept:
        """All its files are read, once."""
        fault, file = checkpoint.fault(folder) or "", folder / checkpoint.MANIFEST
        manifest, odd = "", list[Finding]()
        with suppress(OSError):  # then it is not sound, and that is said
            manifest = hashlib.sha256(file.read_bytes()).hexdigest()

        def said(read: Callable[[Path], Any]) -> Any:
            try:
                return read(folder)
            except CheckpointError as error:
                odd.extend(Finding(_below(folder, each.where), each.what.rstrip(".")) for each in error.problems)
                return None

        return cls(step, folder, fault, manifest, said(Records.read), said(read_state), tuple(odd))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def linked(self) -> bool:
        """Whether it says which one came before it, if any: those of before do not."""
        return self.records is not None and "before" in self.records.model_fields_set

    @cached_property
    def samples(self) -> SampleMarks | None:
        """None where it has none that can be read."""
        try:
            return SampleMarks.read(self.folder)
        except CheckpointError:
            return None


def _below(folder: Path, where: str) -> str:
    """A place in a checkpoint, short."""
    return f"{folder.name}/{Path(where).relative_to(folder)}" if Path(where).is_relative_to(folder) else where


class Lines:
    """metrics.jsonl or events.jsonl, read once from beginning to end.

    said: number of lines -> what the first of them say, for those numbers that were asked for. count: of whole lines. steps: of
    each line, 0 where it has none. events: the lines that were asked for.
    """

    def __init__(self, path: Path, counts: Collection[int] = (), wanted: Collection[str] = ()) -> None:
        self.path, self.name = path, path.name
        self.said: dict[int, Written] = {}
        self.steps, self._begins = array("q"), array("q")
        self.odd: list[int] = []
        self.events: list[Mapping[str, Any]] = []
        chain, at = Chain(), 0
        with path.open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break  # a line that a killed run did not end
                if chain.lines in counts:
                    self.said[chain.lines] = chain.written()
                self._add(raw, chain, wanted)
                self._begins.append(at)
                at += len(raw)
        self.count, self.now = chain.lines, chain.written()
        self.said[self.count] = self.now

    def _add(self, raw: bytes, chain: Chain, wanted: Collection[str]) -> None:
        try:
            line = json.loads(raw, object_pairs_hook=_once)
            chain.add(line)
        except UNREAD:
            self.odd.append(chain.lines + 1)
            line = {"not a line": raw.hex()}
            chain.add(line)
        step = line.get("step")
        self.steps.append(step if type(step) is int and 0 <= step < 2**62 else 0)
        if line.get("event") in wanted:
            self.events.append(line)

    @property
    def last(self) -> int:
        """The largest step; 0 where there is none."""
        return max(self.steps, default=0)

    @cached_property
    def _places(self) -> dict[int, int]:
        return dict(zip(self.steps, self._begins, strict=True))

    def row(self, step: int) -> Mapping[str, Any] | None:
        """The line of a step; None if there is none that can be read."""
        if step not in self._places:
            return None
        with self.path.open("rb") as file:
            file.seek(self._places[step])
            try:
                found: Mapping[str, Any] = json.loads(file.readline())
            except UNREAD:
                return None
            return found

    def findings(self, kept: Sequence[Kept], skipped: Collection[int] = ()) -> Iterator[Finding]:
        """Where they are not what a checkpoint says they were, and steps that do not follow each other. skipped: steps that were
        not taken, of which there is no line."""
        if self.odd:
            yield Finding(self.name, f"line {self.odd[0]} is no line of this file")
        if self.name == METRICS:
            yield from self._order(skipped)
        agreed = 0
        for each in kept:
            want = each.records.files.get(self.name) if each.records is not None else None
            if want is None:
                continue
            if self.said.get(want.lines) != want:
                yield Finding(self.name, self._differs(agreed, want, each))
                return  # those of later checkpoints follow from it
            agreed = want.lines

    def _order(self, skipped: Collection[int]) -> Iterator[Finding]:
        for number, (one, other) in enumerate(pairwise(self.steps), start=2):
            if other <= one or not all(step in skipped for step in range(one + 1, other)):
                yield Finding(self.name, f"line {number} is of step {other}, after step {one}")
                return

    def _differs(self, agreed: int, want: Written, kept: Kept) -> str:
        if self.count < want.lines:
            return f"it has {counted(self.count, 'line')}, and had {want.lines} at {kept.name}"
        steps = self.steps[agreed : want.lines]
        known = f" (steps {min(steps)} to {max(steps)})" if self.name == METRICS and len(steps) else ""
        return f"lines {agreed + 1} to {want.lines}{known} do not say what they said at {kept.name}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a key that stands there twice: readers differ in which they take."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def counts_of(kept: Sequence[Kept], name: str) -> set[int]:
    """After how many lines of a file checkpoints say something of it."""
    return {each.records.files[name].lines for each in kept if each.records is not None and name in each.records.files}


@dataclass(frozen=True)
class RunFiles:
    """What lies in a run's folder. kept: its checkpoints, oldest first, at least one. metrics, events: None where there is no such
    file. starts: events that say where and how it was started. whole: whether all checkpoints are looked at."""

    folder: Path
    kept: tuple[Kept, ...]
    metrics: Lines | None
    events: Lines | None
    whole: bool = True

    @property
    def starts(self) -> list[Mapping[str, Any]]:
        return [each for each in self._events if each["event"] == STARTED]

    @property
    def skipped(self) -> set[int]:
        """Steps that were not taken."""
        return {each["step"] for each in self._events if each["event"] == SKIPPED}

    @property
    def _events(self) -> Sequence[Mapping[str, Any]]:
        return self.events.events if self.events is not None else []

    @property
    def newest(self) -> Kept:
        return self.kept[-1]

    @classmethod
    def read(cls, folder: Path, last: int | None = None) -> Self:
        """last: step of the checkpoint up to which they are looked at; None: all."""
        saved = checkpoint.steps_saved(folder / CHECKPOINTS)
        kept = tuple(Kept.read(step, each) for step, each in saved if last is None or step <= last)
        metrics, events = (
            Lines(file, counts_of(kept, file.name), wanted=(STARTED, SKIPPED)) if file.is_file() else None
            for file in (folder / METRICS, folder / EVENTS)
        )
        return cls(folder, kept, metrics, events, last is None)

    @property
    def steps(self) -> int:
        """How many it trained, as far as it is looked at."""
        behind = self.metrics.last if self.metrics is not None and self.whole else 0
        return max(self.newest.step, behind) - self.origin[1]

    @property
    def origin(self) -> tuple[Path | None, int]:
        """Where its metrics begin: the checkpoint of another run that it went on from, or None; and that one's step."""
        first = self.metrics.steps[0] - 1 if self.metrics is not None and self.metrics.steps else 0
        started = (each for each in self.starts if each["checkpoint"] and each["step"] == first > 0)
        found = next(started, None)
        return (None, 0) if found is None else (Path(found["checkpoint"]), first)


def link_findings(kept: Sequence[Kept]) -> Iterator[Finding]:
    """Checkpoints that are not in the chain of those after them."""
    for before, each in pairwise(kept):
        if each.records is None or not each.linked:
            continue
        link, where = each.records.before, f"{each.name}/{RECORDS}"
        if link is None:
            yield Finding(where, f"it is the first checkpoint of its run by its own word, and there is {before.name}")
        elif link.step < before.step:
            yield Finding(
                where, f"it followed {checkpoint.checkpoint_name(link.step)}: {before.name} is not of this chain"
            )
        elif link.step == before.step and link.sha256 != before.manifest:
            what = f"it is not the one that {each.name} followed: its hash is another"
            yield Finding(f"{before.name}/{checkpoint.MANIFEST}", what)


def unlinked(kept: Sequence[Kept]) -> Iterator[str]:
    """What of the chain cannot be compared."""
    if older := [each.name for each in kept[1:] if each.records is not None and not each.linked]:
        yield f"the checkpoint before {', '.join(older[:3])}: an older vtrain did not name it"
    for before, each in pairwise(kept):
        link = each.records.before if each.records is not None else None
        if link is not None and link.step > before.step:
            yield f"{checkpoint.checkpoint_name(link.step)}, which {each.name} followed: it is not there any more"
    if without := [each.name for each in kept if each.records is None and not each.odd]:
        yield f"{METRICS} and {EVENTS} at {', '.join(without[:3])}: an older vtrain did not say what they said"


# -- configuration -------------------------------------------------------------------------------------------------------

_CHOSEN = {key for saving in SAVINGS for key in saving.keys}
"""Keys that [memory] may set where the file does not."""


def config_findings(kept: Kept, base: Path) -> Iterator[Finding]:
    """Where the configuration in a checkpoint is not the one that its state says it was trained with. base: where paths start.

    Raises VtrainError where it cannot be read.
    """
    if kept.state is None:
        return
    with stdout_on_stderr():
        config = load(kept.folder / CONFIG, discover(), base)
    moved = Relocation(kept.state.folder or str(base), str(base))
    for each in compare(kept.state.settings, declared(config)):
        path = key_path(each.key)
        chosen = config.memory is not None and path in _CHOSEN and path not in config.lines
        # What the file leaves open the plan has decided.
        if each.new is not None and not chosen and not (each.location and moved.alike(each)):
            what = f"{each.key} is {shown(each.new)}, and the run was trained with {shown(each.old)} (state.json)"
            yield Finding(f"{kept.name}/{CONFIG}", what)


def start_findings(kept: Kept, starts: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Where the settings in a checkpoint are not those that its run was started with. starts: those events."""
    for each in starts:
        if kept.state is not None and kept.records is not None and each["session"] == kept.records.session:
            yield from _unlike(
                f"{kept.name}/{STATE}", kept.state.settings, each["settings"], "the run was started with", EVENTS
            )


def run_findings(run: Path, newest: Kept, started: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Where config.toml and plan.json of a run are not what its last start and its newest checkpoint say. started: that event.

    Raises OSError, ValueError, KeyError, TypeError or AttributeError for a file that is not as vtrain writes it.
    """
    text, plan = (run / CONFIG).read_bytes(), json.loads((run / PLAN).read_text(encoding="utf-8"))
    if hashlib.sha256(text).hexdigest() != plan["fingerprints"]["config"]:
        yield Finding(CONFIG, f"it is not the file that the run was started with ({PLAN})")
    settings, steps = plan["settings"], plan["steps"]
    if started is not None:
        yield from _unlike(PLAN, settings, started["settings"], "the run was started with", EVENTS)
        if steps != started["steps"]:
            yield Finding(PLAN, f"steps is {steps}, and the run was started with {started['steps']} ({EVENTS})")
    state = newest.state
    # One that was resumed and has not saved since may have another configuration.
    if state is None or (started is not None and newest.records and newest.records.session != started["session"]):
        return
    where = f"{newest.name}/{STATE}"
    yield from _unlike(PLAN, settings, state.settings, "the run was trained with", where)
    if text != (newest.folder / CONFIG).read_bytes():
        yield Finding(CONFIG, f"it is not the one in {newest.name}")
    yield from _plan_marks(plan, state, where)


def _plan_marks(plan: Mapping[str, Any], state: RunState, where: str) -> Iterator[Finding]:
    """Fingerprints and versions of parts."""
    features = {f"features ({name})": mark for name, mark in state.features.items()}
    for name, mark in plan["fingerprints"].items():
        if {**state.encoders, **features}.get(name, mark) != mark:
            yield Finding(PLAN, f"the fingerprint of {name} is not the one of {where}")
    parts = {f"{each['kind']} {each['name']}": f"{each['distribution']} {each['version']}" for each in plan["parts"]}
    for name, version in parts.items():
        if state.versions.get(name, version) != version:
            yield Finding(
                PLAN, f"{name} is of {version}, and the run was trained with {state.versions[name]} ({where})"
            )


def _unlike(
    name: str, found: Mapping[str, Any], wanted: Mapping[str, Any], words: str, where: str
) -> Iterator[Finding]:
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            what = f"{key} is {shown(found.get(key))}, and {words} {shown(wanted.get(key))} ({where})"
            yield Finding(name, what)


def reported(error: VtrainError) -> str:
    """An error in one line."""
    return "; ".join(f"{each.where}: {each.what}" if each.where else each.what for each in error.problems).rstrip(".")
