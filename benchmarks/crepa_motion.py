"""Does CREPA help where its paper uses it? A trained model is fine-tuned to a new motion from few clips, with it and without.

    PYTHONPATH=examples/world python benchmarks/crepa_motion.py [--output FOLDER] [--json FILE] [--write]

The model is the tiny world's, trained as examples/world/demo.py does (run before, if it was not); the new motion is along the
diagonals, whose words the model knows and whose combinations it has never seen. A LoRA of examples/world/lora.toml, 20 clips of
the new motion and the old ones beside them. The encoder, the seeds and the measures are those of crepa_world.py. Run again, it goes
on where it was. --write puts the tables into docs/crepa.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import crepa_world
import demo
import efficientnet
import evaluate
import judge
import lora
import numpy as np
import report
import world
from crepa_world import PAGE, SEEDS
from measured import put
from steadiness import Steadiness, steadiness

from vtrain.run.prepare import planned

ARMS = {"without": "", "CREPA, weight 0.5": "{}", "CREPA, weight 0.05": '{"weight": 0.05}'}
"""Arm -> options of CREPA, as JSON; "": without it."""
MOTIONS = [
    world.Words(*words) for words in product(world.KNOWN_COLOURS, world.KNOWN_SHAPES, world.DIAGONALS)
]  # fmt: skip
CLIPS, CLIPS_SEED = 20, 31
NOISES = 2
"""Starting noises from which each of the 32 new combinations is asked for."""


@dataclass(frozen=True)
class Result:
    """Of one run. held_out: loss on unseen clips of the new motion. steady, new: of its videos; old: of the old ones."""

    arm: str
    seed: int
    held_out: float
    steady: Steadiness
    new: evaluate.Accuracy
    old: evaluate.Accuracy
    similarity: float | None


def diagonal_clips() -> Iterator[tuple[world.Words, np.ndarray]]:
    """Twenty of the new motion, each diagonal in five of its eight combinations: twelve of the 32 are in none."""
    random = np.random.default_rng(CLIPS_SEED)
    for motion in world.DIAGONALS:
        own = [words for words in MOTIONS if words.direction == motion]
        for place in random.permutation(len(own))[: CLIPS // len(world.DIAGONALS)]:
            yield own[place], world.draw(world.stage(own[place], random))


def prepare(trained: Path, folder: Path) -> Path:
    """The trained model as a model folder, and the clips of the new motion. Gives the model."""
    checkpoint = evaluate.newest(planned(trained / "world.toml").config.run.output_dir)
    lora.prepare(trained, checkpoint, folder)
    clips = folder / "motion"
    if len(list(clips.glob("*.txt"))) < CLIPS:
        shutil.rmtree(clips, ignore_errors=True)
        world.write_clips(clips, diagonal_clips())
    return folder / "model"


def config_of(trained: Path, folder: Path, arm: str, seed: int) -> Path:
    """lora.toml for one run."""
    own = folder / f"{list(ARMS).index(arm)}-{seed}"
    own.mkdir(parents=True, exist_ok=True)
    world_folder = "../../demo-output/world"
    changes = {
        f"{world_folder}/lora/run": (own / "run").as_posix(),
        f"{world_folder}/lora/model": (folder / "model").as_posix(),
        f"{world_folder}/lora/clips": (folder / "motion").as_posix(),
        f"{world_folder}/lora/cache": (folder / "cache").as_posix(),
        f"{world_folder}/clips": (trained / "clips").as_posix(),
        "seed = 42": f"seed = {seed}",
        "at_start = true": "at_start = false",
    }
    return demo.write_config(lora.SOURCE, own / "lora.toml", changes)


def result(trained: Path, folder: Path, arm: str, seed: int) -> Result:
    """Train, unless that is done, and measure."""
    config, options = config_of(trained, folder, arm, seed), ARMS[arm] or "{}"
    sort = crepa_world.ARMS[1 if ARMS[arm] else 0]
    plan = crepa_world.plan_of(config, sort, options)
    run = plan.config.run.output_dir
    report.say(f"{arm}, seed {seed}: {run}")
    steps = plan.config.train.steps
    checkpoint = run / "checkpoints" / f"step-{steps:06d}"
    if not checkpoint.exists():
        crepa_world.train(config, sort, options)
    model = evaluate.denoiser(plan, checkpoint)
    asked = [(seed, words) for seed in evaluate.SEEDS[:NOISES] for words in MOTIONS]
    new = evaluate.answers(plan, model, asked, run / "judged" / "new")
    videos = [judge.read(path) for path in sorted((run / "judged" / "new").rglob("*.mp4"))]
    old = evaluate.answers(plan, model, evaluate.fixed(32), run / "judged" / "old")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    similarity = [
        row["terms"]["crepa/similarity"] for row in rows[-crepa_world.LAST :] if "crepa/similarity" in row["terms"]
    ]
    return Result(
        arm=arm,
        seed=seed,
        held_out=crepa_world.held_out(plan, model, MOTIONS),
        steady=steadiness(efficientnet.load(), videos),
        new=evaluate.accuracy(new),
        old=evaluate.accuracy(old),
        similarity=statistics.fmean(similarity) if similarity else None,
    )


COLUMNS: tuple[crepa_world.Column, ...] = (
    ("held-out loss", "{:.4f}", lambda each: each.held_out),
    ("likeness", "{:.4f}", lambda each: each.steady.likeness),
    ("flicker", "{:.2f}", lambda each: each.steady.flicker),
    ("followed", "{:.0f}", lambda each: each.steady.followed),
    ("new motion, all right", "{:.1%}", lambda each: each.new.all),
    ("its direction", "{:.1%}", lambda each: each.new.direction),
    ("old motions, all right", "{:.1%}", lambda each: each.old.all),
    ("similarity", "{:.3f}", lambda each: each.similarity),
)
"""A column's head, the format of its numbers, and where they come from in a Result."""


def text(found: list[Result], true: Steadiness) -> str:
    told = "; ".join(f"{name} {value}" for name, value in report.machine().items())
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d}: {told}.\n\n200 steps of LoRA on {CLIPS} clips of the new motion, "
        f"{found[0].new.prompts} videos of it and {found[0].old.prompts} of the old ones from each run:\n\n"
        f"{crepa_world.whole_table(found, true, ARMS, COLUMNS)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=demo.OUTPUT, help="demo.py's output folder, used and kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.parent.name}/{PAGE.name}")
    chosen = parser.parse_args()
    trained = chosen.output.resolve()
    if not (trained / "world.toml").exists():
        parser.error(f"{trained} holds no tiny world: run examples/world/demo.py first")
    folder = trained / "crepa-motion"
    prepare(trained, folder)
    found = [result(trained, folder, arm, seed) for seed in chosen.seeds for arm in ARMS]
    true = crepa_world.truth(folder / "true", NOISES * len(MOTIONS), MOTIONS)
    told = text(found, true)
    report.say(f"\n{told}")
    report.write_json(chosen.json, {"runs": [asdict(each) for each in found], "true clips": asdict(true)})
    if chosen.write:
        put(PAGE, "crepa_motion", told)


if __name__ == "__main__":
    main()
