"""A complete Wan checkpoint of a few megabytes: random weights, the real format, for tests, demos and benchmarks.

    python -m vtrain_wan.tiny FOLDER [--i2v | --ti2v]

diffusers' own `from_pretrained` of WanPipeline and WanImageToVideoPipeline loads the folder.
The same arguments write the same bytes.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtrain.contract import Device, quiet

if TYPE_CHECKING:
    from transformers import T5Tokenizer

CORPUS = (
    "a cat walks slowly over the wet grass in the soft light of the morning",
    "a small dog runs along the beach while waves roll in behind it, 0 1 2 3 4 5 6 7 8 9",
    "time lapse of clouds that drift over a mountain lake; calm and clear water.",
    "an old man reads a book under a tree, quiet, just before the jazz concert: close-up & zoom!",
)
"""What the tokenizer has words for."""

IMAGE_WIDTH = 32
"""Of the image encoder's tokens."""


def build(
    folder: Path,
    *,
    i2v: bool = False,
    ti2v: bool = False,
    seed: int = 0,
    layers: int = 4,
    heads: int = 2,
    head_dim: int = 48,
    text_width: int = 64,
    vae_dim: int = 8,
    max_shard_size: str = "10GB",
) -> Path:
    """Write a checkpoint into `folder`, which is created, and return it. Takes a few seconds.

    i2v: of Wan 2.1 image-to-video; ti2v: of Wan 2.2 TI2V (a VAE of 48 channels, x16 space); else of Wan 2.1 text-to-video.
    The defaults give a transformer of 0.6 M parameters (4 blocks x 96). Channels, patch, compression and
    scheduler are the real models'.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    channels = 48 if ti2v else 16
    vae = {"base_dim": vae_dim, "z_dim": channels, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    if ti2v:
        # Numbers of the size of the real ones, each different.
        vae |= {"latents_mean": [0.01 * n - 0.2 for n in range(48)], "latents_std": [0.4 + 0.01 * n for n in range(48)]}
        vae |= {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays; no card is asked
        Device().seed(seed)
        WanTransformer3DModel(
            in_channels=2 * channels + 4 if i2v else channels,
            out_channels=channels,
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            text_dim=text_width,
            ffn_dim=3 * heads * head_dim,
            image_dim=IMAGE_WIDTH if i2v else None,
            added_kv_proj_dim=heads * head_dim if i2v else None,
        ).save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
        AutoencoderKLWan(**vae).save_pretrained(folder / "vae")
        text = UMT5Config(
            vocab_size=len(tokenizer), d_model=text_width, d_kv=16, d_ff=2 * text_width, num_layers=2, num_heads=4
        )
        with quiet():
            UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
            if i2v:
                image_encoder(folder)
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0 if ti2v else 3.0
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanImageToVideoPipeline" if i2v else "WanPipeline",
        "boundary_ratio": None,
        "expand_timesteps": ti2v,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "image_encoder": ["transformers", "CLIPVisionModel"] if i2v else [None, None],
        "image_processor": ["transformers", "CLIPImageProcessor"] if i2v else [None, None],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def image_encoder(folder: Path) -> None:
    """CLIP's part for pictures, which makes 5 tokens of one."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    shape: dict[str, Any] = {
        "hidden_size": IMAGE_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=28, patch_size=14)).save_pretrained(folder / "image_encoder")
    size = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder / "image_processor")


def make_tokenizer(corpus: Sequence[str] = CORPUS) -> T5Tokenizer:
    """A tokenizer built as T5's: unigrams, "▁" for spaces, </s> put last. Its pieces are the words and letters of the corpus."""
    from transformers import T5Tokenizer

    # Not trained: two trainings of the same unigrams differ.
    words = Counter(f"▁{word}" for line in corpus for word in line.split())
    letters = Counter("".join(words))
    counts = {**letters, **words}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, math.log(counts[piece] / sum(counts.values()))) for piece in sorted(counts)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vtrain_wan.tiny", description="Write a tiny Wan checkpoint with random weights."
    )
    parser.add_argument("folder", type=Path, help="where to write it; created if missing")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--i2v", action="store_true", help="of Wan 2.1 image-to-video instead of text-to-video")
    kinds.add_argument("--ti2v", action="store_true", help="of Wan 2.2 TI2V instead of Wan 2.1 text-to-video")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    chosen = parser.parse_args(arguments)
    sys.stdout.write(f"{build(chosen.folder, i2v=chosen.i2v, ti2v=chosen.ti2v, seed=chosen.seed)}\n")


if __name__ == "__main__":
    main()
