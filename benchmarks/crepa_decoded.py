"""What CREPA's online teacher sees of decoded latents, against the source's own frames: likeness of their features.

    PYTHONPATH=examples/world python benchmarks/crepa_decoded.py [--clips N] [--json FILE]

Clips of the tiny world, its trained VAE, EfficientNet-Lite0 (efficientnet.py) as the encoder, one feature for each token.
Likeness is the cosine of two features at one token, its mean over tokens, frames and clips. Beside it, for scale: that of
neighbouring frames of tokens of one clip, and that of two clips' frames.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

import crepa_world
import demo
import numpy as np
import report
import torch
import world
from torch import Tensor
from torch.nn import functional as F

from vtrain.contract import Condition, LatentShape, NoiseLevel, Text
from vtrain.plan.datasets import token_frames
from vtrain.plan.records import Plan
from vtrain.train.step import StepInput, Teacher


@dataclass(frozen=True)
class Likeness:
    """Mean cosines, and that below which one token in a hundred lies. neighbours, others: of source frames, for scale."""

    clips: int
    decoded: float
    lowest: float
    neighbours: float
    others: float


def measure(plan: Plan, clips: int) -> Likeness:
    """Of clips that no run trains on."""
    random = np.random.default_rng(crepa_world.UNSEEN_SEED)
    videos = [world.draw(world.stage(words, random)) for words in islice(cycle(world.combinations()), clips)]
    latents = crepa_world.encoded(plan, videos)
    pixels = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3)
    ((_, part),) = plan.regularizers
    assert isinstance(part, crepa_world.Crepa)
    family = plan.family
    with part.open_feature_encoder("cpu") as encoder, family.open_video_codec("cpu") as codec:
        grid = family.token_grid(LatentShape(*latents.shape[1:]))  # type: ignore[attr-defined]
        frames = pixels[:, :, list(token_frames(family, latents.shape[2], grid))]
        source = Teacher(family, encoder, None)(given(latents, frames)).float()
        decoded = Teacher(family, encoder, codec)(given(latents, frames)).float()
    cosines = F.cosine_similarity(source, decoded, dim=-1).flatten()
    return Likeness(
        clips,
        float(cosines.mean()),
        float(cosines.quantile(0.01)),
        float(F.cosine_similarity(source[:, 1:], source[:, :-1], dim=-1).mean()),
        float(F.cosine_similarity(source, source.roll(1, 0), dim=-1).mean()),
    )


def given(latents: Tensor, frames: Tensor) -> StepInput:
    """What a step gives a teacher."""
    nothing = torch.zeros(len(latents))
    condition = Condition(Text.of(torch.zeros(len(latents), 1, 1), torch.ones(len(latents), 1, dtype=torch.bool)))
    return StepInput(latents, latents, NoiseLevel(nothing, nothing), condition, 0, frames=frames)


def main() -> None:
    parser = argparse.ArgumentParser(description="Features of decoded latents against those of the source's frames.")
    parser.add_argument("--clips", type=int, default=crepa_world.UNSEEN, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        demo.make_inputs(output, 8)
        config = crepa_world.config_of(output, crepa_world.ARMS[1], 1, 2, "")
        found = measure(crepa_world.plan_of(config, crepa_world.ARMS[1], '{"precision": "fp32"}'), chosen.clips)
    report.say(", ".join(f"{name} {value}" for name, value in report.machine().items()))
    rows = [
        ("decoded latents and source, same frame", f"{found.decoded:.4f} (1% of tokens below {found.lowest:.4f})"),
        ("source, neighbouring frames of tokens", f"{found.neighbours:.4f}"),
        ("source, another clip", f"{found.others:.4f}"),
    ]
    report.say(report.table((f"features of {found.clips} clips", "mean cosine"), rows))
    report.write_json(chosen.json, {"likeness": [asdict(found)]})


if __name__ == "__main__":
    main()
