"""What the tiny world learns in the same time: a mode that takes longer for a step gets fewer of them.

    PYTHONPATH=examples/world python benchmarks/world_time.py [--output FOLDER] [--rows NAME ...] [--seeds 42 43] [--write]

A step of each mode is timed first, in CPU-seconds on one thread, in turns with that of the row that its table begins with; the run
then has as many steps as that row's own would have taken, and a learning-rate schedule of that length. The judge's figures as in
tiny_world.py. What is done stays in the output folder and is not done again, so that rows can be made one at a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import demo
import evaluate
import lora
import report
import tiny_world
import torch
from measured import put
from step import seconds_of, vtrain_block

from vtrain.contract import Denoiser
from vtrain.plan.records import Plan
from vtrain.run.prepare import planned
from vtrain.train.ema import FOLDER as AVERAGE

PAIRS, STEPS = 6, 5
"""Of the trial: blocks of each side, and steps of a block."""
WHOLE = {"world": demo.SHORT.steps, "lora": 200}
"""Steps of the row that a table begins with."""
PROMPTS = 64
"""That a model from random weights answers."""
PURE = {"[precision]": '[precision]\nbase = "bf16"'}
LORA_BASE = 'base = "fp32"'


@dataclass(frozen=True)
class Mode:
    """A row. task: "world", from random weights, or "lora", a new word. changes: of world.toml or lora.toml.

    averaged: whether the averaged weights are judged too, in a row of their own.
    """

    name: str
    task: str
    changes: Mapping[str, str] = field(default_factory=dict)
    averaged: bool = False

    @property
    def folder(self) -> str:
        return re.sub(r"\W+", "-", self.name)


def optimizer(name: str) -> dict[str, str]:
    return {'use = "adamw"': f'use = "{name}"'}


MODES = (
    Mode("full, bf16", "world"),
    Mode("full, bf16, EMA", "world", {"[validation]": "[ema]\n\n[validation]"}, averaged=True),
    Mode("full, bf16, rollout", "world", {"[optimizer]": "[train.rollout]\nprobability = 0.25\n\n[optimizer]"}),
    Mode("full, bf16, muon", "world", optimizer("muon")),
    Mode("full, pure bf16, adamw_bf16", "world", {**PURE, **optimizer("adamw_bf16")}),
    Mode("full, pure bf16, optimi-adamw", "world", {**PURE, **optimizer("optimi-adamw")}),
    Mode("LoRA, bf16, base bf16", "lora", {LORA_BASE: 'base = "bf16"'}),
    Mode("LoRA, bf16, base int8", "lora", {LORA_BASE: 'base = "int8"'}),
    Mode("LoRA, bf16, base int4", "lora", {LORA_BASE: 'base = "int4"'}),
)
"""The first of each task is the one whose time the others have."""


@dataclass(frozen=True)
class Trial:
    """CPU-seconds of a step, medians of blocks: of the row that the table begins with, and of this one; ratio: of pairs."""

    whole: float
    own: float
    ratio: float


@dataclass(frozen=True)
class Row:
    """Of one run. label: of the weights that were judged. seconds: CPU-seconds of the steps, as the trial has them.

    command: of all of `vtrain run`, with its imports, its videos at the end and its checkpoint. loss: mean of the last steps.
    """

    label: str
    task: str
    seed: int
    steps: int
    trial: Trial
    command: float
    loss: float
    accuracy: Mapping[str, evaluate.Accuracy]

    @property
    def seconds(self) -> float:
        return self.steps * self.trial.whole * self.trial.ratio


def first(task: str) -> Mode:
    return next(mode for mode in MODES if mode.task == task)


def config_of(mode: Mode, output: Path, folder: Path, more: Mapping[str, str]) -> Path:
    source, run = {
        "world": (demo.HERE / "world.toml", "../../demo-output/world/run"),
        "lora": (lora.SOURCE, "../../demo-output/world/lora/run"),
    }[mode.task]
    folder.mkdir(parents=True, exist_ok=True)
    changes = {run: (folder / "run").as_posix(), **demo.moved(output), "at_start = true": "at_start = false"}
    return demo.write_config(source, folder / source.name, {**changes, **more, **mode.changes})


def lengths(mode: Mode, steps: int) -> dict[str, str]:
    """Changes to a run of so many steps, with its videos and its checkpoint at the end."""
    every = {"world": demo.WHOLE.every, "lora": WHOLE["lora"]}[mode.task]
    own = {"world": demo.WHOLE.steps, "lora": WHOLE["lora"]}[mode.task]
    return {
        f"every = {json.dumps(f'{every} steps')}": f'every = "{steps} steps"',
        f"\nsteps = {own}\n": f"\nsteps = {steps}\n",
    }


def trial(mode: Mode, output: Path, folder: Path) -> Trial:
    """Blocks of steps in turns, after one of each to warm up; what was found before stands in the folder."""
    kept = folder / "trial.json"
    if not kept.exists():
        torch.set_num_threads(1)
        log = {"world": "log_every = 50", "lora": "log_every = 20"}[mode.task]
        seconds: dict[str, list[float]] = {"whole": [], "own": []}
        with ExitStack() as stack:
            blocks = {}
            for side, each in (("whole", first(mode.task)), ("own", mode)):
                config = config_of(each, output, folder / f"trial-{side}", {log: f"log_every = {STEPS}"})
                blocks[side] = stack.enter_context(vtrain_block(config))
                blocks[side]()
            for pair in range(PAIRS):
                for side in sorted(blocks, reverse=pair % 2 == 1):
                    seconds[side].append(seconds_of(blocks[side], time.process_time) / STEPS)
        gc.collect()
        ratio = report.ratio(seconds["own"], seconds["whole"], None).median
        found = Trial(statistics.median(seconds["whole"]), statistics.median(seconds["own"]), ratio)
        kept.write_text(json.dumps(asdict(found)), encoding="utf-8")
    return Trial(**json.loads(kept.read_text(encoding="utf-8")))


def made(mode: Mode, output: Path, seed: int) -> list[Row]:
    """Train and judge, unless that is done."""
    folder = output / "time" / mode.folder
    folder.mkdir(parents=True, exist_ok=True)
    is_first = mode == first(mode.task)
    cost = Trial(0, 0, 1.0) if is_first else trial(mode, output, folder)
    steps = round(WHOLE[mode.task] / cost.ratio)
    place = folder / f"seed-{seed}"
    kept = place / "rows.json"
    if not kept.exists():
        config = config_of(mode, output, place, {**lengths(mode, steps), "seed = 42": f"seed = {seed}"})
        before = children()
        trained = tiny_world.run(config)
        command = children() - before
        rows = judged(mode, planned(config), trained, place)
        metrics = (place / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        loss = statistics.fmean(json.loads(line)["flow_loss"] for line in metrics[-tiny_world.LAST :])
        told = [Row(label, mode.task, seed, len(metrics), cost, command, loss, found) for label, found in rows.items()]
        kept.write_text(json.dumps([asdict(row) for row in told]), encoding="utf-8")
    return [read(row) for row in json.loads(kept.read_text(encoding="utf-8"))]


def read(row: dict[str, object]) -> Row:
    accuracy = {kind: evaluate.Accuracy(**each) for kind, each in row["accuracy"].items()}  # type: ignore[attr-defined]
    return Row(**{**row, "accuracy": accuracy, "trial": Trial(**row["trial"])})  # type: ignore[arg-type]


def children() -> float:
    """CPU-seconds of all processes that this one has started and that are done."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def judged(mode: Mode, plan: Plan, trained: Path, folder: Path) -> dict[str, dict[str, evaluate.Accuracy]]:
    """Name of a row -> accuracy by kind of prompt."""
    report.say(f"{mode.name}: judging")
    if mode.task == "lora":
        return {mode.name: lora.judged(plan, trained, folder / "judged")}
    models: dict[str, Denoiser] = {mode.name: evaluate.denoiser(plan, trained)}
    if mode.averaged:
        models[f"{mode.name}, averaged weights"] = plan.family.load_denoiser("cpu", "fp32", trained / AVERAGE)
    found = {}
    for number, (name, model) in enumerate(models.items()):
        answers = evaluate.answers(plan, model, evaluate.fixed(PROMPTS), folder / f"judged-{number}")
        found[name] = {"all prompts": evaluate.accuracy(answers)}
    return found


