"""`vtrain verify`: whether a run is what it says. Its files against each other, the data and the model against what they were, and
some of its steps trained again. A certificate says what was compared, and what was not."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from vtrain import __version__
from vtrain.config import load
from vtrain.contract import CheckpointError, ConfigError, Problem, TrainingError, VtrainError
from vtrain.data.scanning.database import file_sha256
from vtrain.estimate.render import counted
from vtrain.plan.places import CHECKPOINT, CHECKPOINTS, CONFIG, EVENTS, METRICS, PLAN
from vtrain.registry import discover
from vtrain.run.chain import (
    Finding,
    Kept,
    Lines,
    config_findings,
    counts_of,
    link_findings,
    reported,
    run_findings,
    unlinked,
)
from vtrain.run.output import hold
from vtrain.train import checkpoint
from vtrain.train.resume import RunState, versions

Verdict = Literal["sound", "sound as far as compared", "not sound"]

CERTIFICATE = "certificate.json"
FORMAT = 1

NEVER = (
    "seconds, data_wait and memory in metrics.jsonl: they are measured",
    "videos in samples/, tensorboard/, exports/ and what trackers keep",
    "estimates in plan.json, and events behind the last checkpoint: nothing says what they were",
)
"""What no verifying looks at."""


@dataclass(frozen=True)
class Retrained:
    """Steps that were trained again: those after `first`, to `last`. bits: whether all is the same bit for bit. difference: the
    largest, by the measure of `compare.TOLERANCE`; 0 where bits are the same, None where something is no number."""

    first: int
    last: int
    rows: int
    tensors: int
    files: int
    bits: bool
    difference: float | None


@dataclass(frozen=True)
class Certificate:
    """What a verification found. run: the output folder. verdict: "sound as far as compared" where something could not be compared
    (not_compared says what and why), "not sound" with each of findings. compared: how much, by name. retrained: steps that were
    trained again. not_asked: what all = True looks at beside. versions, hashes: of what was compared, and of what compared it. file:
    where it was written, None where it could not be."""

    run: Path
    verdict: Verdict
    findings: tuple[Finding, ...]
    not_compared: tuple[str, ...]
    not_asked: tuple[str, ...]
    compared: Mapping[str, int]
    retrained: tuple[Retrained, ...]
    versions: Mapping[str, str]
    hashes: Mapping[str, Any]
    file: Path | None

    def as_json(self) -> dict[str, Any]:
        """As certificate.json has it."""
        found = {name: str(each) if isinstance(each, Path) else each for name, each in asdict(self).items()}
        del found["file"]
        return {"format": FORMAT, "time": round(time.time(), 3), **found, "never_compared": list(NEVER)}


@dataclass
class _Report:
    """What is found, in the order in which it is. say: called with each line for people."""

    say: Callable[[str], None]
    findings: list[Finding] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    not_asked: list[str] = field(default_factory=list)
    compared: dict[str, int] = field(default_factory=dict)
    retrained: list[Retrained] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, Any] = field(default_factory=dict)

    def found(self, findings: Iterator[Finding] | list[Finding]) -> int:
        """Take and say each; gives how many."""
        count = 0
        for each in findings:
            if each not in self.findings:
                self.findings.append(each)
                self.say(f"FOUND: {each}")
            count += 1
        return count

    def skip(self, text: str) -> None:
        self.not_compared.append(text)
        self.say(f"not compared: {text}")

    @property
    def verdict(self) -> Verdict:
        if self.findings:
            return "not sound"
        return "sound as far as compared" if self.not_compared else "sound"


@dataclass(frozen=True)
class _Run:
    """What lies in a run's folder. kept: its checkpoints, oldest first, at least one. metrics, events: None where there is no such
    file. starts: events that say where and how it was started."""

    folder: Path
    kept: tuple[Kept, ...]
    metrics: Lines | None
    events: Lines | None

    @property
    def starts(self) -> list[Mapping[str, Any]]:
        return self.events.events if self.events is not None else []

    @property
    def newest(self) -> Kept:
        return self.kept[-1]


def verify(path: Path, *, everything: bool = False, say: Callable[[str], None] = lambda text: None) -> Certificate:
    """Verify a run, by its output folder or one of its checkpoints, and write its certificate.

    everything: train all of it again, not only from its last checkpoint but one to the last. say: called with each line for people.
    Raises CheckpointError where there is no run, or one is going on there; ConfigError under torchrun.
    """
    folder, last = _place(path.absolute())
    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        raise ConfigError(Problem("", "vtrain verify is one process.", "Start it without torchrun."))
    with _alone(folder) as writable:
        report = _Report(say)
        run = _read(folder, last)
        _check_records(run, report)
        _check_checkpoints(run, report)
        _check_configuration(run, report)
        _check_training(run, report, everything=everything)
        report.hashes = _hashes(run)
        report.say(f"verdict: {report.verdict}")
        return _written(folder, report, writable=writable)


def _place(path: Path) -> tuple[Path, int | None]:
    """The run's output folder, and the step of the checkpoint that is named. Raises CheckpointError."""
    named = CHECKPOINT.fullmatch(path.name)
    if named is not None and path.parent.name == CHECKPOINTS and path.is_dir():
        return path.parent.parent, int(named[1])
    folder = path.parent if path.name == CHECKPOINTS else path
    if checkpoint.steps_saved(folder / CHECKPOINTS):
        return folder, None
    if (folder / PLAN).is_file():
        what = "this run has saved no checkpoint, so that nothing says what it was."
        raise CheckpointError(Problem(str(folder), what, "Its first one comes at checkpoint.every, and where it ends."))
    what = (
        "this is neither a run's output folder nor one of its checkpoints."
        if path.exists()
        else "there is no such folder."
    )
    raise CheckpointError(Problem(str(path), what, "Name the run.output_dir of a run, or a checkpoint in it."))


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """No run goes on in the folder meanwhile; whether it can be written. Raises CheckpointError if one does."""
    with ExitStack() as held:
        writable = True
        try:
            held.enter_context(hold(folder))
        except CheckpointError as error:
            if not isinstance(error.__cause__, OSError):
                what = error.problems[0].what.replace("another run has", "a run, or another vtrain verify, has")
                raise CheckpointError(Problem(str(folder), what, "Verify it when that has ended.")) from error
            writable = False
        yield writable


