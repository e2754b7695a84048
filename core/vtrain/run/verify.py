"""`vtrain verify`: whether a run is what it says. Its files against each other, the data and the model against what they were, and
some of its steps trained again. A certificate says what was compared, and what was not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vtrain.contract import CheckpointError, ConfigError, Problem, VtrainError
from vtrain.data.scanning.database import file_sha256
from vtrain.estimate.render import counted
from vtrain.plan.places import CHECKPOINT, CHECKPOINTS, CONFIG, EVENTS, METRICS, PLAN
from vtrain.run.certificate import Certificate, Finding, Report, written
from vtrain.run.chain import (
    RunFiles,
    config_findings,
    counts_of,
    link_findings,
    reported,
    run_findings,
    start_findings,
    unlinked,
)
from vtrain.run.output import hold
from vtrain.run.retrain import bases
from vtrain.run.trial import check_training
from vtrain.train import checkpoint


def verify(path: Path, *, everything: bool = False, say: Callable[[str], None] = lambda text: None) -> Certificate:
    """Verify a run, by its output folder or one of its checkpoints, and write its certificate.

    everything: train all of it again, not only from its last checkpoint but one to the last. say: called with each line for people.
    Raises CheckpointError where there is no run, or one is going on there; ConfigError under torchrun.
    """
    folder, last = _place(path.absolute())
    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        raise ConfigError(Problem("", "vtrain verify is one process.", "Start it without torchrun."))
    with _alone(folder) as writable:
        report = Report(say)
        try:
            run = RunFiles.read(folder, last)
        except OSError as error:
            raise CheckpointError(
                Problem(str(error.filename or folder), f"it cannot be read: {error.strerror}.")
            ) from error
        _check_records(run, report)
        _check_checkpoints(run, report)
        _check_configuration(run, report)
        check_training(run, report, everything=everything)
        report.hashes = _hashes(run)
        report.say(f"verdict: {report.verdict}")
        return written(folder, report, writable=writable)


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
    """No run trains in the folder meanwhile; whether it can be written. Raises CheckpointError if one does."""
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


# -- what it says of itself ----------------------------------------------------------------------------------------------


def _check_records(run: RunFiles, report: Report) -> None:
    wrong, lines = 0, []
    for name, found in ((METRICS, run.metrics), (EVENTS, run.events)):
        if found is None:
            wrong += report.found([Finding(name, "it is not there")])
            continue
        wrong += report.found(found.findings(run.kept, run.skipped))
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


def _check_checkpoints(run: RunFiles, report: Report) -> None:
    wrong = 0
    for each in run.kept:
        if each.fault:
            wrong += report.found([Finding(each.name, f"it is not sound: {each.fault}")])
        wrong += report.found(list(each.odd))
    report.compared["checkpoints"] = len(run.kept)
    if not wrong:
        report.say(f"checkpoints: {len(run.kept)} sound, each file as its manifest says")


def _check_configuration(run: RunFiles, report: Report) -> None:
    before = len(report.findings) + len(report.not_compared)
    for each in run.kept:
        if each.state is None:
            continue
        try:
            base = next(iter(bases(run.folder, each.state)), run.folder.parent)
            report.found(config_findings(each, base))
            report.found(start_findings(each, run.starts))
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
        said = f"{CONFIG} and {PLAN} say what the checkpoints do"
        report.say(f"configuration: {said} ({report.compared.get('settings', 0)} settings)")


def _hashes(run: RunFiles) -> dict[str, Any]:
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