WORDS = ("colour", "shape", "direction")


def table(rows: Sequence[Row]) -> str:
    """Of one task: a line for each label, over all seeds."""
    kinds = list(rows[0].accuracy)
    whole = statistics.median([row.trial.whole for row in rows if row.trial.whole] or [0.0])
    right = (f"{kind}, all right" for kind in kinds)
    heads = ("mode", "CPU-s/step", "steps", "CPU-s", *right, " / ".join(WORDS), "loss")
    return report.table(heads, [line(label, rows, whole) for label in dict.fromkeys(row.label for row in rows)])


def line(label: str, rows: Sequence[Row], whole: float) -> tuple[str, ...]:
    """whole: CPU-seconds of a step of the first mode."""
    own = [row for row in rows if row.label == label]
    step = whole * own[0].trial.ratio
    shares = []
    for kind in own[0].accuracy:
        each = [row.accuracy[kind] for row in own]
        right = sum(round(found.all * found.prompts) for found in each)
        shares.append(f"{right} of {sum(found.prompts for found in each)}")
    seen = [next(iter(row.accuracy.values())) for row in own]
    words = " / ".join(f"{statistics.fmean(getattr(found, word) for found in seen):.0%}" for word in WORDS)
    loss = f"{statistics.fmean(row.loss for row in own):.3f}"
    return label, f"{step:.3f}", str(own[0].steps), f"{own[0].steps * step:.0f}", *shares, words, loss