def _read(folder: Path, last: int | None) -> _Run:
    saved = checkpoint.steps_saved(folder / CHECKPOINTS)
    kept = tuple(Kept.read(step, each) for step, each in saved if last is None or step <= last)
    found = [
        Lines(file, counts_of(kept, file.name), wanted=("started",)) if file.is_file() else None
        for file in (folder / METRICS, folder / EVENTS)
    ]
    return _Run(folder, kept, *found)


# -- what it says of itself ----------------------------------------------------------------------------------------------


def _check_records(run: _Run, report: _Report) -> None:
    wrong, lines = 0, []
    for name, found in ((METRICS, run.metrics), (EVENTS, run.events)):
        if found is None:
            wrong += report.found([Finding(name, "it is not there")])
            continue
        wrong += report.found(found.findings(run.kept))
        report.compared[f"{name} lines"] = max(counts_of(run.kept, name), default=0)
        lines.append(f"{name} ({counted(found.count, 'line')})")
    wrong += report.found(link_findings(run.kept))
    report.compared["links"] = sum(each.linked for each in run.kept[1:])
    for text in unlinked(run.kept):
        report.skip(text)
    if not wrong:
        verb = "say" if len(lines) > 1 else "says"
        said = f"{' and '.join(lines)} {verb} what {counted(len(run.kept), 'checkpoint')} say{'s' * (len(run.kept) == 1)} they said"
        chain = ", and each names the one before it" if report.compared["links"] else ""
        report.say(f"chain: {said}{chain}")


