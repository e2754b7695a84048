"""What is wrong with a model folder, from its JSON files and the headers of its weights. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vtrain.contract import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    CausalCodecConfig,
    CheckpointSource,
    Component,
    Problem,
    check_components,
    default_arguments,
    misfit_problems,
    read_codec,
    read_config,
    read_json,
    stored_shapes,
    weight_problems,
)
from vtrain_wan.config import TransformerConfig, Version, identity

COMPONENTS: Mapping[str, Component] = {
    "transformer": Component(("WanTransformer3DModel",), DIFFUSERS_STEM),
    "vae": Component(("AutoencoderKLWan",), DIFFUSERS_STEM),
    "text_encoder": Component(("UMT5EncoderModel",), TRANSFORMERS_STEM),
    "tokenizer": Component(
        ("T5TokenizerFast", "T5Tokenizer"), config="tokenizer_config.json", one_of=("tokenizer.json", "spiece.model")
    ),
    "scheduler": Component(config="scheduler_config.json"),
}


def read_transformer(folder: Path) -> TransformerConfig:
    """The transformer's config, completed by its class's defaults. Raises ModelError."""
    defaults = default_arguments("diffusers", "models/transformers/transformer_wan.py", "WanTransformer3DModel")
    return read_config(TransformerConfig, folder / "config.json", defaults)


def vae_defaults() -> dict[str, object]:
    return default_arguments("diffusers", "models/autoencoders/autoencoder_kl_wan.py", "AutoencoderKLWan")


def read_vae(folder: Path) -> CausalCodecConfig:
    """The VAE's config, completed by its class's defaults. Raises ModelError."""
    return read_codec(folder, vae_defaults())


def check(source: CheckpointSource, version: Version, size: str | None) -> list[Problem]:
    """Every problem of the checkpoint. size: which it must be, if the user says so."""
    wanted = f"{version.title} {size}" if size else version.title
    return check_components(
        source, wanted, lambda folder: _index(folder, version), lambda folder: _transformer(folder, wanted), _others
    )


def _index(folder: Path, version: Version) -> list[Problem]:
    """What the pipeline of a checkpoint says that it is."""
    path = folder / "model_index.json"
    index = read_json(path)
    faults = []
    if index.get("_class_name") != "WanPipeline":
        faults.append(f"this is a checkpoint for {index.get('_class_name')}, and {version.title} is for WanPipeline.")
    if index.get("boundary_ratio") is not None or index.get("transformer_2", [None, None]) != [None, None]:
        faults.append(f"this checkpoint has two experts, as Wan 2.2 A14B, and {version.title} is one transformer.")
    if bool(index.get("expand_timesteps")) != version.expand_timesteps:
        faults.append(
            f"{version.title} has expand_timesteps = {version.expand_timesteps}, and this checkpoint has not."
        )
    return [Problem(str(path), fault, f"Name a {version.title} checkpoint in [model] path.") for fault in faults]


def _transformer(folder: Path, wanted: str) -> list[Problem]:
    """Version and size by the config, and by the headers of the weights."""
    part = folder / "transformer"
    shapes = read_transformer(part).shapes()
    known, problems = identity(shapes), []
    if not all(word in known.split() for word in wanted.split()):
        remedy = "Name another checkpoint in [model] path, or change use or size."
        problems.append(Problem(str(part / "config.json"), f"this is {known}, and not {wanted}.", remedy))
    found = known if weight_problems(part, DIFFUSERS_STEM) else identity(stored_shapes(part, DIFFUSERS_STEM))
    if found != known:
        what = f"these weights are {found}, and the config beside them says {known}."
        return [*problems, Problem(str(part), what, "Take weights and config.json from the same model.")]
    return problems + misfit_problems(part, DIFFUSERS_STEM, shapes)


def _others(folder: Path) -> list[Problem]:
    """Whether VAE and text encoder are the transformer's."""
    transformer, vae, text = (folder / name for name in ("transformer", "vae", "text_encoder"))
    taken, codec, words = read_transformer(transformer), read_vae(vae), read_json(text / "config.json")
    problems = misfit_problems(vae, DIFFUSERS_STEM, codec.shapes(), some=True)
    pairs = (
        (vae, "VAE has {} latent channels", codec.z_dim, taken.in_channels),
        (text, "text encoder has a width of {}", words.get("d_model"), taken.text_dim),
    )
    for part, what, found, needed in pairs:
        if found != needed:
            fault = f"the {what.format(found)}, and the transformer takes {needed}."
            problems.append(Problem(str(part / "config.json"), fault, "Take this checkpoint's own."))
    return problems
