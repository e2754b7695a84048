"""The tiny world's checkpoint: real SANA-Video classes in the real format, with a VAE that knows the world.

    python examples/world/checkpoint.py FOLDER

Transformer: 4.9 M parameters, random, to be trained. VAE: trained (train_vae.py), from vae/ beside this file. Text encoder: a
random but fixed Gemma-2, with every word of the world a token of its own. diffusers' SanaVideoPipeline.from_pretrained loads it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import world
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from vtrain_sanavideo import tiny

VAE = Path(__file__).parent / "vae"
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
TEXT_WIDTH = 64
TEXT_SPREAD = 0.2
"""Standard deviation of the text encoder's random weights. At Gemma's own 0.02 the norms after each layer drown the tokens, and
captions that differ in one word are encoded almost alike."""


def build(folder: Path, *, seed: int = 0, layers: int = 6, heads: int = 4, head_dim: int = 48) -> Path:
    """Write the whole checkpoint into `folder` and return it. The same arguments write the same bytes."""
    tiny.build(folder, seed=seed, layers=layers, heads=heads, head_dim=head_dim, text_width=TEXT_WIDTH)
    for name in VAE_FILES:
        shutil.copyfile(VAE / name, folder / "vae" / name)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    make_text_encoder(tokenizer).save_pretrained(folder / "text_encoder")
    return folder


def make_tokenizer() -> GemmaTokenizer:
    """The tiny checkpoint's, and a token for each word of the world: as in Gemma's own, where these are whole words."""
    tokenizer = tiny.train_tokenizer()
    tokenizer.add_tokens([*world.COLOURS, *world.SHAPES, "moves", *world.DIRECTIONS])
    return tokenizer


def make_text_encoder(tokenizer: GemmaTokenizer) -> Gemma2Model:
    """Two random layers, the same whatever the checkpoint's seed."""
    heads = 4
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=TEXT_WIDTH // heads,
        query_pre_attn_scalar=TEXT_WIDTH // heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=TEXT_SPREAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma2Model(config)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tiny world's checkpoint, its transformer untrained.")
    parser.add_argument("folder", type=Path, help="where to; created if missing")
    parser.add_argument("--seed", type=int, default=0, help="seed of the transformer's weights (default: 0)")
    chosen = parser.parse_args()
    print(build(chosen.folder, seed=chosen.seed))


if __name__ == "__main__":
    main()