def _check_checkpoints(run: _Run, report: _Report) -> None:
    wrong = 0
    for each in run.kept:
        if each.fault:
            wrong += report.found([Finding(each.name, f"it is not sound: {each.fault}")])
        wrong += report.found(list(each.odd))
    report.compared["checkpoints"] = len(run.kept)
    if not wrong:
        report.say(f"checkpoints: {len(run.kept)} sound, each file as its manifest says")


def _check_configuration(run: _Run, report: _Report) -> None:
    from vtrain.run.retrain import bases

    before = len(report.findings) + len(report.not_compared)
    for each in run.kept:
        if each.state is None:
            continue
        try:
            base = next(iter(bases(run.folder, each.state)), run.folder.parent)
            report.found(config_findings(each, base))
            report.compared["settings"] = report.compared.get("settings", 0) + len(each.state.settings)
        except VtrainError as error:
            report.found([Finding(f"{each.name}/{CONFIG}", f"it cannot be read: {reported(error)}")])
    try:
        report.found(run_findings(run.folder, run.newest, run.starts[-1] if run.starts else None))
    except FileNotFoundError as error:
        report.skip(f"{Path(str(error.filename)).name}: it is not there")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        report.found([Finding(f"{CONFIG} or {PLAN}", f"it is not as vtrain writes it: {error!r}")])
    if before == len(report.findings) + len(report.not_compared):
        report.say(
            f"configuration: {CONFIG} and {PLAN} say what the checkpoints do ({report.compared.get('settings', 0)} settings)"
        )


# -- trained again -------------------------------------------------------------------------------------------------------


def _check_training(run: _Run, report: _Report, *, everything: bool) -> None:
    from vtrain.run.retrain import bases

    state = run.newest.state
    legs = list(_legs(run, report, everything=everything))
    if state is None:
        report.skip(f"data, model and training: nothing says what they were at {run.newest.name}")
        return
    with tempfile.TemporaryDirectory(prefix="vtrain-verify-") as place:
        reasons: list[str] = []
        for number, base in enumerate(bases(run.folder, state) or [run.folder.parent]):
            folder = Path(place, str(number)).resolve()
            folder.mkdir()
            try:
                _Training(run, report, folder, base, state).check(legs)
                return
            except _CannotError as error:
                reasons.append(str(error))
        report.skip(f"data, model and training: {reasons[0]}")


class _CannotError(Exception):
    """Nothing can be planned in a folder; the text is the reason."""


def _legs(run: _Run, report: _Report, *, everything: bool) -> Iterator[Any]:
    """What is trained again, in order; what is not is said."""
    from vtrain.run.retrain import Leg

    begun = next((each for each in run.starts if not each["checkpoint"] or _foreign(run, each)), None)
    origin, first = None, 0
    if begun is not None and begun["checkpoint"]:
        origin, first = Path(begun["checkpoint"]), begun["step"]
    ways: list[Leg] = []
    for before, end in pairwise([None, *run.kept]):
        assert end is not None
        state = end.state
        if state is None or not (end.folder / CONFIG).is_file():
            continue
        start, step = (before.folder, before.step) if before is not None else (origin, first)
        text = (end.folder / CONFIG).read_text(encoding="utf-8", errors="replace")
        ways.append(Leg(start, step, end, end.step, text, state))
    chosen = ways if everything else ways[-1:]
    rest = run.metrics.last if run.metrics is not None else 0
    if rest > run.newest.step and run.newest.state is not None and run.folder.joinpath(CONFIG).is_file():
        text = (run.folder / CONFIG).read_text(encoding="utf-8", errors="replace")
        settings = run.starts[-1]["settings"] if run.starts else run.newest.state.settings
        tail = Leg(run.newest.folder, run.newest.step, None, rest, text, _with(run.newest.state, settings))
        if everything:
            chosen = [*chosen, tail]
        else:
            report.not_asked.append(f"{tail.words}, behind the last checkpoint")
    report.not_asked += [each.words for each in ways if each not in chosen]
    yield from chosen


