"""Every feature of a run with every other: which pairs a plan refuses, and runs that cover all the others.

    python tests/train/pairs.py            the refused pairs; exit code 1 if docs/combinations.md says otherwise
    python tests/train/pairs.py --write    put them there

A feature is a choice of one axis; what an axis does not say is its first choice, a plain LoRA run of a tiny SANA-Video.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from PIL import Image

from vtrain.config import load
from vtrain.contract import Catalog, ConfigError
from vtrain.plan.make import make_plan
from vtrain.registry import discover
from vtrain_sanavideo import tiny

PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"
BEGIN, END = "<!-- measured: pairs -->\n", "<!-- end -->"
LAYERSYNC = {"use": "layersync", "student": 0, "teacher": 1}
VALIDATION = {
    "every": "2 steps", "prompts": {"one": "a box"}, "steps": 2, "size": "64x64", "frames": 9, "fps": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """sets: dotted key -> value. needs: axis -> choice that it goes with where a combination leaves that axis open."""

    sets: Mapping[str, object] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)


AXES: Mapping[str, Mapping[str, Choice]] = {
    "trained": {
        "LoRA on bf16": Choice(),
        "LoRA on fp32": Choice({"precision.base": "fp32"}),
        "LoRA on int8": Choice({"precision.base": "int8"}),
        "LoRA on fp8": Choice({"precision.base": "fp8"}),
        "LoRA on int4": Choice({"precision.base": "int4"}),
        "DoRA on bf16": Choice({"model.lora.dora": True}),
        "rsLoRA with dropout": Choice({"model.lora.rslora": True, "model.lora.dropout": 0.1}),
        "full, fp32": Choice({"model.train": "full"}),
        "full, bf16": Choice({"model.train": "full", "precision.base": "bf16"}, {"optimizer": "adamw_bf16"}),
    },
    "mixed precision": {"none": Choice(), "bf16": Choice({"precision.mixed": "bf16"})},
    "checkpointing": {
        "no": Choice(),
        "blocks": Choice({"precision.gradient_checkpointing": True}),
        "every 2nd block": Choice(
            {"precision.gradient_checkpointing": True, "precision.gradient_checkpointing_interval": 2}
        ),
        "feed-forward": Choice({"precision.gradient_checkpointing": "feed_forward"}),
    },
    "offload": {
        "none": Choice(),
        "groups of blocks": Choice({"offload.group": "block"}, {"checkpointing": "blocks"}),
        "leaves": Choice({"offload.group": "leaf"}, {"checkpointing": "blocks"}),
        "model_cpu": Choice({"offload.model_cpu": True}),
        "optimizer": Choice({"offload.optimizer": True}),
    },
    "memory": {"no limit": Choice(), "a limit": Choice({"memory": {"limit": "16 GiB"}})},
    "optimizer": {
        "adamw": Choice(),
        "adamw_bf16": Choice({"optimizer.use": "adamw_bf16"}, {"trained": "full, bf16"}),
        "muon": Choice({"optimizer.use": "muon"}),
        "prodigy": Choice({"optimizer.use": "prodigy", "optimizer.lr": 1.0}),
        "schedule-free": Choice({"optimizer.use": "schedulefree-adamw"}),
    },
    "average": {
        "none": Choice(),
        "ema": Choice({"ema": {"decay": 0.9, "validation": "both"}}),
        "ema on the CPU": Choice({"ema": {"decay": 0.9, "on": "cpu", "update_every": 2}}),
    },
    "rollout": {"none": Choice(), "half": Choice({"train.rollout": {"probability": 0.5}})},
    "learning rate": {
        "constant": Choice(),
        "cosine": Choice({"lr_schedule.use": "cosine", "lr_schedule.warmup": "1 steps"}),
    },
    "batch": {"2": Choice(), "1, accumulated": Choice({"train.batch_size": 1, "train.accumulate": 2})},
    "clipping": {
        "none": Choice(),
        "norm": Choice({"train.gradient_clip": {"method": "norm", "max": 1.0}}),
        "value": Choice({"train.gradient_clip": {"method": "value", "max": 0.1}}),
    },
    "statistics": {"none": Choice(), "of each block": Choice({"train.statistics": True})},
    "not finite": {"ends the run": Choice(), "skipped": Choice({"train.skip_nonfinite": 2})},
    "regularizer": {"none": Choice(), "layersync": Choice({"regularizer": [LAYERSYNC]})},
    "latents": {"mode": Choice(), "sample": Choice({"cache.latents": "sample"})},
    "data": {
        "clips": Choice(),
        "masks": Choice({"data.0.masks": {"folder": "masks"}}),
        "image-to-video": Choice({"data.0.video.image_to_video": 0.5}),
    },
    "validation": {"none": Choice(), "videos": Choice({"validation": VALIDATION})},
}
"""Axis -> its choices. The first of each sets nothing."""
Combination = Mapping[str, str]
"""Axis -> choice, of some of the axes."""


def plain(folder: Path) -> dict[str, object]:
    """The configuration with every first choice. folder: has `model` and `clips`."""
    return {
        "run": {"output_dir": "out", "seed": 3},
        "model": {"use": "sanavideo", "path": "model", "train": "lora", "text_precision": "fp32"},
        "precision": {"mixed": "no", "gradient_checkpointing": False},
        "data": [{"use": "folder", "path": "clips", "resolution": ["64x64"], "video": {"frames": 9, "fps": 8}}],
        "cache": {"dir": str(folder / "cache")},
        "train": {"steps": 3, "batch_size": 2, "log_every": 1},
        "optimizer": {"use": "adamw", "lr": 1e-4},
        "lr_schedule": {"use": "constant"},
    }


def text(folder: Path, combination: Combination) -> str:
    """The configuration of a combination, its other axes as they need to be, or at their first choice."""
    needed = {axis: choice for each in combination.items() for axis, choice in _choice(*each).needs.items()}
    content = plain(folder)
    for axis, choice in {**needed, **combination}.items():
        for key, value in _choice(axis, choice).sets.items():
            _set(content, key.split("."), value)
    return tomli_w.dumps(content)


def _choice(axis: str, choice: str) -> Choice:
    return AXES[axis][choice]


def _set(content: Any, path: list[str], value: object) -> None:
    *parents, last = path
    for name in parents:
        content = content[int(name)] if isinstance(content, list) else content.setdefault(name, {})
    content[last] = value


def planned(folder: Path, combination: Combination, catalog: Catalog) -> str:
    """Plan it; why it is refused, "" if it is not."""
    file = folder / "config.toml"
    file.write_text(text(folder, combination), encoding="utf-8")
    try:
        make_plan(load(file, catalog), catalog=catalog)
    except ConfigError as error:
        return " ".join(f"{problem.what} {problem.remedy}".strip() for problem in error.problems)
    return ""


Pair = tuple[tuple[str, str], tuple[str, str]]
Link = frozenset[tuple[str, str]]
"""A pair, in no order."""


def pairs() -> Iterator[Pair]:
    """Every choice with every other of another axis."""
    for one, other in combinations(AXES, 2):
        yield from (((one, first), (other, second)) for first in AXES[one] for second in AXES[other])


def refused(folder: Path) -> dict[Pair, str]:
    """The pairs that a plan refuses, and why."""
    catalog = discover()
    found = {pair: planned(folder, dict(pair), catalog) for pair in pairs()}
    return {pair: why for pair, why in found.items() if why}


def covering(forbidden: Collection[Pair]) -> list[Combination]:
    """Few combinations of all axes in which each pair that is not forbidden stands in one at least.

    Greedy: each begins with a pair that none has yet, and takes for every other axis the choice with most pairs that none has.
    """
    bad = {frozenset(pair) for pair in forbidden}
    left = [pair for pair in pairs() if frozenset(pair) not in bad]
    rows: list[Combination] = []
    while left:
        new = {frozenset(pair) for pair in left}
        row = completed(dict(left[0]), bad, new)
        assert row is not None, f"no combination of all axes has {left[0]}"
        rows.append({axis: row[axis] for axis in AXES})
        left = [pair for pair in left if not set(pair) <= row.items()]
    return rows


def completed(row: dict[str, str], bad: Collection[Link], new: Collection[Link]) -> dict[str, str] | None:
    """A choice for every axis that the row leaves open, no two of them bad; None where there is none."""
    axis = next((axis for axis in AXES if axis not in row), None)
    if axis is None:
        return row
    links = {choice: [frozenset({(axis, choice), each}) for each in row.items()] for choice in AXES[axis]}
    ordered = sorted(links, key=lambda choice: -sum(link in new for link in links[choice]))
    for choice in ordered:
        if not any(link in bad for link in links[choice]):
            found = completed({**row, axis: choice}, bad, new)
            if found is not None:
                return found
    return None


def lay_out(folder: Path, clips: Path) -> Path:
    """Below `folder`: a model of random weights, the clips, and a mask for each. Gives `folder`."""
    tiny.build(folder / "model")
    shutil.copytree(clips, folder / "clips")
    masks = folder / "clips" / "masks"
    masks.mkdir()
    for clip in sorted((folder / "clips").glob("*.mp4")):
        mask = np.zeros((64, 64), np.uint8)
        mask[:, :32] = 255
        Image.fromarray(mask).save(masks / f"{clip.stem}.png")
    return folder


def table(found: Mapping[Pair, str]) -> str:
    """Of the refused pairs, those with the same reason in one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for (one, other), why in found.items():
        rows.setdefault((": ".join(one), why), []).append(": ".join(other))
    lines = [f"| {one} | {'; '.join(others)} | {why} |" for (one, why), others in rows.items()]
    return "\n".join(["| with | refused | what the plan says |", "|---|---|---|", *lines])


def choices_table() -> str:
    """Axes and what each offers."""
    return "\n".join(["| | |", "|---|---|", *(f"| {axis} | {'; '.join(some)} |" for axis, some in AXES.items())])


def told(found: Mapping[Pair, str]) -> str:
    """What the page says."""
    runs = len(covering(found))
    amounts = f"{len(list(pairs()))} pairs, {len(found)} of them refused; {runs} runs of three steps have every other pair in them."
    return f"{choices_table()}\n\n{amounts}\n\n{table(found)}\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        found = refused(lay_out(Path(name), Path(__file__).parents[2] / "examples" / "clips"))
    if "--write" in sys.argv[1:]:
        page = PAGE.read_text(encoding="utf-8")
        start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
        PAGE.write_text(page[:start] + told(found) + page[end:], encoding="utf-8")
    else:
        sys.stdout.write(told(found))
        sys.exit(0 if told(found) in PAGE.read_text(encoding="utf-8") else 1)


if __name__ == "__main__":
    main()
