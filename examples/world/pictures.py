"""Pictures of a run of the tiny world: a grid of prompts x steps, still and moving, and curves of loss and accuracy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import judge
import matplotlib
import numpy as np
import torch
from evaluate import CHANCE, Accuracy

from vtrain.validate.videos import Strip, write_mp4, write_sheet

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MOMENTS = (0, 4, 8)
"""Frames of each video in the still grid."""
GAP = 4
"""Pixels between videos of the moving grid."""
ENLARGED = 2


def samples(run: Path) -> dict[int, dict[str, np.ndarray]]:
    """step -> nickname -> frames, of all validations."""
    found: dict[int, dict[str, np.ndarray]] = {}
    for folder in sorted((run / "samples").glob("step-*")):
        videos = {path.stem: judge.read(path) for path in sorted(folder.glob("*.mp4"))}
        if videos:
            found[int(folder.name.removeprefix("step-"))] = videos
    return found


def draw_grid(steps: Mapping[int, Mapping[str, np.ndarray]], prompts: Mapping[str, str], file: Path) -> None:
    """A row for each prompt; in it, for each step, the first, the middle and the last frame."""
    notes = [note for step in steps for note in (f"step {step}", *[""] * (len(MOMENTS) - 1))]
    strips = []
    for name, prompt in prompts.items():
        frames = np.concatenate([videos[name][list(MOMENTS)] for videos in steps.values()])
        large = frames.repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)
        strips.append(Strip(prompt + (" (never trained)" if name.startswith("new-") else ""), large, notes))
    write_sheet(file, (), strips, len(notes))


def write_moving_grid(
    steps: Mapping[int, Mapping[str, np.ndarray]], prompts: Mapping[str, str], fps: float, file: Path
) -> None:
    """The same grid with its videos playing, twice as large and without words."""
    rows = [np.concatenate([_framed(videos[name]) for videos in steps.values()], axis=2) for name in prompts]
    moving = np.concatenate(rows, axis=1).repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)
    write_mp4(file, torch.from_numpy(np.concatenate([moving] * 3)), fps)


def _framed(video: np.ndarray) -> np.ndarray:
    return np.pad(video, ((0, 0), (0, GAP // 2), (0, GAP // 2), (0, 0)), constant_values=255)


def draw_curves(metrics: Path, accuracies: Mapping[int, Accuracy], file: Path) -> None:
    """Loss above, accuracy per attribute below, with what blind guessing would reach."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps, losses = [row["step"] for row in rows], np.array([row["loss"] for row in rows])
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 7), layout="constrained")
    above.plot(steps, losses, color="0.85", linewidth=0.8, label="each step")
    width = min(50, len(losses))
    above.plot(steps[width - 1 :], np.convolve(losses, np.ones(width) / width, "valid"), label=f"mean of {width} steps")
    above.set_yscale("log")
    above.set_ylabel("loss")
    above.legend()
    for name, chance in CHANCE.items():
        shares = [getattr(accuracy, name) for accuracy in accuracies.values()]
        line = below.plot(list(accuracies), shares, marker="o", linewidth=3 if name == "all" else 1.5, label=name)
        below.axhline(chance, color=line[0].get_color(), linestyle=":", linewidth=0.8)
    below.set_ylim(-0.02, 1.02)
    below.set_ylabel("right words (dotted: blind guessing)")
    below.set_xlabel("optimizer step")
    below.legend(loc="lower right")
    figure.savefig(file, dpi=120)
    plt.close(figure)
