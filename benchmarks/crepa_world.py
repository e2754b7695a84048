"""Does CREPA help? The tiny world with it and without it, from random weights, in equal steps and from the same seeds.

    PYTHONPATH=examples/world python benchmarks/crepa_world.py [--output FOLDER] [--json FILE] [--write]

The frozen encoder is a real one, EfficientNet-Lite0 trained on ImageNet (efficientnet.py), in the place that options
give to DINOv2; all else is the CREPA that `vtrain run` has. A seed decides the order of the clips, their noise and
levels, and CREPA's projector; both arms have the same. Of each run: the loss on clips that nobody trained on, from fixed
noise and levels; 64 videos from fixed noises, judged, and measured in time (steadiness.py); beside them true clips, written
as those are. Run again, it goes on where it was. --write puts the tables into docs/crepa.md.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import demo
import efficientnet
import evaluate
import judge
import numpy as np
import report
import torch
import world
from measured import put
from steadiness import Steadiness, steadiness
from torch import Tensor

from vtrain.contract import Caption, Condition, Denoiser, Logged, timed
from vtrain.data.batches import pad
from vtrain.data.caching.caches import Caches, fill_caches
from vtrain.data.scanning.scan import scan
from vtrain.estimate.estimate import make_estimate
from vtrain.plan.records import Plan
from vtrain.run.inbox import Inbox
from vtrain.run.output import Recorder
from vtrain.run.prepare import planned
from vtrain.train.assemble import assemble
from vtrain.train.processes import Processes
from vtrain.train.resume import find_start
from vtrain.train.step import flow_loss
from vtrain.validate.videos import write_mp4
from vtrain_sanavideo.crepa import Crepa
from vtrain_sanavideo.crepa_options import CrepaOptions

PAGE = Path(__file__).parents[1] / "docs" / "crepa.md"
ARMS = ("without", "CREPA")
STAGES = ("fill", "train")
SEEDS = (42, 43, 44)
BLOCK = 3
"""Of 6, as block 10 of SANA-Video's 20: a little behind the middle."""
UNSEEN, UNSEEN_SEED, DRAWS = 64, 9001, 8
"""Clips of the held-out loss, what draws them, and noises and levels for each."""
TOGETHER = 16
LAST = 50
"""Steps over which the training loss is averaged."""


@dataclass(frozen=True)
class Result:
    """Of one run. held_out: loss on unseen clips. trained: flow loss of the last steps. similarity: CREPA's last, same frame."""

    arm: str
    seed: int
    steps: int
    held_out: float
    trained: float
    similarity: float | None
    steady: Steadiness
    accuracy: evaluate.Accuracy
    seconds: float


def config_of(output: Path, arm: str, seed: int, steps: int, options: str) -> Path:
    """world.toml for one run; clips, checkpoint and caches are those of all."""
    other = re.sub(r"\W+", "-", options).rstrip("-") if arm != ARMS[0] else ""
    folder = output / "crepa" / f"{arm.lower()}-{seed}-{steps}{other}"
    folder.mkdir(parents=True, exist_ok=True)
    changes = {
        "../../demo-output/world/run": (folder / "run").as_posix(),
        **demo.moved(output),
        "at_start = true": "at_start = false",
        "seed = 42": f"seed = {seed}",
        **demo.Length(steps, steps).changes,
    }
    return demo.write_config(demo.HERE / "world.toml", folder / "world.toml", changes)


def plan_of(config: Path, arm: str, options: str = "{}") -> Plan:
    """options: JSON of CrepaOptions that are not as by default."""
    plan = planned(config)
    if arm == ARMS[0]:
        return plan
    part = Crepa(CrepaOptions.model_validate({"block": BLOCK, **json.loads(options)}), efficientnet.Lite0())
    if problems := part.check(()):
        raise SystemExit("\n".join(str(problem) for problem in problems))
    return replace(plan, regularizers=(("crepa", part),))


def train(config: Path, arm: str, options: str = "{}") -> Path:
    """As `vtrain run` does, without validation, in processes of its own: first the caches, then the steps. Its last checkpoint."""
    for stage in STAGES:
        command = [
            sys.executable,
            __file__,
            "--stage",
            stage,
            "--config",
            str(config),
            "--arm",
            arm,
            "--options",
            options,
        ]
        if (code := subprocess.run(command, check=False).returncode) != 0:
            raise SystemExit(code)
    return evaluate.newest(planned(config).config.run.output_dir)