@cache
def prepared(output: Path, task: str) -> None:
    """Clips and checkpoint; of a new word also the model that examples/world/demo.py trains, which is trained here if it is not."""
    demo.make_inputs(output, demo.CLIPS)
    if task == "lora":
        config = demo.write_config(demo.HERE / "world.toml", output / "world.toml", demo.moved(output))
        lora.prepare(output, tiny_world.run(config), output / "lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [mode.name for mode in MODES]
    parser.add_argument("--output", type=Path, default=demo.OUTPUT, help="demo.py's output folder, used and kept")
    parser.add_argument(
        "--rows", nargs="+", choices=names, metavar="NAME", default=names, help=f"(default: all of {names})"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {tiny_world.PAGE.name}")
    chosen = parser.parse_args()
    output = chosen.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    os.environ["ACCELERATE_USE_CPU"] = "1"
    rows = []
    for seed in chosen.seeds:
        for mode in (each for each in MODES if each.name in chosen.rows):
            prepared(output, mode.task)
            rows += made(mode, output, seed)
            report.say(
                f"{mode.name}, seed {seed}: {[f'{kind} {each.all:.0%}' for kind, each in rows[-1].accuracy.items()]}"
            )
    text = f"{tiny_world.measured_on()}\n"
    for task, words in (("world", "From random weights"), ("lora", f"A new word on {lora.CLIPS} clips")):
        if some := [row for row in rows if row.task == task]:
            text += f"\n{words}, {len(chosen.seeds)} seed{'s' * (len(chosen.seeds) > 1)}:\n\n{table(some)}\n"
    report.say(text)
    report.write_json(chosen.json, {"rows": [asdict(row) for row in rows]})
    if chosen.write:
        put(tiny_world.PAGE, "world-time", text)


if __name__ == "__main__":
    main()
