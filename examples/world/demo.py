"""The demo: clips, checkpoint, training from random weights, and the judge's figures and pictures of what was learnt.

    python examples/world/demo.py [--output FOLDER] [--short]

Run twice, the second uses what the first has made; interrupted, it resumes from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import checkpoint
import evaluate
import pictures
import tomli
import torch
import world

from vtrain.contract import Device
from vtrain.plan.records import Plan
from vtrain.run.prepare import planned

HERE = Path(__file__).parent
OUTPUT = HERE.parents[1] / "demo-output" / "world"
CLIPS = 384
JUDGED = 32
"""Prompts that each checkpoint but the last answers."""


@dataclass(frozen=True)
class Length:
    """How long is trained. every: steps between validations, and between checkpoints."""

    steps: int
    every: int

    @property
    def changes(self) -> dict[str, str]:
        """Of world.toml, whose own length is WHOLE."""
        return {
            f"steps = {WHOLE.steps}": f"steps = {self.steps}",
            f'every = "{WHOLE.every} steps"': f'every = "{self.every} steps"',
        }


WHOLE = Length(1000, 250)
SHORT = Length(600, 300)
"""Not all is learnt by then, and far more than chance."""


def write_config(source: Path, target: Path, changes: Mapping[str, str]) -> Path:
    """`source` with other values, as `target`. Raises ValueError where it no longer has what is replaced."""
    text = source.read_text(encoding="utf-8")
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"{source} has no {old!r}")
        text = text.replace(old, new)
    target.write_text(text, encoding="utf-8")
    return target


def make_inputs(output: Path, clips: int) -> None:
    """Clips and checkpoint, unless they are there."""
    if len(list((output / "clips").glob("*.txt"))) < clips:
        print(f"\n1. drawing {clips} clips of 9 frames and their captions: {output / 'clips'}", flush=True)
        world.write_clips(output / "clips", world.clips(clips, seed=0))
    if not (output / "checkpoint" / "model_index.json").exists():
        print(f"\n2. making a checkpoint of 4.9 M random weights: {output / 'checkpoint'}", flush=True)
        checkpoint.build(output / "checkpoint")


def moved(output: Path) -> dict[str, str]:
    """Changes of world.toml and lora.toml for this output folder."""
    return {"../../demo-output/world": output.as_posix()}


def precision() -> dict[str, str]:
    """Changes of world.toml for this machine: fp32 where bf16 is emulated: with AVX2 alone it takes ten times longer."""
    if torch.accelerator.is_available() or Device().has_bf16:
        return {}
    print("this processor has no bf16 instructions: training in fp32", flush=True)
    return {'mixed = "bf16"': 'mixed = "no"'}


def train(config: Path) -> int:
    """`vtrain run`; its exit code. A Ctrl-C is for it alone: it saves what is done, and ends."""
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # vtrain inherits what is ignored, not what is caught
        signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        code = subprocess.run(["vtrain", "run", str(config)], check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if code > 128:
        print("the same command resumes from there")
    return code


def introduction(length: Length) -> str:
    """What is going to happen, and how long that takes."""
    minutes = {WHOLE: "four to six", SHORT: "two to four"}.get(length)
    time = f"It takes {minutes} minutes on two cores; Ctrl-C saves, and the same command resumes.\n" if minutes else ""
    return (
        'A model of random weights learns to make what the prompt says, such as "a red circle moves left".\n'
        f"{time}Four parts: clips (seconds), a checkpoint (seconds), `vtrain run` (nearly all of the time: it encodes\n"
        f"the clips, trains {length.steps} steps, and makes videos and a checkpoint every {length.every}), and a judge\n"
        "that reads colour, shape and direction back from the pixels."
    )


def judged(plan: Plan, prompts: int, scratch: Path) -> tuple[dict[int, evaluate.Accuracy], list[evaluate.Answer]]:
    """Accuracy of every checkpoint, and all answers of the last one."""
    curve, found = {}, []
    folders = sorted((plan.config.run.output_dir / "checkpoints").glob("step-*[0-9]"))
    for folder in folders:
        asked = evaluate.fixed(prompts if folder == folders[-1] else min(prompts, JUDGED))
        found = evaluate.answers(plan, evaluate.denoiser(plan, folder), asked, scratch / folder.name)
        shares = evaluate.accuracy(found)
        curve[int(folder.name.removeprefix("step-"))] = shares
        print(f"judged {folder.name}: all three words right in {shares.all:.0%} of {shares.prompts}", flush=True)
    return curve, found


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a tiny model from nothing to make what the prompt says.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for everything it makes")
    parser.add_argument("--prompts", type=int, default=64, help="prompts that are judged at the end (default: 64)")
    parser.add_argument("--short", action="store_true", help=f"{SHORT.steps} steps: most of it is there")
    parser.add_argument("--steps", type=int, help="another number of steps, with validation and checkpoint at the half")
    parser.add_argument("--clips", type=int, default=CLIPS, help=f"training clips (default: {CLIPS})")
    chosen = parser.parse_args()
    if min(chosen.prompts, chosen.steps or 2, chosen.clips) < 1 or chosen.clips < 16 or chosen.steps == 1:
        parser.error("--prompts is at least 1, --steps 2, --clips 16")
    length = SHORT if chosen.short else WHOLE
    length = Length(chosen.steps, chosen.steps // 2) if chosen.steps else length
    output, begun = chosen.output.resolve(), time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    print(introduction(length), flush=True)
    make_inputs(output, chosen.clips)
    changes = {**moved(output), **length.changes, **precision()}
    config = write_config(HERE / "world.toml", output / "world.toml", changes)
    print(f"\n3. vtrain run {config}", flush=True)
    started = time.monotonic()
    if (code := train(config)) != 0:
        return code
    trained = time.monotonic()
    plan = planned(config)
    run = plan.config.run.output_dir
    print("\n4. judging: each checkpoint makes videos of prompts, and their words are read from the pixels", flush=True)
    curve, last = judged(plan, chosen.prompts, run / "judged")
    seconds = {"vtrain run": trained - started, "all": time.monotonic() - begun}
    result = {
        **evaluate.report(last),
        "by step": {step: asdict(shares) for step, shares in curve.items()},
        "seconds": seconds,
    }
    (run / "accuracy.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    prompts = tomli.loads(plan.config.text)["validation"]["prompts"]
    steps = pictures.samples(run)
    pictures.draw_grid(steps, prompts, run / "grid.png")
    pictures.write_moving_grid(steps, prompts, world.FPS, run / "grid.mp4")
    pictures.draw_curves(run / "metrics.jsonl", curve, run / "curves.png")
    print(
        f"\n{evaluate.table(last)}\n\n{seconds['vtrain run']:.0f} s for the run, {seconds['all']:.0f} s in all. Look at:"
    )
    for label, name in (
        ("prompts x steps", "grid.png"),
        ("the same, playing", "grid.mp4"),
        ("loss and accuracy", "curves.png"),
        ("every answer", "accuracy.json"),
        ("its videos", "judged"),
        ("validation videos", "samples"),
        ("checkpoints", "checkpoints"),
    ):
        print(f"  {label:18} {run / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
