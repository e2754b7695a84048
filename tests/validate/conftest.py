"""A tiny SANA-Video checkpoint and a run's parts on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vtrain.config import load
from vtrain.plan.make import make_plan
from vtrain.plan.records import Plan
from vtrain.registry import discover
from vtrain.validate.generate import to_frames

CLIPS = Path(__file__).parents[2] / "examples" / "clips"
CONFIG = """
[run]
output_dir = "out"
[model]
use = "sanavideo"
path = "{model}"
train = "{train}"
text_precision = "fp32"
[precision]
base = "fp32"
mixed = "no"
[[data]]
use = "folder"
path = "{clips}"
resolution = ["64x32"]
[data.video]
frames = 5
fps = 8
[train]
steps = {steps}
log_every = 1
[optimizer]
use = "adamw"
lr = 1e-3
[validation]
every = "100 steps"
size = "{size}"
frames = 5
steps = 6
guidance = 5.0
seed = 11
negative_prompt = "Blurry, worst quality"
prompts = {{ rabbit = "A big grey Rabbit in a meadow" }}
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vtrain_sanavideo.tiny import build

    return build(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def write_config(tmp_path: Path, tiny: Path) -> Callable[..., Path]:
    """Write config.toml into tmp_path."""

    def write(size: str = "64x32", train: str = "full", steps: int = 2) -> Path:
        text = CONFIG.format(model=tiny.as_posix(), clips=CLIPS.as_posix(), size=size, train=train, steps=steps)
        file = tmp_path / "config.toml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def tiny_720p(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vtrain_sanavideo.tiny import build

    return build(tmp_path_factory.mktemp("model") / "tiny-720p", resolution="720p")


@pytest.fixture
def write_720p(write_config: Callable[..., Path], tiny: Path, tiny_720p: Path) -> Callable[..., Path]:
    """The same on the tiny 720p checkpoint, at sizes and lengths that it takes. more: texts to replace."""

    def write(more: tuple[tuple[str, str], ...] = (), **settings: Any) -> Path:
        file = write_config(size="96x64", **settings)
        text = file.read_text(encoding="utf-8")
        swaps = (
            (tiny.as_posix(), tiny_720p.as_posix()),
            ('["64x32"]', '["96x64"]'),
            ("frames = 5", "frames = 9"),
            *more,
        )
        for old, new in swaps:
            assert old in text
            text = text.replace(old, new)
        file.write_text(text, encoding="utf-8")
        return file

    return write


@pytest.fixture
def plan(write_config: Callable[..., Path]) -> Plan:
    return make_plan(load(write_config(), discover()))


@pytest.fixture
def decoded() -> Callable[[Plan, torch.Tensor], torch.Tensor]:
    """Latents as a plan's codec shows them: frames of whole numbers."""

    def decode(plan: Plan, latents: torch.Tensor) -> torch.Tensor:
        with plan.family.open_video_codec("cpu") as codec, torch.no_grad():
            return to_frames(codec.decode(latents)[0]).int()

    return decode


@pytest.fixture
def generated() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """What a pipeline of diffusers, which knows nothing of ours, makes of a plan's rabbit: latents, and frames of whole
    numbers. more: what the pipeline takes beside."""

    def generate(pipeline: Any, plan: Plan, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made = plan.validation
        assert made is not None
        pipeline.set_progress_bar_config(disable=True)
        settings = {
            "prompt": made.prompts["rabbit"] + " motion score: 30.",
            "negative_prompt": made.negative_prompt,
            "height": made.shape.height,
            "width": made.shape.width,
            "frames": made.shape.frames,
            "num_inference_steps": made.steps,
            "guidance_scale": made.guidance,
            "use_resolution_binning": False,
        }
        latents, video = (
            pipeline(**settings, **more, generator=torch.Generator().manual_seed(made.seed), output_type=form).frames
            for form in ("latent", "np")
        )
        return latents, torch.from_numpy(video[0] * 255).round().int()

    return generate
