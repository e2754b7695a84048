"""Which steps of a run are trained again, and what of them is the same: data and model are looked at before."""

from __future__ import annotations

import math
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vtrain import __version__
from vtrain.config import load
from vtrain.contract import DataError, TrainingError, VtrainError
from vtrain.data.scanning.scan import Scan, scan
from vtrain.estimate.render import counted
from vtrain.plan.places import CONFIG, METRICS
from vtrain.plan.records import Plan
from vtrain.registry import discover
from vtrain.run.certificate import Finding, Report, Retrained
from vtrain.run.chain import RunFiles, reported
from vtrain.run.compare import Compared, compare_checkpoints
from vtrain.run.lines import Link
from vtrain.run.retrain import SHORT, Here, Leg, Scratch, bases, otherwise, same_training, weight_findings
from vtrain.train import checkpoint
from vtrain.train.changes import different
from vtrain.train.resume import RunState, versions


def check_training(run: RunFiles, report: Report, *, everything: bool) -> None:
    state = run.newest.state
    legs = list(_legs(run, report, everything=everything))
    if state is None:
        report.skip(f"data, model and training: nothing says what they were at {run.newest.name}")
        return
    with tempfile.TemporaryDirectory(prefix="vtrain-verify-") as place:
        reasons: list[str] = []
        places = bases(run.folder, state) or [run.folder.parent]
        for number, base in enumerate(places):
            folder = Path(place, str(number)).resolve()
            folder.mkdir()
            try:
                _Training(run, report, folder, base, state).check(legs, alone=number == len(places) - 1)
                return
            except _CannotError as error:
                reasons.append(str(error))
        report.skip(f"data, model and training: {reasons[-1]}")


class _CannotError(Exception):
    """Nothing can be planned in a folder; the text is the reason."""


def _legs(run: RunFiles, report: Report, *, everything: bool) -> Iterator[Leg]:
    """What is trained again, in order; what is not is said."""
    origin, first = run.origin
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
    rest = run.metrics.last if run.metrics is not None and run.whole else 0
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


def _with(state: RunState, settings: Mapping[str, Any]) -> RunState:
    return replace(state, settings=settings)


