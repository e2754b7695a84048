"""`vtrain run`: plan, fill the caches, train."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from vtrain.cli.collector import uncollected
from vtrain.cli.plan import show as show_plan
from vtrain.cli.prepare import planned
from vtrain.contract import Denoiser, Options, Registered, RunInfo, Tracker, TrackerSpec
from vtrain.data import hashes
from vtrain.data.sample import Sample
from vtrain.data.scan import scan
from vtrain.plan.price import Prices, price
from vtrain.plan.records import Plan, Survey
from vtrain.plan.render import as_json
from vtrain.registry.blame import blame

if TYPE_CHECKING:
    from vtrain.data.caches import Caches
    from vtrain.train.loop import Validate, Validated
    from vtrain.train.processes import Processes


@dataclass(frozen=True)
class Ready:
    """What the first process prepared and all need: the samples that can be trained on."""

    survey: Survey
    samples: tuple[Sample, ...]
    prices: Prices


def run(config: Path) -> None:
    """Train as `config` says. Exits with 0 at the last step, 130 or 143 after Ctrl-C or SIGTERM, everything saved."""
    with uncollected():
        plan = planned(config)
        from vtrain.train.processes import Processes

        processes = Processes(plan.config.precision.mixed)
    console = Console(quiet=not processes.first, soft_wrap=True, highlight=False)
    try:
        ended_by = _train(plan, processes, console)
    finally:
        processes.close()
    if ended_by is not None:
        sys.exit(128 + ended_by)


def _train(plan: Plan, processes: Processes, console: Console) -> int | None:
    from vtrain.cli.progress import Display
    from vtrain.cli.trackers import Trackers
    from vtrain.data.batches import Batches
    from vtrain.data.caches import Caches
    from vtrain.train import checkpoint, metrics
    from vtrain.train.assemble import assemble
    from vtrain.train.loop import Stopped
    from vtrain.train.resume import find_start
    from vtrain.train.signals import listening

    output = plan.config.run.output_dir
    start = processes.from_first(lambda: find_start(plan.config))
    ready = processes.from_first(lambda: _prepare(plan, console, str(processes.device)))
    for notice in start.notices:
        console.print(escape(notice))
    if processes.first:
        _write_run_files(plan, ready)
        dropped = metrics.cut_back(output, start.state.step)
        for moved in checkpoint.set_aside(output / "checkpoints", start.state.step):
            console.print(f"a later checkpoint was left behind as {escape(str(moved))}")
        if dropped:
            console.print(f"{dropped} later steps were cut from metrics.jsonl")
    caches = Caches.open(plan)
    with uncollected():
        trainer = assemble(plan, ready.prices, start, Batches(plan, caches, ready.samples), processes)
    info = RunInfo(plan.config.run.name, str(output), dict(start.state.settings), start.state.step)
    warn = _warner(console)
    trackers = [(part.registered, _tracker(part.registered, part.options)) for part in plan.config.trackers]
    signalled: int | None = None
    with (
        listening() as stop,
        Display(console, ready.prices.steps, start.state.step) as display,
        Trackers(trackers if processes.first else [], info, warn) as told,
    ):
        validate = _validation(plan, trainer.denoiser, caches, processes, lambda: bool(stop), warn)
        for event in trainer.run(stop, validate):
            display.show(event)
            told.show(event)
            if isinstance(event, Stopped):
                signalled = event.signal
    console.print(f"output: {escape(str(output))}")
    return signalled


def _prepare(plan: Plan, console: Console, device: str) -> Ready:
    """Scan, price, show, fill. On the first process only."""
    from vtrain.cli.progress import Filling
    from vtrain.data.caches import fill_caches
    from vtrain.validate.generate import texts

    found = scan(plan)
    for message in found.messages:
        console.print(escape(message))
    prices = price(plan, found.survey)
    show_plan(console, plan, found.survey, prices)
    extra = texts(plan.validation) if plan.validation else []
    with Filling(console) as filling:
        filled = fill_caches(plan, found.samples, extra, device, filling.report)
    if filled.truncated:
        console.print(f"{filled.truncated} captions were too long for the text encoder and lost their end")
    survey = found.survey
    if filled.left_out:
        for sample, reason in sorted(filled.left_out.items()):
            console.print(f"left out: {escape(sample)}: {escape(reason)}")
        survey = filled.recount(survey)
        prices = price(plan, survey)
        console.print(
            f"{len(filled.left_out)} of {len(found.samples)} clips cannot be used; {len(filled.samples)} remain"
        )
    return Ready(survey, tuple(filled.samples), prices)


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
    }
    whole = {
        **as_json(plan, ready.survey, ready.prices),
        "settings": {key: setting.value for key, setting in settings(plan.config).items()},
        "fingerprints": fingerprints,
    }
    (output / "plan.json").write_text(json.dumps(whole, indent=2), encoding="utf-8")


def _tracker(part: Registered, options: Options) -> Tracker:
    assert isinstance(part.spec, TrackerSpec)
    with blame(part, "building it"):
        return part.spec.build(options)


def _warner(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(f"WARNING: {escape(text)}", style="bold red")


def _validation(
    plan: Plan,
    denoiser: Denoiser,
    caches: Caches,
    processes: Processes,
    stopping: Callable[[], bool],
    warn: Callable[[str], None],
) -> Validate | None:
    """Validation that never ends the run: each process generates its share, a failure is told and training goes on."""
    from vtrain.train.loop import Validated
    from vtrain.validate.generate import Interrupted, Validator
    from vtrain.validate.video import write_sheet

    made = plan.validation
    if made is None:
        return None
    validator = Validator(
        made, plan.family, plan.sampler, caches, denoiser, processes.device, processes.accelerator.autocast, stopping
    )

    def validate(step: int) -> Validated:
        folder = plan.config.run.output_dir / "samples" / f"step-{step:06d}"
        share = list(made.prompts)[processes.rank :: processes.count]
        files: dict[str, Path] = {}
        trouble = ""
        try:
            files = validator.videos(folder, share)
        except Interrupted:
            trouble = "stopped as asked"
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        told = processes.gathered([(files, trouble)])
        for _, words in told:
            if words:
                warn(f"validation at step {step} failed, training goes on: {words}")
        everything = {name: path for part, _ in told for name, path in part.items()}
        files = {name: everything[name] for name in made.prompts if name in everything}
        sheet = folder / "sheet.png"
        if files and processes.first:
            write_sheet(sheet, files)
        return Validated(step, files, sheet if files else None)

    return validate
