"""What training modes teach the tiny world in equal steps: the judge's accuracy, loss, time and memory of each.

    PYTHONPATH=examples/world python benchmarks/tiny_world.py [--output FOLDER] [--json FILE] [--write] [--wan]

From random weights, then a new word by LoRA on the model that examples/world/demo.py leaves (run before, if it was not).
--wan: only the world with another family, in more steps. --write puts the table into docs/tiny-world.md. Wall times, one run
after the other: compare them within one table alone.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import checkpoint
import crepa_world
import demo
import evaluate
import lora
import numpy as np
import report
import world
from measured import put
from PIL import Image

from vtrain.run.prepare import planned

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tiny-world.md"
LAST = 50
"""Steps over which the loss is averaged: single ones swing with the noise level."""
CHECKPOINTING = {"gradient_checkpointing = false": "gradient_checkpointing = true"}
FP32 = {'mixed = "bf16"': 'mixed = "no"'}


@dataclass(frozen=True)
class Mode:
    """A row. changes: of world.toml, or of lora.toml.

    clips: the folder of clips below the output folder, "" for the world's own. crepa: whether CREPA is added, its teacher a
    real frozen encoder (crepa_world.py). continued: whether videos that go on from a true clip's first frame are a row too.
    length: of the run.
    """

    name: str
    changes: Mapping[str, str] = field(default_factory=dict)
    clips: str = ""
    crepa: bool = False
    continued: bool = False
    length: demo.Length = demo.SHORT

    @property
    def folder(self) -> str:
        return re.sub(r"\W+", "-", self.name)


FROM_NOTHING = (
    Mode("full, bf16"),
    Mode("full, fp32", FP32),
    Mode("full, bf16, checkpointing", CHECKPOINTING),
    Mode("full, bf16, 8 clips x 2 accumulated", {"batch_size = 16": "batch_size = 8\naccumulate = 2"}),
)
MASKS = {"\n[cache]": '\n[data.masks]\nfolder = "masks"\n\n[cache]'}
ASKED = (
    Mode("full, bf16, CREPA", crepa=True),
    Mode("full, bf16, spoilt clips", clips="spoilt"),
    Mode("full, bf16, spoilt clips, masked", MASKS, clips="spoilt"),
    Mode("full, bf16, half image-to-video", {"\n[cache]": "image_to_video = 0.5\n\n[cache]"}, continued=True),
)
"""Each against the first of FROM_NOTHING."""
PATCH, BLACK = 16, 24
"""Pixels of noise in a corner of a spoilt clip, and of black in its mask: what the VAE mixes with the noise is left out too."""
WAN = Mode(
    "Wan 2.1, full, bf16",
    {'use = "sanavideo"': 'use = "wan21"', '/checkpoint"': '/wan-checkpoint"'},
    length=demo.Length(1500, 1500),
)
"""Another family on the same clips: attention over all tokens learns shapes later than SANA-Video's convolutions."""
NEW_WORD = (
    Mode("LoRA, bf16, base fp32"),
    Mode("LoRA, bf16, base bf16", {'base = "fp32"': 'base = "bf16"'}),
    Mode("LoRA, fp32", FP32),
    Mode("LoRA, bf16, base fp32, checkpointing", CHECKPOINTING),
)


@dataclass(frozen=True)
class Measured:
    """Of one run. accuracy: label -> accuracy. loss: mean of the last steps. seconds: per step, median; memory: peak MiB."""

    mode: str
    steps: int
    accuracy: Mapping[str, evaluate.Accuracy]
    loss: float
    seconds: float
    memory: float


def run(config: Path) -> Path:
    """Train; the newest checkpoint. Raises SystemExit if it is stopped."""
    if (code := demo.train(config)) != 0:
        raise SystemExit(code)
    return evaluate.newest(planned(config).config.run.output_dir)


