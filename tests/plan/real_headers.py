"""A model folder with the real 2B model's configs and headers, whose weights are holes: sparse files of no size on the disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vtrain_sanavideo import tiny
from vtrain_sanavideo.geometry import SanaVideoConfig

COUNTS = Path(__file__).parents[1] / "golden" / "memory_counts.json"

GEMMA = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "head_dim": 256,
    "num_key_value_heads": 4, "vocab_size": 256000,
}  # fmt: skip
"""text_encoder/config.json of gemma-2-2b-it."""

BYTES = {"F32": 4, "BF16": 2}


def sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """A safetensors file of zeros that takes no room."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def real_folder(folder: Path) -> Path:
    """SANA-Video 2B 480p in diffusers layout, of headers alone; the tokenizer is the tiny model's."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from transformers import Gemma2Config, Gemma2Model

    real = json.loads(COUNTS.read_text(encoding="utf-8"))["config"]
    tiny.build(folder)
    _edit(folder / "transformer", real)
    shapes = SanaVideoConfig.model_validate(real).shapes()
    sparse(folder / "transformer" / "diffusion_pytorch_model.safetensors", shapes, "F32")
    with torch.device("meta"):
        vae = AutoencoderKLWan()
        gemma = Gemma2Model(Gemma2Config(**GEMMA))
    _edit(folder / "vae", {key: value for key, value in vae.config.items() if not key.startswith("_")})
    sparse(folder / "vae" / "diffusion_pytorch_model.safetensors", _shapes(vae), "F32")
    _edit(folder / "text_encoder", GEMMA)
    sparse(folder / "text_encoder" / "model.safetensors", _shapes(gemma), "BF16")
    return folder


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


def _edit(part: Path, values: Mapping[str, Any]) -> None:
    file = part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(values)))
