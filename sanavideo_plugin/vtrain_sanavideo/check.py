"""What is wrong with a model folder, all at once, from its JSON files and the headers of its weights. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vtrain.contract import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    CausalCodecConfig,
    CheckpointSource,
    Component,
    ModelError,
    Problem,
    check_components,
    component_weights,
    default_arguments,
    meaning,
    misfit_problems,
    read_codec,
    read_config,
    read_json,
)
from vtrain_sanavideo.flow import scheduler_fault
from vtrain_sanavideo.geometry import SCALE_SHIFT_TABLE, TransformerConfig

COMPONENTS: Mapping[str, Component] = {
    "transformer": Component(("SanaVideoTransformer3DModel",), DIFFUSERS_STEM),
    "vae": Component(("AutoencoderKLWan",), DIFFUSERS_STEM),
    "text_encoder": Component(("Gemma2Model",), TRANSFORMERS_STEM),
    "tokenizer": Component(
        ("GemmaTokenizerFast", "GemmaTokenizer"),
        config="tokenizer_config.json",
        one_of=("tokenizer.json", "tokenizer.model"),
    ),
    "scheduler": Component(config="scheduler_config.json"),
}
"""What this family works with; the scheduler may be any that follows a flow."""

TRANSFORMER_SOURCE = "models/transformers/transformer_sana_video.py"
VAE_SOURCE = "models/autoencoders/autoencoder_kl_wan.py"


def read_transformer(folder: Path) -> TransformerConfig:
    """The transformer's config, completed by its class's defaults. Raises ModelError."""
    defaults = default_arguments("diffusers", TRANSFORMER_SOURCE, "SanaVideoTransformer3DModel")
    return read_config(TransformerConfig, folder / "config.json", defaults)


def read_vae(folder: Path) -> CausalCodecConfig:
    """The config of a VAE that is a Wan VAE, completed by its class's defaults. Raises ModelError."""
    path = folder / "config.json"
    wanted = COMPONENTS["vae"].classes
    found = read_json(path).get("_class_name", wanted[0])
    if found not in wanted:
        what = f"this VAE is a {found}, and this family works with {' or '.join(wanted)}."
        raise ModelError(Problem(str(path), what, "Take the VAE of this checkpoint, or another copy of it."))
    return read_codec(folder, vae_defaults())


def vae_defaults() -> dict[str, object]:
    return default_arguments("diffusers", VAE_SOURCE, "AutoencoderKLWan")


def check(source: CheckpointSource, vae: CheckpointSource | None) -> list[Problem]:
    """Every problem of the checkpoint, and of the VAE that replaces its own, if any."""
    other = [] if vae is None else [lambda folder: _other_vae(folder / "vae", vae)]
    return check_components(source, "SANA-Video", _scheduler, _transformer, _vae, _text_encoder, *other)


def _scheduler(folder: Path) -> list[Problem]:
    path = folder / "scheduler" / "scheduler_config.json"
    fault = scheduler_fault(read_json(path))
    return [Problem(str(path), fault, "Take the checkpoint's own scheduler.")] if fault else []


def _transformer(folder: Path) -> list[Problem]:
    part = folder / "transformer"
    shapes = read_transformer(part).shapes()
    return misfit_problems(part, DIFFUSERS_STEM, shapes, unsqueezed=(SCALE_SHIFT_TABLE,))


def _vae(folder: Path) -> list[Problem]:
    part = folder / "vae"
    config = read_vae(part)
    problems = misfit_problems(part, DIFFUSERS_STEM, config.shapes(), some=True)
    taken = read_transformer(folder / "transformer").in_channels
    if config.z_dim != taken:
        what = f"the VAE has {config.z_dim} latent channels, and the transformer takes {taken}."
        problems.append(Problem(str(part / "config.json"), what, "Take the VAE of this checkpoint."))
    return problems


def _text_encoder(folder: Path) -> list[Problem]:
    part = folder / "text_encoder"
    config = read_json(part / "config.json")
    width, words = config.get("hidden_size"), config.get("vocab_size")
    problems = []
    if isinstance(width, int) and isinstance(words, int):
        problems = misfit_problems(part, TRANSFORMERS_STEM, {"embed_tokens.weight": (words, width)}, some=True)
    taken = read_transformer(folder / "transformer").caption_channels
    if width != taken:
        what = f"the text encoder's width is {width}, and the transformer takes {taken}."
        problems.append(Problem(str(part / "config.json"), what, "Take this checkpoint's own."))
    return problems


def _other_vae(own: Path, other: CheckpointSource) -> list[Problem]:
    """vae_path names another copy of the same VAE, or it is a mistake: latents of another one mean nothing here."""
    folder = other.place("vae")
    shapes = read_vae(folder).shapes()
    theirs, ours = (meaning(read_json(path / "config.json"), vae_defaults()) for path in (folder, own))
    problems = component_weights(other, folder, DIFFUSERS_STEM)
    problems += misfit_problems(folder, DIFFUSERS_STEM, shapes, some=True)
    if odd := sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)):
        what = f"vae_path is not the VAE of [model] path: {', '.join(odd)} differ."
        problems.append(Problem(str(folder / "config.json"), what, "Remove vae_path, or name a copy of the same VAE."))
    return problems