class _Training:
    """Data, model and training of a run, looked at in a scratch folder. base: where paths of its configuration start."""

    def __init__(self, run: RunFiles, report: Report, folder: Path, base: Path, state: RunState) -> None:
        self.run, self.report, self.state = run, report, state
        try:
            config = load(run.newest.folder / CONFIG, discover(), base)
        except VtrainError as error:
            raise _CannotError(reported(error)) from error
        self.scratch = Scratch(folder, base, config.cache.dir)

    def check(self, legs: list[Leg], *, alone: bool) -> None:
        """Raises _CannotError where no plan can be made here, nothing having been said. alone: no other folder is left to look in:
        without data the model is compared all the same."""
        newest = self.run.newest
        try:
            text = (newest.folder / CONFIG).read_text(encoding="utf-8", errors="replace")
            plan = self._planned(Leg(newest.folder, newest.step, newest, newest.step, text, self.state))[1]
            here = Here.of(plan)
            found = self._scanned(plan, alone=alone)
        except (VtrainError, OSError) as error:
            raise _CannotError(reported(error) if isinstance(error, VtrainError) else str(error)) from error
        ready = list(self._ready(legs))
        self.report.versions = {
            "vtrain": __version__, **versions(plan.config), **here.machine, "system": platform.platform(),
        }  # fmt: skip
        same = self._same_weights(plan) & self._same_data(plan, found, here.device)
        steps = sum(leg.last - leg.first for leg, _, _ in ready)
        if not ready:
            return
        if not same:
            self.report.skip(
                f"training: {counted(steps, 'step')} were not trained again, on another model or other data"
            )
            return
        self.report.say(f"training {steps} of {self.run.steps} steps again, on {here.device}")
        for words in self.report.not_asked:
            self.report.say(f"not trained again: {words} (--all does)")
        for leg, file, made in ready:
            self._leg(leg, file, made, here)
            shutil.rmtree(file.parent, ignore_errors=True)  # all of them may be large together

    def _scanned(self, plan: Plan, *, alone: bool) -> Scan | DataError:
        try:
            return scan(plan)
        except DataError as error:
            if not alone:
                raise
            return error

    def _planned(self, leg: Leg) -> tuple[Path, Plan]:
        file = self.scratch.config(leg)
        return file, self.scratch.plan(file)

    def _ready(self, legs: list[Leg]) -> Iterator[tuple[Leg, Path, Plan]]:
        """Those that can be trained again; of the others it is said why not."""
        for leg in legs:
            why = self._hindrance(leg)
            try:
                if not why:
                    yield leg, *self._planned(leg)
            except VtrainError as error:
                why = reported(error)
            if why:
                self.report.skip(f"{leg.words}: {why}")

    def _same_data(self, plan: Plan, scanned: Scan | DataError, device: str) -> bool:
        then = self.run.newest.samples
        if then is None:
            self.report.skip(f"data: {self.run.newest.name} does not name its samples")
            return True
        try:
            if isinstance(scanned, DataError):
                raise scanned
            findings, files, captions = self.scratch.data(plan, scanned.samples, then, device)
        except VtrainError as error:
            self.report.skip(f"data: {reported(error)}")
            return False
        self.report.compared |= {"samples": len(then.names), "files hashed": files, "captions": captions}
        if self.report.found(findings):
            return False
        words = f"{counted(len(then.names), 'sample')} of {counted(files, 'file')} and {counted(captions, 'caption')}"
        self.report.say(f"data: {words} as they were")
        return True

    def _same_weights(self, plan: Plan) -> bool:
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

    def _leg(self, leg: Leg, file: Path, plan: Plan, here: Here) -> None:
        """Train it again and compare; what cannot be is said."""
        out = Compared()
        try:
            self._train(leg, file, out)
        except VtrainError as error:
            # Of the scratch folder, the model, the data, the device: nothing of what the run says is wrong by that.
            if isinstance(error, TrainingError) or any(
                _names(leg, f"{each.where} {each.what}") for each in error.problems
            ):
                self.report.found([Finding(leg.words, f"it cannot be trained again: {reported(error)}")])
            else:
                self.report.skip(f"{leg.words}: {reported(error)}")
            return
        except OSError as error:
            self.report.skip(f"{leg.words}: {error}")
            return
        except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
            what = f"it cannot be trained again: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self.report.found([Finding(leg.words, what)])
            return
        self._judge(leg, out, plan, here)

    def _train(self, leg: Leg, file: Path, out: Compared) -> None:
        assert self.run.metrics is not None
        made = self.scratch.retrain(file, leg, self.run.metrics.row, out)
        if leg.end is not None:
            compare_checkpoints(leg.end.folder, made, leg.start, not leg.end.fault, out)

    def _hindrance(self, leg: Leg) -> str:
        """Why a leg cannot be trained again; "" if it can."""
        if self.run.metrics is None:
            return f"there is no {METRICS}"
        if leg.start is not None and (fault := self._fault(leg.start, leg)):
            return fault
        newest, own = self.run.newest.samples, leg.end.samples if leg.end is not None else None
        if newest is not None and own is not None and any(found for _, found in different(newest, own)):
            return "other data was trained on then than there is now"
        if leg.state.encoders != self.state.encoders or leg.state.features != self.state.features:
            return "another model was trained on then than there is now"
        between = [each for each in self.run.starts if leg.first < each["step"] < leg.last]
        begun = [each for each in self.run.starts if each["step"] <= leg.first][-1:]
        if between and not all(same_training(each["settings"], leg.state.settings) for each in begun + between):
            step = between[-1]["step"]
            return f"settings were others before step {step}, and its checkpoint is not there any more"
        return ""

    def _fault(self, start: Path, leg: Leg) -> str:
        """Why a leg cannot begin from a checkpoint; "" if it can."""
        own = next((each for each in self.run.kept if each.folder == start), None)
        if own is not None:
            return f"{own.name} is not sound: {own.fault}" if own.fault else ""
        if not start.is_dir():
            return f"{start}, a checkpoint of another run, is not there any more"
        if fault := checkpoint.fault(start):
            return f"{start} is not sound: {fault}"
        link = leg.end.records.before if leg.end is not None and leg.end.records is not None else None
        if link is not None and link.step == leg.first and Link.to(leg.first, start) != link:
            return f"{start} is another checkpoint than the one that the run went on from"
        return ""

    def _judge(self, leg: Leg, out: Compared, plan: Plan, here: Here) -> None:
        size = out.size
        known = None if size == math.inf else size
        self.report.retrained.append(
            Retrained(leg.first, leg.last, out.rows, out.tensors, out.files, not out.differences, known)
        )
        what = f"{counted(out.rows, 'row')} of {METRICS} and {counted(out.tensors, 'tensor')}"
        if not out.differences:
            self.report.say(f"trained again: {leg.words}: {what} are the same, bit for bit")
            return
        why = otherwise(leg.state, here, versions(plan.config))
        if found := [each for each in out.differences if not why or not each.size <= each.allowed]:
            self.report.found([Finding(each.where, each.what) for each in found])
            return
        most = max(out.differences, key=lambda each: each.size / each.allowed)
        text = f"the bits of {leg.words}, for {'; '.join(why)}. {what} are the same within the tolerance"
        self.report.skip(f"{text}; the largest difference is {most.size:.1g}: {most.where}: {most.what}")


def _names(leg: Leg, text: str) -> bool:
    """Whether an error is of the checkpoint that a leg begins from, or of its configuration."""
    return SHORT in text or (leg.start is not None and str(leg.start) in text)
