"""Training on a card: killed and resumed to the last bit, in every mode that changes what is on the card."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., str]
Record = Callable[[str, object], None]
STEPS, SAVED = 60, 20
CREPA = '\n[[regularizer]]\nuse = "crepa"\nblock = 3\nencoder = "{encoder}"\n{more}\n'
VALIDATION = """
[validation]
every = "6 steps"
size = "64x64"
frames = 9
fps = 8
steps = 4
guidance = 3.0
prompts = { one = "a red circle moves left", two = "a blue square moves up" }
"""


def same(world: Any, whole: str, resumed: str, step: int) -> None:
    """Metrics and every tensor of the last checkpoint, bit for bit."""
    assert world.numbers(resumed) == world.numbers(whole)
    ours, theirs = world.tensors(resumed, step), world.tensors(whole, step)
    assert ours.keys() == theirs.keys()
    assert ours
    different = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert different == []


def test_a_run_that_is_killed_and_resumed_is_the_same_run_bit_for_bit(
    world: Any, run: Run, child: Callable[..., subprocess.Popen[str]], record_property: Record
) -> None:
    run(world.config("whole", steps=STEPS, every=SAVED, log_every=1))
    killed = world.config("killed", steps=STEPS, every=SAVED, log_every=1)
    process = child("run", killed)
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(rf"step {SAVED + 7}/", line):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = child("run", killed)
    printed, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, printed
    same(world, "whole", "killed", STEPS)
    losses = [row["loss"] for row in world.rows("whole")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), "it learns"
    seconds = sorted(row["seconds"] for row in world.rows("whole"))
    record_property("median seconds a step", seconds[len(seconds) // 2])
    record_property("first and last loss", [losses[0], losses[-1]])


MODES: dict[str, tuple[dict[str, object], str]] = {
    "lora": ({"train": "lora"}, "\n[model.lora]\nrank = 8\ndropout = 0.1\n"),
    "image-to-video": ({"image_to_video": 0.5}, ""),
    "crepa from the cache": ({}, CREPA.replace("{more}", "")),
    "crepa from decoded latents": ({}, CREPA.replace("{more}", 'teacher = "online"\ndrop_vae_encoder = true')),
    "gradient checkpointing": ({"checkpointing": "true"}, ""),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_stopped_and_resumed_is_the_same_run_bit_for_bit(world: Any, run: Run, mode: str) -> None:
    values, more = MODES[mode]
    more, name = more.replace("{encoder}", str(world.folder / "dino")), mode.replace(" ", "-")
    run(world.config(f"{name}-whole", more, **values))
    run(world.config(f"{name}-halved", more, **values, steps=6))
    run(world.config(f"{name}-halved", more, **values))
    same(world, f"{name}-whole", f"{name}-halved", 12)
    assert all(0 < row["loss"] < 20 for row in world.rows(f"{name}-whole"))
    if "crepa" in mode:
        assert any(key.startswith("crepa/") for key in world.rows(f"{name}-whole")[0]["terms"])


def test_gradient_checkpointing_gives_the_same_loss(world: Any, run: Run, record_property: Record) -> None:
    """The first loss comes from the same kernels; later ones also from recomputed activations, in the same types."""
    found = []
    for checkpointing in ("false", "true"):
        run(world.config(f"checkpointing-{checkpointing}", checkpointing=checkpointing))
        found.append([row["loss"] for row in world.rows(f"checkpointing-{checkpointing}")])
    kept, again = found
    assert again[0] == kept[0]
    apart = max(abs(a - b) / b for a, b in zip(again, kept, strict=True))
    record_property("largest relative difference of a loss", apart)
    assert apart < 1e-3


def test_what_is_not_asked_to_be_deterministic_trains_as_well(world: Any, run: Run, record_property: Record) -> None:
    """Whether it then is the same to the last bit is this card's affair: it is noted, not asked for."""
    torch.use_deterministic_algorithms(False)
    for name in ("free-one", "free-two"):
        run(world.config(name, deterministic="false"))
    one, two = (world.numbers(name) for name in ("free-one", "free-two"))
    record_property("bit for bit all the same", one == two)
    apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(one, two, strict=True))
    record_property("largest relative difference of a loss", apart)
    assert apart < 1e-2


def test_memory_is_back_at_its_level_after_validation(world: Any, run: Run, card: Any, record_property: Record) -> None:
    """A row's memory is the peak since training went on: text encoder or video codec left behind would be in it."""
    run(world.config("validated", VALIDATION, steps=18))
    peaks = {row["step"]: row["memory"] for row in world.rows("validated")}
    record_property("peak MiB by step", {step: peaks[step] / 2**20 for step in (6, 12, 18)})
    assert abs(peaks[12] - peaks[6]) < 1 << 20
    assert abs(peaks[18] - peaks[6]) < 1 << 20
    assert (Path(world.folder) / "validated" / "samples" / "step-000012" / "two.mp4").stat().st_size > 500
