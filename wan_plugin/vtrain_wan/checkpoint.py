"""What a checkpoint of Wan is made of, which Wan it is, and what is wrong with one. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from vtrain.contract import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    VOCABULARIES,
    CheckpointSource,
    Component,
    Problem,
    Shape,
    TransformerConfig,
    check_components,
    default_arguments,
    layer,
    misfit_problems,
    read_codec,
    read_config,
    read_json,
    stored_shapes,
    unlike_parts,
    weight_problems,
)
from vtrain_wan import images

_IMAGES = "condition_embedder.image_embedder"
COMPONENTS: Mapping[str, Component] = {
    "transformer": Component(("WanTransformer3DModel",), DIFFUSERS_STEM),
    "vae": Component(("AutoencoderKLWan",), DIFFUSERS_STEM),
    "text_encoder": Component(("UMT5EncoderModel",), TRANSFORMERS_STEM),
    "tokenizer": Component(("T5TokenizerFast", "T5Tokenizer"), config="tokenizer_config.json", one_of=VOCABULARIES),
    "scheduler": Component(config="scheduler_config.json"),
    **images.COMPONENTS,
}
IGNORED = ("norm_added_q",)
"""Weights that published checkpoints hold and the class reads over (its `_keys_to_ignore_on_load_unexpected`)."""


class WanConfig(TransformerConfig):
    """transformer/config.json of a WanTransformer3DModel."""

    text_dim: int
    freq_dim: int
    ffn_dim: int
    cross_attn_norm: bool
    image_dim: int | None
    added_kv_proj_dim: int | None
    pos_embed_seq_len: int | None

    def shapes(self) -> dict[str, Shape]:
        width, embedder = self.width, "condition_embedder"
        shapes: dict[str, Shape] = self._images() | {
            "scale_shift_table": (1, 2, width),
            **layer("patch_embedding", width, self.in_channels, *self.patch_size),
            **layer(f"{embedder}.time_embedder.linear_1", width, self.freq_dim),
            **layer(f"{embedder}.time_embedder.linear_2", width, width),
            **layer(f"{embedder}.time_proj", 6 * width, width),
            **layer(f"{embedder}.text_embedder.linear_1", width, self.text_dim),
            **layer(f"{embedder}.text_embedder.linear_2", width, width),
            **layer("proj_out", math.prod(self.patch_size) * self.latent_channels, width),
        }
        block = layer("ffn.net.0.proj", self.ffn_dim, width) | layer("ffn.net.2", width, self.ffn_dim)
        block |= {"scale_shift_table": (1, 6, width), **(layer("norm2", width) if self.cross_attn_norm else {})}
        for attention in ("attn1", "attn2"):
            block |= {f"{attention}.norm_{of}.weight": (width,) for of in "qk"}
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                block |= layer(f"{attention}.{name}", width, width)
        if added := self.added_kv_proj_dim:
            block |= layer("attn2.add_k_proj", width, added) | layer("attn2.add_v_proj", width, added)
            block["attn2.norm_added_k.weight"] = (width,)
        return shapes | {f"blocks.{n}.{name}": shape for n in range(self.num_layers) for name, shape in block.items()}

    def _images(self) -> dict[str, Shape]:
        """Of the embedder of pictures, which text-to-video has not."""
        if not (wide := self.image_dim):
            return {}
        shapes = layer(f"{_IMAGES}.norm1", wide) | layer(f"{_IMAGES}.norm2", self.width)
        shapes |= layer(f"{_IMAGES}.ff.net.0.proj", wide, wide) | layer(f"{_IMAGES}.ff.net.2", self.width, wide)
        return shapes | ({f"{_IMAGES}.pos_embed": (1, ends, wide)} if (ends := self.pos_embed_seq_len) else {})


def read_transformer(folder: Path) -> WanConfig:
    """Completed by its class's defaults. Raises ModelError."""
    defaults = default_arguments("diffusers", "models/transformers/transformer_wan.py", "WanTransformer3DModel")
    return read_config(WanConfig, folder / "config.json", defaults)


def vae_defaults() -> dict[str, object]:
    return default_arguments("diffusers", "models/autoencoders/autoencoder_kl_wan.py", "AutoencoderKLWan")


TEXT_TO_VIDEO, IMAGE_TO_VIDEO, TI2V = "Wan 2.1 text-to-video", "Wan 2.1 image-to-video", "Wan 2.2 TI2V"
_KINDS = {16: TEXT_TO_VIDEO, 36: "Wan 2.2 image-to-video A", 48: TI2V}
SMALL = 1536
_SIZES = {SMALL: "1.3B", 3072: "5B", 5120: "14B"}


def identity(shapes: Mapping[str, Shape], experts: bool = False) -> str:
    """Which Wan has weights of these names and shapes, such as "Wan 2.1 text-to-video 14B"."""
    width, channels, *_ = (*shapes.get("patch_embedding.weight", ()), 0, 0)
    kind = _KINDS.get(channels, f"a Wan of {channels} channels")
    if any(name.startswith(_IMAGES) for name in shapes):
        kind = "Wan 2.1 first-last-frame-to-video" if f"{_IMAGES}.pos_embed" in shapes else IMAGE_TO_VIDEO
    kind = "Wan 2.2 with two experts, A" if experts else kind
    return f"{kind} {_SIZES.get(width, f'of width {width}')}".replace("A 14B", "A14B")


def check(source: CheckpointSource, wanted: Sequence[str]) -> list[Problem]:
    """Every problem of a checkpoint that is to be one of `wanted`, as `identity` calls them, or the start of that."""
    return check_components(
        source, "Wan", lambda folder: _transformer(folder, wanted), lambda folder: _others(source, folder)
    )


def _transformer(folder: Path, wanted: Sequence[str]) -> list[Problem]:
    """Version and size by the index, by the config and by the headers of the weights."""
    part, index = folder / "transformer", read_json(folder / "model_index.json")
    config = read_transformer(part)
    known = identity(config.shapes(), index.get("boundary_ratio") is not None)
    if not known.startswith(tuple(wanted)):
        remedy = "Name another checkpoint in [model] path, or change use, task or size."
        return [Problem(str(part / "config.json"), f"this is {known}, and not {' or '.join(wanted)}.", remedy)]
    if not weight_problems(part, DIFFUSERS_STEM):
        found = identity(stored_shapes(part, DIFFUSERS_STEM))
        if found != known:
            what = f"these weights are of {found}, and the config beside them is of {known}."
            return [Problem(str(part), what, "Take weights and config.json from the same model.")]
    return misfit_problems(part, DIFFUSERS_STEM, config.shapes(), ignored=IGNORED)


def _others(source: CheckpointSource, folder: Path) -> list[Problem]:
    taken, codec = read_transformer(folder / "transformer"), read_codec(folder / "vae", vae_defaults())
    problems, more = images.check(source, folder, taken.image_dim) if taken.image_dim else ([], ())
    if taken.image_dim:
        given = 2 * codec.z_dim + codec.time_factor
        more += ((folder / "vae", f"noise, mask and picture have {given} channels", given, taken.in_channels),)
    return [*problems, *unlike_parts(folder, taken, codec, "d_model", taken.text_dim, *more)]
