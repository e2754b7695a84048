"""The tiny world, whole: clips, checkpoint, training from random weights, and the judge's figures and pictures.

    python examples/world/demo.py [--output FOLDER] [--short]

Run twice, the second uses what the first has made; interrupted, it goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import checkpoint
import evaluate
import pictures
import tomli
import world

from vtrain.cli.prepare import planned
from vtrain.plan.records import Plan

HERE = Path(__file__).parent
CLIPS = 384
SHORT = {"steps = 1200": "steps = 500", 'every = "300 steps"': 'every = "250 steps"'}
"""Colours are there by then, shapes and directions hardly."""


def write_config(output: Path, short: bool) -> Path:
    """world.toml with paths in `output`. Raises ValueError where the file no longer has what is replaced."""
    text = (HERE / "world.toml").read_text(encoding="utf-8")
    for old, new in {"../../demo-output/world": output.as_posix(), **(SHORT if short else {})}.items():
        if old not in text:
            raise ValueError(f"world.toml has no {old!r}")
        text = text.replace(old, new)
    path = output / "world.toml"
    path.write_text(text, encoding="utf-8")
    return path


def make_inputs(output: Path) -> None:
    """Clips and checkpoint, unless they are there."""
    if len(list((output / "clips").glob("*.txt"))) < CLIPS:
        print(f"drawing {CLIPS} clips: {output / 'clips'}", flush=True)
        world.write_clips(output / "clips", world.clips(CLIPS, seed=0))
    if not (output / "checkpoint" / "model_index.json").exists():
        print(f"making the checkpoint: {output / 'checkpoint'}", flush=True)
        checkpoint.build(output / "checkpoint")


def judged(plan: Plan, prompts: int, scratch: Path) -> tuple[dict[int, evaluate.Accuracy], list[evaluate.Answer]]:
    """Accuracy of every checkpoint over 32 prompts, and all answers of the last one."""
    run = plan.config.run.output_dir
    folders = sorted((run / "checkpoints").glob("step-*[0-9]"))
    curve = {}
    for folder in folders[:-1]:
        found = evaluate.answers(plan, folder, min(prompts, 32), scratch / folder.name)
        curve[int(folder.name.removeprefix("step-"))] = evaluate.accuracy(found)
        print(f"judged {folder.name}: all three words right in {evaluate.accuracy(found).all:.0%}", flush=True)
    last = evaluate.answers(plan, folders[-1], prompts, scratch / folders[-1].name)
    curve[int(folders[-1].name.removeprefix("step-"))] = evaluate.accuracy(last)
    return curve, last


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a tiny model from nothing to make what the prompt says.")
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "demo-output" / "world")
    parser.add_argument("--prompts", type=int, default=64, help="prompts that are judged at the end (default: 64)")
    parser.add_argument("--short", action="store_true", help="500 steps: colours are there")
    chosen = parser.parse_args()
    output, begun = chosen.output.resolve(), time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    make_inputs(output)
    config = write_config(output, chosen.short)
    started = time.monotonic()
    done = subprocess.run(["vtrain", "run", str(config)], check=False)
    trained = time.monotonic()
    if done.returncode != 0:
        return done.returncode
    plan = planned(config)
    run = plan.config.run.output_dir
    curve, last = judged(plan, chosen.prompts, output / "judged")
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
        ("videos", "samples"),
        ("checkpoints", "checkpoints"),
    ):
        print(f"  {label:18} {run / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
