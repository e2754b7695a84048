"""The tiny world's checkpoint: complete, real, and with text that tells the words apart."""

from __future__ import annotations

import hashlib
from contextlib import closing
from inspect import signature
from itertools import combinations
from pathlib import Path
from types import ModuleType

import torch
from diffusers import SanaVideoPipeline

from vtrain.contract import Caption
from vtrain_sanavideo import text as text_encoder
from vtrain_sanavideo.options import SanaVideoOptions

ATTRIBUTES = ("colour", "shape", "direction")


def test_diffusers_loads_it_and_makes_a_video(built: Path) -> None:
    pipeline = SanaVideoPipeline.from_pretrained(built, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert 1e6 <= sum(weights.numel() for weights in pipeline.transformer.parameters()) <= 5e6
    assert (pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal) == (8, 4)
    frames = pipeline(
        "a red circle moves left",
        height=64,
        width=64,
        frames=9,
        num_inference_steps=2,
        use_resolution_binning=False,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert frames.shape == (1, 9, 64, 64, 3)
    assert 0 <= frames.min() < frames.max() <= 1


def test_the_same_arguments_write_the_same_bytes(built: Path, checkpoint: ModuleType, tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    again = checkpoint.build(tmp_path / "again")
    assert digests(again) == digests(built)


def test_captions_that_differ_in_one_word_differ_in_that_words_token_alone_by_much(
    built: Path, world: ModuleType
) -> None:
    """With the pipeline's own instruction in front. Random directions would be 1.41 apart; at Gemma's own spread it is 0.2."""
    words = sorted(world.Words(c, s, d) for c in world.COLOURS for s in world.SHAPES for d in world.DIRECTIONS)
    options = SanaVideoOptions(path=str(built), text_precision="fp32")
    instruction = "\n".join(signature(SanaVideoPipeline.__call__).parameters["complex_human_instruction"].default)
    encoder = text_encoder.load(built / "text_encoder", built / "tokenizer", options, instruction, "cpu")
    with closing(encoder):
        # One by one: the attention of sixty together, 300 tokens and more each, fits no processor's cache.
        texts = [encoder.encode([Caption(each.caption)], "prompt") for each in words]
    assert len({int(text.only.mask.sum()) for text in texts}) == 1, (
        "every word is one token, so that words stand at the same place"
    )
    embeds = torch.nn.functional.normalize(torch.cat([text.only.embeds for text in texts]), dim=-1)
    for one, other in combinations(range(len(words)), 2):
        differing = [name for name in ATTRIBUTES if getattr(words[one], name) != getattr(words[other], name)]
        if len(differing) == 1:
            apart = (embeds[one] - embeds[other]).norm(dim=-1)
            assert apart.max() > 0.7, (words[one], words[other])