def _foreign(run: _Run, start: Mapping[str, Any]) -> bool:
    """Whether a start went on from a checkpoint of another run."""
    return Path(start["checkpoint"]).parent.name != CHECKPOINTS or (
        Path(start["checkpoint"]).parent.parent.resolve() != run.folder.resolve()
        and start["step"] not in {each.step for each in run.kept}
        and start["session"] == 1
    )


def _with(state: RunState, settings: Mapping[str, Any]) -> RunState:
    from dataclasses import replace

    return replace(state, settings=settings)


class _Training:
    """Data, model and training of a run, looked at in a scratch folder. base: where paths of its configuration start."""

    def __init__(self, run: _Run, report: _Report, folder: Path, base: Path, state: RunState) -> None:
        from vtrain.run.retrain import Scratch

        self.run, self.report, self.state = run, report, state
        try:
            config = load(run.newest.folder / CONFIG, discover(), base)
        except VtrainError as error:
            raise _CannotError(reported(error)) from error
        self.scratch = Scratch(folder, base, config.cache.dir)

    def check(self, legs: list[Any]) -> None:
        """Raises _CannotError where no plan can be made here, nothing having been said."""
        if not legs:
            self.report.skip("training: there is no checkpoint that it could lead to")
            return
        from vtrain.run.retrain import Here

        plans = []
        try:
            for leg in legs:
                file = self.scratch.config(leg)
                plans.append((leg, file, self.scratch.plan(file)))
            plan = plans[-1][2]
            here = Here.of(plan)
        except VtrainError as error:
            raise _CannotError(reported(error)) from error
        self.report.versions = {
            "vtrain": __version__,
            **versions(plan.config),
            **here.machine,
            "system": platform.platform(),
        }
        same = self._same_weights(plan) & self._same_data(plan, here.device)
        steps = sum(leg.last - leg.first for leg in legs)
        if not same:
            self.report.skip(
                f"training: {counted(steps, 'step')} were not trained again, on another model or other data"
            )
            return
        self.report.say(f"training {steps} of {legs[-1].last} steps again, on {here.device}")
        for leg, file, made in plans:
            self._leg(leg, file, made, here)

    def _same_data(self, plan: Any, device: str) -> bool:
        then = self.run.newest.samples
        if then is None:
            self.report.skip(f"data: {self.run.newest.name} does not name its samples")
            return True
        try:
            findings, files, captions = self.scratch.data(plan, then, device)
        except VtrainError as error:
            self.report.skip(f"data: {reported(error)}")
            return False
        self.report.compared |= {"samples": len(then.names), "files hashed": files, "captions": captions}
        if self.report.found(findings):
            return False
        self.report.say(
            f"data: {counted(len(then.names), 'sample')} of {counted(files, 'file')} and {counted(captions, 'caption')} as they were"
        )
        return True

    def _same_weights(self, plan: Any) -> bool:
        from vtrain.run.retrain import weight_findings

        try:
            if self.report.found(weight_findings(plan, self.state)):
                return False
        except VtrainError as error:
            self.report.skip(f"model: {reported(error)}")
            return False
        marks = len(self.state.encoders) + len(self.state.features) + bool(self.state.base)
        self.report.compared["fingerprints"] = marks
        if marks:
            base = ", the weights under the adapter among them" if self.state.base else ""
            self.report.say(f"model: {counted(marks, 'fingerprint')} as they were{base}")
        else:
            self.report.skip(f"model: an older vtrain left no fingerprints in {self.run.newest.name}")
        return True

    def _leg(self, leg: Any, file: Path, plan: Any, here: Any) -> None:
        """Train it again and compare; what cannot be is said."""
        from vtrain.run.compare import Compared

        if why := self._hindrance(leg):
            self.report.skip(f"{leg.words}: {why}")
            return
        out = Compared()
        try:
            self._train(leg, file, out)
        except (CheckpointError, TrainingError, ConfigError) as error:
            own = all(str(self.scratch.folder) not in each.where for each in error.problems)
            if own:
                self.report.found([Finding(leg.words, f"it cannot be trained again: {reported(error)}")])
            else:
                self.report.skip(f"{leg.words}: {reported(error)}")
            return
        except VtrainError as error:
            self.report.skip(f"{leg.words}: {reported(error)}")
            return
        self._judge(leg, out, plan, here)

    def _train(self, leg: Any, file: Path, out: Any) -> None:
        from vtrain.run.compare import compare_checkpoints

        assert self.run.metrics is not None
        made = self.scratch.retrain(file, leg, self.run.metrics.row, out)
        if leg.end is not None:
            compare_checkpoints(leg.end.folder, made, leg.start, not leg.end.fault, out)

    def _hindrance(self, leg: Any) -> str:
        """Why a leg cannot be trained again; "" if it can."""
        from vtrain.run.retrain import same_training
        from vtrain.train.changes import different

        if self.run.metrics is None:
            return f"there is no {METRICS}"
        if leg.start is not None and (fault := checkpoint.fault(leg.start)) is not None:
            return f"{leg.start.name} is not sound: {fault}"
        newest, own = self.run.newest.samples, leg.end.samples if leg.end is not None else None
        if newest is not None and own is not None and any(found for _, found in different(newest, own)):
            return "other data was trained on then than there is now"
        if leg.state.encoders != self.state.encoders or leg.state.features != self.state.features:
            return "another model was trained on then than there is now"
        for each in self.run.starts:
            if leg.first < each["step"] < leg.last and not same_training(each["settings"], leg.state.settings):
                return f"settings were others before step {each['step']}, and its checkpoint is not there any more"
        return ""

    def _judge(self, leg: Any, out: Any, plan: Any, here: Any) -> None:
        from vtrain.run.compare import TOLERANCE
        from vtrain.run.retrain import otherwise

        size = out.size
        known = None if size == float("inf") else size
        self.report.retrained.append(
            Retrained(leg.first, leg.last, out.rows, out.tensors, out.files, not out.differences, known)
        )
        what = f"{counted(out.rows, 'row')} of {METRICS} and {counted(out.tensors, 'tensor')}"
        if not out.differences:
            self.report.say(f"trained again: {leg.words}: {what} are the same, bit for bit")
            return
        why = otherwise(leg.state, here, versions(plan.config))
        if not why or size > TOLERANCE:
            found = [each for each in out.differences if not why or each.size > TOLERANCE]
            self.report.found([Finding(each.where, each.what) for each in found])
            return
        most = max(out.differences, key=lambda each: each.size)
        text = f"the bits of {leg.words}, for {'; '.join(why)}. {what} are the same within {TOLERANCE:g}"
        self.report.skip(f"{text}; the largest difference is {most.size:.1g}: {most.where}: {most.what}")