def run_stage(plan: Plan, stage: str) -> None:
    """Fill the caches, or train from the last checkpoint if there is one."""
    processes = Processes(plan.config.precision.mixed)
    found = scan(plan)
    filled = fill_caches(plan, found.samples, [], str(processes.device), lambda _: None)
    if stage == "fill":
        return
    plan.config.run.output_dir.mkdir(parents=True, exist_ok=True)
    trainer = assemble(
        plan, make_estimate(plan, found.survey), find_start(plan), filled.index, filled.caches, processes
    )
    recorder = Recorder(plan.config.run.output_dir)
    recorder.begin(trainer.start.state.step)
    for event in trainer.run(Inbox()):
        for trouble in recorder.record(event):
            report.say(trouble.text)
        if isinstance(event, Logged):
            row = event.steps[-1]
            report.say(f"  step {row.step}: flow loss {row.flow_loss:.3f}, {dict(row.terms)}")


def held_out(plan: Plan, model: Denoiser, of: Sequence[world.Words] | None = None) -> float:
    """Mean flow loss on clips that are in no training set, with fixed noises and the schedule's own levels. of: what they show,
    None: all combinations."""
    random = np.random.default_rng(UNSEEN_SEED)
    words = list(islice(cycle(of or world.combinations()), UNSEEN))
    clean = encoded(plan, [world.draw(world.stage(each, random)) for each in words])
    captions = [Caption(each.caption) for each in words]
    fill_caches(plan, (), [(caption, "prompt") for caption in captions], "cpu", lambda _: None)
    caches, losses = Caches.open(plan), []
    generator = torch.Generator().manual_seed(UNSEEN_SEED)
    model.module.eval()
    for _ in range(DRAWS):
        for first in range(0, UNSEEN, TOGETHER):
            some = slice(first, first + TOGETHER)
            text = pad([caches.text(caption, "prompt") for caption in captions[some]], plan.family.text_encoders())
            noise = torch.randn(clean[some].shape, generator=generator)
            level = timed(plan.family, plan.sampler.draw(len(noise), generator))
            noisy, target = plan.sampler.corrupt(clean[some], noise, level)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                prediction = model.predict(noisy, level, Condition(text))
            losses += flow_loss(prediction, target, None).tolist()
    return statistics.fmean(losses)


def encoded(plan: Plan, videos: list[np.ndarray]) -> Tensor:
    """uint8 (F, H, W, 3) each -> latents (N, C, f, h, w)."""
    pixels = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with plan.family.open_video_codec("cpu") as codec, torch.no_grad():
        return torch.cat([codec.encode(some).mean for some in pixels.split(TOGETHER)])


def result(output: Path, arm: str, seed: int, steps: int, prompts: int, options: str = "{}") -> Result:
    """Train, unless that is done, and measure."""
    config = config_of(output, arm, seed, steps, options)
    plan = plan_of(config, arm, options)
    run = plan.config.run.output_dir
    report.say(f"{arm}, seed {seed}: {run}")
    checkpoint = run / "checkpoints" / f"step-{steps:06d}"
    if not checkpoint.exists():
        train(config, arm, options)
    model = evaluate.denoiser(plan, checkpoint)
    answers = evaluate.answers(plan, model, evaluate.fixed(prompts), run / "judged")
    videos = [judge.read(path) for path in sorted((run / "judged").rglob("*.mp4"))]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    similarity = [row["terms"]["crepa/similarity"] for row in rows[-LAST:] if "crepa/similarity" in row["terms"]]
    return Result(
        arm=arm,
        seed=seed,
        steps=steps,
        held_out=held_out(plan, model),
        trained=statistics.fmean(row["flow_loss"] for row in rows[-LAST:]),
        similarity=statistics.fmean(similarity) if similarity else None,
        steady=steadiness(efficientnet.load(), videos),
        accuracy=evaluate.accuracy(answers),
        seconds=statistics.median(row["seconds"] for row in rows),
    )


def truth(folder: Path, prompts: int, of: Sequence[world.Words] | None = None) -> Steadiness:
    """Of true clips of the same prompts, drawn again and written as videos of the model are. of: as for `held_out`."""
    random, videos = np.random.default_rng(UNSEEN_SEED), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, words in enumerate(islice(cycle(of or world.combinations()), prompts)):
        path = folder / f"{number:03}.mp4"
        write_mp4(path, torch.from_numpy(world.draw(world.stage(words, random))), world.FPS)
        videos.append(judge.read(path))
    return steadiness(efficientnet.load(), videos)


