"""A complete SANA-Video checkpoint of a few megabytes: random weights, the real format, for tests, demos and benchmarks.

    python -m vtrain_sanavideo.tiny FOLDER

diffusers' own `SanaVideoPipeline.from_pretrained` loads the folder. The same arguments write the same bytes.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vtrain.contract import Device, quiet

if TYPE_CHECKING:
    from transformers import GemmaTokenizer

CORPUS = (
    "a cat walks slowly over the wet grass in the soft light of the morning",
    "a small dog runs along the beach while waves roll in behind it",
    "the camera follows a sailing boat on a wide river between green hills",
    "a woman in a red coat crosses a busy street at night, neon signs in the rain",
    "time lapse of clouds that drift over a mountain lake, calm and clear water",
    "close-up of hands that shape clay on a turning wheel, warm side lighting",
    "a train passes a snowy station, the camera pans from left to right",
    "children play with a kite on a field, wide shot, bright summer colours",
    "an old man reads a book under a tree, leaves move in the wind, shallow focus",
    "steam rises from a cup of coffee on a wooden table, slow zoom in",
    "birds fly over the city at sunset, aerial view, orange and purple sky",
    "a chaotic sequence with misshapen limbs, motion blur and sudden jump cuts",
    "given a user prompt, generate a detailed visual description suitable for video generation",
    "user prompt: enhanced prompt: motion score: 0 1 2 3 4 5 6 7 8 9 10 20 30.",
)
"""What the tokenizer is trained on."""

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
"""Gemma's, at Gemma's ids 0 to 4."""

PIPELINE_INDEX = {
    "_class_name": "SanaVideoPipeline",
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "GemmaTokenizerFast"],
    "transformer": ["diffusers", "SanaVideoTransformer3DModel"],
}
VAES: Mapping[str, str] = {"480p": "AutoencoderKLWan", "720p": "AutoencoderKLLTX2Video"}
"""The VAE of the checkpoint of each resolution."""


def build(
    folder: Path,
    *,
    resolution: Literal["480p", "720p"] = "480p",
    seed: int = 0,
    layers: int = 4,
    heads: int = 2,
    head_dim: int = 48,
    text_width: int = 64,
    vae_dim: int = 8,
    max_shard_size: str = "10GB",
) -> Path:
    """Write a checkpoint into `folder`, which is created, and return it. Takes a few seconds.

    The defaults give a transformer of 0.9 M parameters (4 blocks x 96); layers=6, heads=8, head_dim=112 gives 104 M
    (6 blocks x 896). Channels, patch, compression and the scheduler are the real model's: for "480p" 16 channels of
    x4 time and x8 space in patches of 2x2, for "720p" 128 channels of x8 time and x32 space, one by one.
    vae_dim: width of the VAE (the real ones: Wan's 96, LTX-2's 256). max_shard_size: transformer files are split
    beyond it, as "1MB".
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays; no card is asked
        Device().seed(seed)
        _write_transformer(folder / "transformer", resolution, layers, heads, head_dim, text_width, max_shard_size)
        _write_vae(folder / "vae", resolution, vae_dim)
        tokenizer = train_tokenizer()
        _write_text_encoder(folder / "text_encoder", tokenizer, text_width)
    tokenizer.save_pretrained(folder / "tokenizer")
    _write_scheduler(folder / "scheduler")
    index = PIPELINE_INDEX | {"vae": ["diffusers", VAES[resolution]]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def train_tokenizer() -> GemmaTokenizer:
    """A tokenizer built as Gemma's: BPE with byte fallback, "▁" for spaces, <bos> put first. Trained on CORPUS."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    names = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return GemmaTokenizer(
        vocab={name: number for number, name in enumerate(names)},
        merges=[(first, second) for first, second in learned["merges"]],  # type: ignore[misc]  # pairs are taken
        add_bos_token=True,
    )


def _write_transformer(
    folder: Path, resolution: str, layers: int, heads: int, head_dim: int, text_width: int, max_shard_size: str
) -> None:
    from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel

    latents: dict[str, Any] = {"in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2), "sample_size": 30}
    if resolution == "720p":
        latents = {"in_channels": 128, "out_channels": 128, "patch_size": (1, 1, 1), "sample_size": 22}
    SanaVideoTransformer3DModel(
        **latents,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim,
        caption_channels=text_width,
        mlp_ratio=3.0,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    ).save_pretrained(folder, max_shard_size=max_shard_size)


def _write_vae(folder: Path, resolution: str, dim: int) -> None:
    if resolution == "720p":
        _write_ltx2_vae(folder, dim)
        return
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    AutoencoderKLWan(base_dim=dim, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(folder)


def _write_ltx2_vae(folder: Path, dim: int) -> None:
    """One layer in each stage. Mean and std of the latents, which a trained one measured, are drawn."""
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video

    vae = AutoencoderKLLTX2Video(
        block_out_channels=(2 * dim, 2 * dim, 4 * dim, 4 * dim),
        decoder_block_out_channels=(dim, 2 * dim, 4 * dim),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    vae.latents_mean.normal_(0, 0.3)
    vae.latents_std.uniform_(0.5, 1.5)
    vae.save_pretrained(folder)


def _write_text_encoder(folder: Path, tokenizer: GemmaTokenizer, width: int) -> None:
    from transformers import Gemma2Config, Gemma2Model

    heads = 4
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=width // heads,
        query_pre_attn_scalar=width // heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with quiet():
        Gemma2Model(config).save_pretrained(folder)


def _write_scheduler(folder: Path) -> None:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=8.0,
    ).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vtrain_sanavideo.tiny", description="Write a tiny SANA-Video checkpoint with random weights."
    )
    parser.add_argument("folder", type=Path, help="where to write it; created if missing")
    parser.add_argument("--resolution", choices=[*VAES], default="480p", help="the checkpoint's (default: 480p)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks (default: 4)")
    parser.add_argument("--heads", type=int, default=2, help="attention heads (default: 2)")
    parser.add_argument("--head-dim", type=int, default=48, help="width of a head (default: 48)")
    parser.add_argument("--text-width", type=int, default=64, help="width of the text embeddings (default: 64)")
    chosen = parser.parse_args(arguments)
    written = build(
        chosen.folder,
        resolution=chosen.resolution,
        seed=chosen.seed,
        layers=chosen.layers,
        heads=chosen.heads,
        head_dim=chosen.head_dim,
        text_width=chosen.text_width,
    )
    sys.stdout.write(f"{written}\n")


if __name__ == "__main__":
    main()