# -- the certificate -----------------------------------------------------------------------------------------------------


def _hashes(run: _Run) -> dict[str, Any]:
    """Of what was compared."""
    found: dict[str, Any] = {
        name: file_sha256(run.folder / name) for name in (CONFIG, PLAN) if (run.folder / name).is_file()
    }
    for lines in (run.metrics, run.events):
        if lines is not None:
            found[lines.name] = {"lines": lines.count, "chain": lines.now.sha256}
    found["checkpoints"] = {each.name: each.manifest for each in run.kept}
    if (state := run.newest.state) is not None:
        found |= {
            "data": state.data,
            "base": state.base,
            "encoders": dict(state.encoders),
            "features": dict(state.features),
        }
    return found


def _written(folder: Path, report: _Report, *, writable: bool) -> Certificate:
    """The certificate, put in the run's folder in place of an earlier one."""
    file = folder / CERTIFICATE
    made = Certificate(
        folder, report.verdict, tuple(report.findings), tuple(report.not_compared), tuple(report.not_asked),
        report.compared, tuple(report.retrained), report.versions, report.hashes, file,
    )  # fmt: skip
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(made.as_json(), indent=2, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        report.say(f"WARNING: the certificate could not be written: {error}")
        from dataclasses import replace

        return replace(made, file=None)
    report.say(f"certificate: {file}")
    return made
