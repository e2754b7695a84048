"""What a run of the tiny world has learnt: videos of fixed prompts, made by vtrain's own validation, read by the judge.

    python examples/world/evaluate.py CONFIG [--checkpoint FOLDER] [--prompts 64] [--json FILE]

The prompts are the 32 combinations of known words, 8 of which no training clip shows, each from one starting noise per 32 prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import judge
import numpy as np
import torch
import world

from vtrain.contract import Denoiser, Device
from vtrain.data.caching.caches import Caches, fill_caches
from vtrain.data.caching.pictures import Given
from vtrain.plan.records import Plan, ValidationPlan
from vtrain.run.prepare import planned
from vtrain.train.model import load_model, weights_piece
from vtrain.train.resume import RunState, Start, read_state
from vtrain.validate.generate import Validator, to_frames

SEEDS = range(7001, 8000)
"""Of the starting noise, one for each 32 prompts; not the run's own validation seed."""
TOGETHER = 16
"""Prompts in one batch."""
Asked = tuple[int, world.Words]
"""A seed of the starting noise, and what is asked for."""
CHANCE = {"colour": 1 / 4, "shape": 1 / 2, "direction": 1 / 4, "all": 1 / 32}
"""Of naming a known word blindly."""


@dataclass(frozen=True)
class Answer:
    """One prompt, what the judge read, and whether it is right per attribute and in all."""

    prompt: str
    seed: int
    held_out: bool
    read: judge.Verdict
    hits: Mapping[str, bool]


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers."""

    prompts: int
    colour: float
    shape: float
    direction: float
    all: float


def fixed(prompts: int) -> list[Asked]:
    """The first of the fixed questions: all combinations of known words from one starting noise, then from the next."""
    return [(seed, words) for seed in SEEDS[: math.ceil(prompts / 32)] for words in world.combinations()][:prompts]


def denoiser(plan: Plan, checkpoint: Path | None) -> Denoiser:
    """The model as a run has it at a checkpoint, with its adapter under LoRA. None: as the run starts."""
    state = read_state(checkpoint) if checkpoint else RunState(0, 0, {}, "", "")
    model, *_ = load_model(plan, Start(checkpoint, state, ()), "cpu")
    if checkpoint is not None:
        weights_piece(plan, model).load(checkpoint)  # an adapter's: all others are there
    return model


def answers(
    plan: Plan, model: Denoiser, asked: Sequence[Asked], folder: Path, *, first_frames: bool = False
) -> list[Answer]:
    """Generate what is asked for into `folder`, and judge it. first_frames: each starts from a true clip's first frame."""
    found = []
    for seed, group in groupby(asked, key=lambda each: each[0]):
        questions = {words.caption.replace(" ", "-"): words for _, words in group}
        made = validator(plan, model, {name: words.caption for name, words in questions.items()}, seed)
        if first_frames:
            made = replace(made, pictures=pictures(plan, questions, seed))
        files = made.videos(folder / f"seed-{seed}", list(questions), TOGETHER)
        for name, words in questions.items():
            read = judge.judge(judge.read(files[name]))
            found.append(Answer(words.caption, seed, world.held_out(words), read, read.hits(words)))
    return found


def pictures(plan: Plan, questions: Mapping[str, world.Words], seed: int) -> Mapping[str, Given]:
    """name -> the first frame, clean, of a clip that is drawn again."""
    random = np.random.default_rng(seed)
    with plan.family.open_video_codec("cpu") as codec:
        return {name: Given(codec.encode(first_frame(words, random)).mean) for name, words in questions.items()}


def first_frame(words: world.Words, random: np.random.Generator) -> torch.Tensor:
    """(1, 3, 1, SIZE, SIZE) in [-1, 1]."""
    drawn = torch.from_numpy(world.draw(world.stage(words, random))[0])
    return (drawn.float() / 127.5 - 1).permute(2, 0, 1)[None, :, None]


