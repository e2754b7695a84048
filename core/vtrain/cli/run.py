"""`vtrain run`: plan, fill the caches, train."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from vtrain.cli.collector import uncollected
from vtrain.cli.filling import fill, tell_left_out, together
from vtrain.cli.moved import tell_moved
from vtrain.cli.plan import show as show_plan
from vtrain.cli.report import one_line
from vtrain.contract import (
    CheckpointError,
    Denoiser,
    DeviceError,
    Options,
    Problem,
    Registered,
    RunInfo,
    SupportsFeatures,
    Tracker,
    TrackerSpec,
)
from vtrain.data.caching import hashes
from vtrain.data.scanning.scan import Scan, scan
from vtrain.plan.data_words import counted
from vtrain.plan.price import Prices, check_room, price
from vtrain.plan.records import Plan, Survey
from vtrain.plan.render import as_json
from vtrain.plan.residents import Doing, remedies
from vtrain.registry.blame import blame

if TYPE_CHECKING:
    from vtrain.data.caching.caches import Caches, Filled
    from vtrain.data.index import Index
    from vtrain.train.assemble import Trainer
    from vtrain.train.loop import Validate, Validated
    from vtrain.train.processes import Processes


@dataclass(frozen=True)
class Ready:
    """What is prepared and all processes need: the index of the samples that can be trained on, counted and priced."""

    survey: Survey
    index: Index
    prices: Prices


def run(config: Path) -> None:
    """Train as `config` says. Exits with 0 at the last step, 130 or 143 after Ctrl-C or SIGTERM, everything saved."""
    with (
        together(config) as (plan, processes, console),
        blame(plan.config.parts()),
        _alone(plan.config.run.output_dir, processes, console),
    ):
        ended_by = _train(plan, processes, console)
    if ended_by is not None:
        sys.exit(128 + ended_by)


@contextmanager
def _alone(output: Path, processes: Processes, console: Console) -> Iterator[None]:
    """The first process holds the output folder. Raises CheckpointError on all if another run does."""
    from vtrain.train.output_lock import hold

    with ExitStack() as held:
        warning = processes.from_first(lambda: held.enter_context(hold(output)))
        if warning:
            _warner(console)(warning)
        yield


def _train(plan: Plan, processes: Processes, console: Console) -> int | None:
    from vtrain.cli.progress import Display
    from vtrain.cli.trackers import Trackers
    from vtrain.data.caching.caches import Caches
    from vtrain.train.assemble import assemble
    from vtrain.train.loop import Stopped
    from vtrain.train.resume import find_start, settings
    from vtrain.train.signals import listening

    output = plan.config.run.output_dir
    start = processes.from_first(lambda: find_start(plan))
    ready = _prepare(plan, processes, console)
    for notice in start.notices:
        console.print(escape(notice))
    caches = Caches.open(plan)
    with uncollected(), _explained(plan, processes, "loading the model"):
        trainer = assemble(plan, ready.prices, start, ready.index, caches, processes)
    processes.from_first(lambda: _begin(plan, ready, trainer, console))
    values = {key: setting.value for key, setting in settings(plan).items()}
    info = RunInfo(plan.config.run.name, str(output), values, start.state.step)
    warn = _warner(console)
    trackers = [(part.registered, _tracker(part.registered, part.options)) for part in plan.config.trackers]
    signalled: int | None = None
    with (
        listening(lambda: console.print("stopping after this step; what is done will be saved")) as stop,
        Display(console, ready.prices.steps, start.state.step) as display,
        Trackers(trackers if processes.first else [], info, warn) as told,
        _explained(plan, processes, "training"),
    ):
        validate = _validation(plan, trainer.denoiser, caches, processes, lambda: bool(stop), console)
        for event in trainer.run(stop, validate, display.stepped):
            display.show(event)
            told.show(event)
            if isinstance(event, Stopped):
                signalled = event.signal
    console.print(f"output: {escape(str(output))}")
    return signalled


def _explained(plan: Plan, processes: Processes, doing: Doing) -> AbstractContextManager[None]:
    """A full device is an error with what lowers the memory that this plan takes."""
    return processes.device.explained(doing, remedies(plan, doing))


def _prepare(plan: Plan, processes: Processes, console: Console) -> Ready:
    """The first process scans, prices and shows; all fill the caches; the first says what can be trained on."""
    found = processes.from_first(lambda: _look(plan, console))
    filled = fill(plan, found.samples, processes, console)
    return processes.from_first(lambda: _ready(plan, found, filled, console))


def _look(plan: Plan, console: Console) -> Scan:
    """Scan, price, show."""
    found = scan(plan)
    for message in found.messages:
        console.print(escape(message))
    prices = price(plan, found.survey)
    check_room(plan, prices)
    show_plan(console, plan, found.survey, prices)
    return found


def _ready(plan: Plan, found: Scan, filled: Filled, console: Console) -> Ready:
    """Tell what was left out in filling, and price anew without it."""
    tell_moved(plan, console)
    copies, example = filled.index.copies()
    if example is not None:
        console.print(
            escape(one_line(f"{copies} samples are copies of another, byte for byte (such as {' and '.join(example)})"))
        )
    survey, prices = found.survey, price(plan, found.survey)
    if filled.left_out:
        tell_left_out(filled.left_out, console)
        survey = filled.recount(survey)
        prices = price(plan, survey)
        lost = len(found.samples) - len(filled.index)
        console.print(f"{lost} of {len(found.samples)} clips cannot be used; {len(filled.index)} remain")
    return Ready(survey, filled.index, prices)


def _begin(plan: Plan, ready: Ready, trainer: Trainer, console: Console) -> None:
    """Make the output folder what the start says, once everything has loaded. Raises CheckpointError if that fails."""
    from vtrain.train import checkpoint, metrics

    output, start = plan.config.run.output_dir, trainer.start
    if start.folder is not None:
        _tell_changes(trainer, console)
    if start.state.step >= ready.prices.steps:
        console.print(f"nothing to do: train.steps is {ready.prices.steps} and the checkpoint is at {start.state.step}")
        return
    try:
        _write_run_files(plan, ready)
        dropped = metrics.cut_back(output, start.state.step)
        moved = checkpoint.set_aside(output / "checkpoints", start.state.step)
    except OSError as error:
        raise CheckpointError(Problem(str(output), f"the output folder cannot be written: {error}.")) from error
    for folder in moved:
        console.print(f"a later checkpoint was left behind as {escape(str(folder))}")
    if dropped:
        console.print(f"{counted(dropped, 'later step')} {'was' if dropped == 1 else 'were'} cut from metrics.jsonl")


def _tell_changes(trainer: Trainer, console: Console) -> None:
    """What a run that goes on stands on, where it is not what it was."""
    before = trainer.start.state
    if before.data != trainer.data:
        console.print(
            f"the data changed since: {before.data} -> {trainer.data}; from here on the order is the new data's"
        )
    for name, mark in trainer.features.items():
        if before.features.get(name, mark) != mark:
            what = "its encoder's weights or an option that shapes them changed"
            console.print(
                f"the features of {escape(name)} are others since: {what}; it goes on from what it has learned"
            )


def _write_run_files(plan: Plan, ready: Ready) -> None:
    output = plan.config.run.output_dir
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.toml").write_text(plan.config.text, encoding="utf-8")
    from vtrain.train.resume import settings

    hash_file = hashes.FileHashes(plan.config.cache.dir / hashes.FILE)
    fingerprints = {
        "text": plan.family.text_fingerprint(hash_file),
        "video": plan.family.video_fingerprint(hash_file),
        "config": hashlib.sha256(plan.config.text.encode()).hexdigest(),
        **{
            f"features ({name})": part.feature_fingerprint(hash_file)
            for name, part in plan.regularizers
            if part.needs().features == "cached" and isinstance(part, SupportsFeatures)
        },
    }
    whole = {
        **as_json(plan, ready.survey, ready.prices),
        "settings": {key: setting.value for key, setting in settings(plan).items()},
        "fingerprints": fingerprints,
    }
    (output / "plan.json").write_text(json.dumps(whole, indent=2), encoding="utf-8")


def _tracker(part: Registered, options: Options) -> Tracker:
    assert isinstance(part.spec, TrackerSpec)
    return part.spec.build(options)


INTERRUPTED = "interrupted"


def _warner(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(f"WARNING: {escape(text)}", style="bold red")


def _validation(
    plan: Plan,
    denoiser: Denoiser,
    caches: Caches,
    processes: Processes,
    stopping: Callable[[], bool],
    console: Console,
) -> Validate | None:
    """Validation that never ends the run: each process generates its share, a failure is told and training goes on."""
    made, warn = plan.validation, _warner(console)
    if made is None:
        return None
    from vtrain.train.loop import Validated
    from vtrain.validate.generate import Interrupted, Validator
    from vtrain.validate.pictures import first_frames
    from vtrain.validate.video import write_sheet

    mixed = plan.config.precision.mixed
    autocast = partial(processes.device.autocast, "bf16" if mixed == "bf16" else None)
    validator = Validator(
        made,
        plan.family,
        plan.sampler,
        caches,
        denoiser,
        processes.device,
        autocast,
        stopping,
        first_frames(plan, caches),
    )

    def validate(step: int) -> Validated:
        folder = plan.config.run.output_dir / "samples" / f"step-{step:06d}"
        share = list(made.prompts)[processes.rank :: processes.count]
        files: dict[str, Path] = {}
        trouble = ""
        try:
            with _explained(plan, processes, "validating"):
                files = validator.videos(folder, share)
        except Interrupted:
            trouble = INTERRUPTED
        except DeviceError as error:
            trouble = str(error)
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        told = processes.gathered([(files, trouble)])
        everything = {name: path for part, _ in told for name, path in part.items()}
        files = {name: everything[name] for name in made.prompts if name in everything}
        sheet = folder / "sheet.png" if files else None
        troubles = {words for _, words in told if words}
        if sheet is not None and processes.first:
            try:
                write_sheet(sheet, files)
            except Exception as error:
                troubles.add(f"no contact sheet: {type(error).__name__}: {error}")
                sheet = None
        for words in sorted(troubles - {INTERRUPTED}):
            warn(f"validation at step {step} failed, training goes on: {words}")
        if INTERRUPTED in troubles:
            console.print(f"validation at step {step} was left unfinished, as asked")
        return Validated(step, files, sheet)

    return validate
