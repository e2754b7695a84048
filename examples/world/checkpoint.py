"""The tiny world's checkpoint: real SANA-Video classes in the real format, with a VAE that knows the world.

    python examples/world/checkpoint.py FOLDER [--wan]

Transformer: 4.9 M parameters, random, to be trained. VAE: trained (train_vae.py), from vae/ beside this file. Text encoder: a
random but fixed Gemma-2, with every word of the world a token of its own. diffusers' SanaVideoPipeline.from_pretrained loads it.
With --wan the same of Wan 2.1: its transformer (3.8 M), the same VAE, a random UMT5; WanPipeline.from_pretrained loads it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import world
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer, UMT5Config, UMT5EncoderModel

import vtrain_wan.tiny
from vtrain_sanavideo import tiny

VAE = Path(__file__).parent / "vae"
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
WORDS = (*world.COLOURS, *world.SHAPES, "moves", *world.DIRECTIONS)
TEXT_WIDTH = 64
TEXT_SPREAD = 0.2
"""Standard deviation of the text encoder's random weights. At Gemma's own 0.02 the norms after each layer drown the tokens, and
captions that differ in one word are encoded almost alike."""


def build(folder: Path, *, seed: int = 0, layers: int = 6, heads: int = 4, head_dim: int = 48) -> Path:
    """Write the whole checkpoint into `folder` and return it. The same arguments write the same bytes."""
    tiny.build(folder, seed=seed, layers=layers, heads=heads, head_dim=head_dim, text_width=TEXT_WIDTH)
    put_vae(folder)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    make_text_encoder(tokenizer).save_pretrained(folder / "text_encoder")
    return folder


def build_wan(folder: Path, *, seed: int = 0) -> Path:
    """The same of Wan 2.1."""
    vtrain_wan.tiny.build(folder, seed=seed, layers=6, heads=4, head_dim=48, text_width=TEXT_WIDTH)
    put_vae(folder)
    tokenizer = vtrain_wan.tiny.make_tokenizer(["a", *WORDS])
    tokenizer.save_pretrained(folder / "tokenizer")
    make_umt5(len(tokenizer)).save_pretrained(folder / "text_encoder")
    return folder


def put_vae(folder: Path) -> None:
    """Both families' VAE is the same."""
    for name in VAE_FILES:
        shutil.copyfile(VAE / name, folder / "vae" / name)


def make_tokenizer() -> GemmaTokenizer:
    """The tiny checkpoint's, and a token for each word of the world: as in Gemma's own, where these are whole words."""
    tokenizer = tiny.train_tokenizer()
    tokenizer.add_tokens(list(WORDS))
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


def make_umt5(vocabulary: int) -> UMT5EncoderModel:
    """Two random layers, the same whatever the checkpoint's seed."""
    config = UMT5Config(
        vocab_size=vocabulary, d_model=TEXT_WIDTH, d_kv=16, d_ff=2 * TEXT_WIDTH, num_layers=2, num_heads=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UMT5EncoderModel(config)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tiny world's checkpoint, its transformer untrained.")
    parser.add_argument("folder", type=Path, help="where to; created if missing")
    parser.add_argument("--seed", type=int, default=0, help="seed of the transformer's weights (default: 0)")
    parser.add_argument("--wan", action="store_true", help="of Wan 2.1 instead of SANA-Video")
    chosen = parser.parse_args()
    print((build_wan if chosen.wan else build)(chosen.folder, seed=chosen.seed))


if __name__ == "__main__":
    main()