Column = tuple[str, str, Callable[[Any], float | None]]
"""A column's head, the format of its numbers, and where they come from."""
COLUMNS: tuple[Column, ...] = (
    ("held-out loss", "{:.4f}", lambda each: each.held_out),
    ("training loss", "{:.3f}", lambda each: each.trained),
    ("likeness", "{:.4f}", lambda each: each.steady.likeness),
    ("flicker", "{:.2f}", lambda each: each.steady.flicker),
    ("followed", "{:.0f}", lambda each: each.steady.followed),
    ("all three right", "{:.1%}", lambda each: each.accuracy.all),
    ("colour", "{:.0%}", lambda each: each.accuracy.colour),
    ("shape", "{:.0%}", lambda each: each.accuracy.shape),
    ("direction", "{:.0%}", lambda each: each.accuracy.direction),
    ("similarity", "{:.3f}", lambda each: each.similarity),
    ("s/step", "{:.3f}", lambda each: each.seconds),
)


def cell(form: str, value: float | None) -> str:
    return "-" if value is None else form.format(value)


def whole_table(
    found: Sequence[Any], true: Steadiness, arms: Iterable[str] = ARMS, columns: Sequence[Column] = COLUMNS
) -> str:
    """A row for each run, each arm's mean, and the true clips. found: with an `arm` and a `seed` each, and what columns read."""
    rows = [(each.arm, str(each.seed), *(cell(form, read(each)) for _, form, read in columns)) for each in found]
    for arm in arms:
        own = [each for each in found if each.arm == arm]
        rows.append(
            (f"**{arm}**", "mean", *(cell(form, mean([read(each) for each in own])) for _, form, read in columns))
        )
    told = {"likeness": f"{true.likeness:.4f}", "flicker": cell("{:.2f}", true.flicker), "followed": str(true.followed)}
    rows.append(("true clips", "", *(told.get(head, "") for head, _, _ in columns)))
    return report.table(("arm", "seed", *(head for head, _, _ in columns)), rows)


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def differences(found: list[Result]) -> str:
    """CREPA less without, seed by seed: so few are no statistics, so all of them are shown."""
    by = {(each.arm, each.seed): each for each in found}
    seeds = list(dict.fromkeys(each.seed for each in found))
    rows = []
    for head, form, read in COLUMNS[:-1]:  # seconds are the machine's
        pairs = [(read(by[ARMS[0], seed]), read(by[ARMS[1], seed])) for seed in seeds]
        known = [after - before for before, after in pairs if before is not None and after is not None]
        if len(known) == len(seeds):
            signed = form.replace("{:", "{:+")
            rows.append((head, *map(signed.format, known), signed.format(statistics.fmean(known))))
    return report.table(("CREPA less without", *(f"seed {seed}" for seed in seeds), "mean"), rows)


def text(found: list[Result], true: Steadiness, options: str) -> str:
    told = "; ".join(f"{name} {value}" for name, value in report.machine().items())
    first, other = found[0], "" if options == "{}" else f", CREPA with {options}"
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d}: {told}.\n\n"
        f"{first.steps} steps, {first.accuracy.prompts} videos a run, {UNSEEN} unseen clips x {DRAWS} draws{other}:\n\n"
        f"{whole_table(found, true)}\n\n{differences(found)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=demo.OUTPUT, help="demo.py's output folder, used and kept")
    parser.add_argument("--steps", type=int, default=demo.SHORT.steps, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="(default: %(default)s)")
    parser.add_argument("--clips", type=int, default=demo.CLIPS, help="training clips (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=64, help="videos of each run (default: %(default)s)")
    parser.add_argument(
        "--options", default="{}", help="of CREPA, as JSON, such as '{\"weight\": 0.1}' (default: none)"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--stage", choices=STAGES, help="of the run of --config and --arm alone; then it ends")
    parser.add_argument("--config", type=Path, help="with --stage")
    parser.add_argument("--arm", choices=ARMS, default=ARMS[1], help="with --stage (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.parent.name}/{PAGE.name}")
    chosen = parser.parse_args()
    if chosen.stage:
        run_stage(plan_of(chosen.config, chosen.arm, chosen.options), chosen.stage)
        return
    output = chosen.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    demo.make_inputs(output, chosen.clips)
    found = [
        result(output, arm, seed, chosen.steps, chosen.prompts, chosen.options) for seed in chosen.seeds for arm in ARMS
    ]
    true = truth(output / "crepa" / "true", chosen.prompts)
    told = text(found, true, chosen.options)
    report.say(f"\n{told}")
    report.write_json(chosen.json, {"runs": [asdict(each) for each in found], "true clips": asdict(true)})
    if chosen.write:
        put(PAGE, "crepa", told)


if __name__ == "__main__":
    main()