def frames(plan: Plan, model: Denoiser, caption: str, seed: int) -> np.ndarray:
    """One video as it leaves the model, uint8 (F, H, W, 3): no compression in between."""
    made = validator(plan, model, {"one": caption}, seed)
    with plan.family.open_video_codec("cpu") as codec, torch.no_grad():
        return to_frames(codec.decode(made.latents(caption))[0]).numpy()


def validator(plan: Plan, model: Denoiser, prompts: Mapping[str, str], seed: int) -> Validator:
    """The run's own validation with other prompts, its text cached."""
    table = validation(plan, prompts, seed)
    fill_caches(plan, (), [(caption, role) for _, caption, role in table.texts], "cpu", lambda _: None)
    model.module.eval()
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=plan.config.precision.mixed == "bf16")
    caches, device = Caches.open(plan), Device()
    return Validator(table, plan.family, plan.sampler, caches, model, device, autocast, lambda: False)


def validation(plan: Plan, prompts: Mapping[str, str], seed: int) -> ValidationPlan:
    """The plan's validation with other prompts."""
    if plan.validation is None:
        raise SystemExit("the configuration has no [validation]: size, guidance and steps are taken from there")
    return replace(plan.validation, prompts=prompts, seed=seed)


def accuracy(found: list[Answer]) -> Accuracy:
    shares = {name: sum(answer.hits[name] for answer in found) / len(found) for name in CHANCE}
    return Accuracy(len(found), **shares)


def by_chance(hits: int, prompts: int, chance: float) -> float:
    """Probability of at least that many hits by blind guessing (binomial)."""
    return math.fsum(
        math.comb(prompts, n) * chance**n * (1 - chance) ** (prompts - n) for n in range(hits, prompts + 1)
    )


def report(found: list[Answer]) -> dict[str, object]:
    """As JSON: accuracy over all prompts, the trained combinations, the held-out ones; p by chance; every answer."""
    groups = {
        "everything": found,
        "trained combinations": [answer for answer in found if not answer.held_out],
        "held-out combinations": [answer for answer in found if answer.held_out],
    }
    whole = accuracy(found)
    chances = {
        name: by_chance(round(getattr(whole, name) * len(found)), len(found), chance) for name, chance in CHANCE.items()
    }
    return {
        **{name: asdict(accuracy(group)) for name, group in groups.items() if group},
        "probability by chance": chances,
        "answers": [asdict(answer) for answer in found],
    }


def table(found: list[Answer]) -> str:
    lines = [f"{'':24}{'prompts':>8}{'colour':>9}{'shape':>9}{'direction':>11}{'all three':>11}"]
    for name, row in report(found).items():
        if isinstance(row, dict) and "prompts" in row:
            shares = "".join(f"{row[key]:>{width}.1%}" for key, width in zip(CHANCE, (9, 9, 11, 11), strict=True))
            lines.append(f"{name:24}{row['prompts']:>8}{shares}")
    return "\n".join(lines)


def newest(run: Path) -> Path:
    folders = sorted((run / "checkpoints").glob("step-*[0-9]"))
    if not folders:
        raise SystemExit(f"{run} has no checkpoint yet")
    return folders[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge a run of the tiny world.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="folder of a checkpoint (default: the newest of the run)")
    parser.add_argument("--prompts", type=int, default=64, help="how many, best a multiple of 32 (default: 64)")
    parser.add_argument("--json", type=Path, help="write every answer there")
    parser.add_argument("--videos", type=Path, help="keep the videos in this folder")
    chosen = parser.parse_args()
    plan = planned(chosen.config)
    checkpoint = chosen.checkpoint or newest(plan.config.run.output_dir)
    with tempfile.TemporaryDirectory() as scratch:
        model = denoiser(plan, checkpoint)
        found = answers(plan, model, fixed(chosen.prompts), chosen.videos or Path(scratch))
    print(f"{checkpoint}\n{table(found)}")
    if chosen.json:
        chosen.json.write_text(json.dumps(report(found), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