def measured(mode: Mode, config: Path, accuracy: Mapping[str, evaluate.Accuracy]) -> Measured:
    lines = (planned(config).config.run.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    seconds = statistics.median(row["seconds"] for row in rows)
    memory = max(row["memory"] for row in rows) / 2**20
    loss = statistics.fmean(row["flow_loss"] for row in rows[-LAST:])
    found = Measured(mode.name, len(rows), accuracy, loss, seconds, memory)
    report.say(f"{mode.name}: {', '.join(f'{name} {shares.all:.0%}' for name, shares in accuracy.items())}")
    return found


def from_nothing(mode: Mode, output: Path) -> list[Measured]:
    """A row, and one for videos that go on from a first frame."""
    folder = output / "table" / mode.folder
    folder.mkdir(parents=True, exist_ok=True)
    clips = f'path = "{output.as_posix()}/clips"'
    changes = {
        "../../demo-output/world/run": (folder / "run").as_posix(),
        **demo.moved(output),
        "at_start = true": "at_start = false",
        **mode.length.changes,
        f'every = "{mode.length.every} steps"': f'every = "{mode.length.steps} steps"',
        **({clips: clips.replace("/clips", f"/{mode.clips}")} if mode.clips else {}),
        **mode.changes,
    }
    config = demo.write_config(demo.HERE / "world.toml", folder / "world.toml", changes)
    trained = crepa_world.train(config, "CREPA") if mode.crepa else run(config)
    plan = planned(config)
    model = evaluate.denoiser(plan, trained)
    rows = []
    for name, first_frames in ((mode.name, False), (f"{mode.name}, from a first frame", True)):
        if first_frames and not mode.continued:
            continue
        judged = folder / ("judged-continued" if first_frames else "judged")
        found = evaluate.answers(plan, model, evaluate.fixed(64), judged, first_frames=first_frames)
        rows.append(measured(replace(mode, name=name), config, {"all prompts": evaluate.accuracy(found)}))
    return rows


def spoil(output: Path) -> None:
    """The world's clips with noise in a random corner, and masks that are black there, unless they are there."""
    folder, random = output / "spoilt", np.random.default_rng(0)
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    count = len(list((output / "clips").glob("*.txt")))
    if len(list(folder.glob("*.txt"))) >= count:
        return
    for number, (words, frames) in enumerate(world.clips(count, seed=0)):
        right, bottom = random.choice((False, True), 2)
        mask = np.full((world.SIZE, world.SIZE), 255, np.uint8)
        corner(mask, BLACK, right, bottom)[...] = 0
        place = corner(frames.transpose(1, 2, 0, 3), PATCH, right, bottom)
        place[...] = random.integers(0, 256, place.shape)
        Image.fromarray(mask).save(folder / "masks" / f"{number:05}.png")
        world.write_mp4(folder / f"{number:05}.mp4", frames)
        (folder / f"{number:05}.txt").write_text(words.caption + "\n", encoding="utf-8")


def corner(picture: np.ndarray, side: int, right: bool, bottom: bool) -> np.ndarray:
    """A view of a square in a corner of (H, W, ...)."""
    last, first = slice(-side, None), slice(side)
    return picture[last if bottom else first, last if right else first]


def new_word(mode: Mode, output: Path) -> Measured:
    folder = output / "table" / mode.folder
    folder.mkdir(parents=True, exist_ok=True)
    changes = {
        "../../demo-output/world/lora/run": (folder / "run").as_posix(),
        **demo.moved(output),
        "at_start = true": "at_start = false",
        **mode.changes,
    }
    config = demo.write_config(lora.SOURCE, folder / "lora.toml", changes)
    adapter = run(config)
    return measured(mode, config, lora.judged(planned(config), adapter, folder / "judged"))


def table(found: list[Measured]) -> str:
    """Rows of one task."""
    kinds = list(found[0].accuracy)
    heads = (
        "mode",
        *(f"{kind}, all right" for kind in kinds),
        "colour / shape / direction",
        "loss",
        "s/step",
        "peak MiB",
    )
    rows = []
    for each in found:
        first = each.accuracy[kinds[0]]
        words = f"{first.colour:.0%} / {first.shape:.0%} / {first.direction:.0%}"
        shares = (f"{each.accuracy[kind].all:.1%} of {each.accuracy[kind].prompts}" for kind in kinds)
        rows.append((each.mode, *shares, words, f"{each.loss:.3f}", f"{each.seconds:.3f}", f"{each.memory:.0f}"))
    return report.table(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="The tiny world in every training mode.")
    parser.add_argument("--output", type=Path, default=demo.OUTPUT, help="demo.py's output folder, used and kept")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--wan", action="store_true", help=f"only Wan 2.1, {WAN.length.steps} steps")
    chosen = parser.parse_args()
    output = chosen.output.resolve()
    if chosen.wan:
        demo.make_inputs(output, demo.CLIPS)
        checkpoint.build_wan(output / "wan-checkpoint")
        found = from_nothing(WAN, output)
        publish(chosen, "wan-world", f"{measured_on()}\n\n{found[0].steps} steps:\n\n{table(found)}\n", found)
        return
    subprocess.run([sys.executable, str(demo.HERE / "demo.py"), "--output", str(output)], check=True)
    trained = evaluate.newest(planned(output / "world.toml").config.run.output_dir)
    lora.prepare(output, trained, output / "lora")
    spoil(output)
    full = [row for mode in (*FROM_NOTHING, *ASKED) for row in from_nothing(mode, output)]
    adapters = [new_word(mode, output) for mode in NEW_WORD]
    text = (
        f"{measured_on()}\n\n"
        f"From random weights, {full[0].steps} steps, 64 prompts:\n\n{table(full)}\n\n"
        f"A new word, {adapters[0].steps} steps on {lora.CLIPS} clips:\n\n{table(adapters)}\n"
    )
    publish(chosen, "world", text, [*full, *adapters])


def measured_on() -> str:
    machine = "; ".join(f"{name} {value}" for name, value in report.machine().items())
    return f"Measured on {datetime.now(UTC):%Y-%m-%d}: {machine}."


def publish(chosen: argparse.Namespace, mark: str, text: str, found: list[Measured]) -> None:
    """Print, write as JSON and into the page, where that is asked for."""
    report.say(text)
    rows = [{**vars(each), "accuracy": {k: vars(v) for k, v in each.accuracy.items()}} for each in found]
    report.write_json(chosen.json, {mark: rows})
    if chosen.write:
        put(PAGE, mark, text)


if __name__ == "__main__":
    main()
