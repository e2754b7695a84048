"""What is wrong with a model folder, all at once, from its JSON files and the headers of its weights. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vtrain.contract import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    CheckpointSource,
    CodecConfig,
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
    unlike,
    weight_problems,
)
from vtrain_sanavideo.codec import LTX2_STATISTICS, ltx2_statistics
from vtrain_sanavideo.flow import scheduler_fault
from vtrain_sanavideo.geometry import SCALE_SHIFT_TABLE, Ltx2CodecConfig, SanaVideoConfig

LTX2 = "AutoencoderKLLTX2Video"
VAE_SOURCES = {
    "AutoencoderKLWan": "models/autoencoders/autoencoder_kl_wan.py",
    LTX2: "models/autoencoders/autoencoder_kl_ltx2.py",
}

COMPONENTS: Mapping[str, Component] = {
    "transformer": Component(("SanaVideoTransformer3DModel",), DIFFUSERS_STEM),
    "vae": Component(("AutoencoderKLWan", LTX2), DIFFUSERS_STEM),
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


def read_transformer(folder: Path) -> SanaVideoConfig:
    """The transformer's config, completed by its class's defaults. Raises ModelError."""
    defaults = default_arguments("diffusers", TRANSFORMER_SOURCE, "SanaVideoTransformer3DModel")
    return read_config(SanaVideoConfig, folder / "config.json", defaults)


def read_vae(folder: Path) -> CodecConfig:
    """The config of a VAE that this family works with, completed by its class's defaults. Raises ModelError."""
    path, defaults = folder / "config.json", vae_defaults(folder)
    if vae_class(folder) != LTX2:
        return read_codec(folder, defaults)
    config = read_config(Ltx2CodecConfig, path, defaults)
    if faults := config.faults():
        raise ModelError(Problem(str(path), fault, "Take the VAE's own config.") for fault in faults)
    return config


def vae_class(folder: Path) -> str:
    """Of the VAEs that this family works with. Raises ModelError for another one."""
    path, known = folder / "config.json", COMPONENTS["vae"].classes
    found = read_json(path).get("_class_name", known[0])
    if found not in known:
        what = f"this VAE is a {found}, and this family works with {' or '.join(known)}."
        raise ModelError(Problem(str(path), what, "Take the VAE of this checkpoint, or another copy of it."))
    return str(found)


def vae_meaning(folder: Path) -> dict[str, object]:
    """What the VAE's config means, its class's defaults written out. Raises ModelError."""
    return meaning(read_json(folder / "config.json"), vae_defaults(folder))


def vae_defaults(folder: Path) -> Mapping[str, object]:
    """Of its class's arguments. Raises ModelError."""
    name = vae_class(folder)
    return default_arguments("diffusers", VAE_SOURCES[name], name)


def check(source: CheckpointSource, vae: CheckpointSource | None) -> list[Problem]:
    """Every problem of the checkpoint, and of the VAE that replaces its own, if any."""
    other = [] if vae is None else [lambda folder: _other_vae(folder / "vae", vae)]
    return check_components(source, "SANA-Video", _scheduler, _transformer, _vae_class, _vae, _text_encoder, *other)


def _scheduler(folder: Path) -> list[Problem]:
    path = folder / "scheduler" / "scheduler_config.json"
    fault = scheduler_fault(read_json(path))
    return [Problem(str(path), fault, "Take the checkpoint's own scheduler.")] if fault else []


def _transformer(folder: Path) -> list[Problem]:
    part = folder / "transformer"
    shapes = read_transformer(part).shapes()
    return misfit_problems(part, DIFFUSERS_STEM, shapes, unsqueezed=(SCALE_SHIFT_TABLE,))


def _vae_class(folder: Path) -> list[Problem]:
    """diffusers loads the class of the index, whatever the VAE's own config says."""
    path = folder / "model_index.json"
    entry, found = read_json(path).get("vae"), vae_class(folder / "vae")
    listed = entry[-1] if isinstance(entry, list) and entry else None
    if listed == found or listed not in COMPONENTS["vae"].classes:
        return []  # the same, or reported as no VAE of this family
    what = f"the VAE is listed as a {listed}, and vae/config.json is of a {found}."
    return [Problem(str(path), what, "Take both files from the same checkpoint.")]


def _vae(folder: Path) -> list[Problem]:
    part = folder / "vae"
    config, taken = read_vae(part), read_transformer(folder / "transformer").in_channels
    channels, remedy = config.geometry().channels, "Take the VAE of this checkpoint."
    problems = _vae_weights(part, config)
    return [*problems, *unlike(part, f"the VAE has {channels} latent channels", channels, taken, remedy)]


def _vae_weights(folder: Path, config: CodecConfig) -> list[Problem]:
    """From their headers; the LTX-2 VAE has the mean and std of its latents among them."""
    problems = misfit_problems(folder, DIFFUSERS_STEM, config.shapes(), some=True)
    if isinstance(config, Ltx2CodecConfig) and not weight_problems(folder, DIFFUSERS_STEM):
        try:
            ltx2_statistics(folder, config)
        except ModelError as error:
            problems += error.problems
    return problems


def _text_encoder(folder: Path) -> list[Problem]:
    part = folder / "text_encoder"
    config = read_json(part / "config.json")
    width, words = config.get("hidden_size"), config.get("vocab_size")
    problems = []
    if isinstance(width, int) and isinstance(words, int):
        problems = misfit_problems(part, TRANSFORMERS_STEM, {"embed_tokens.weight": (words, width)}, some=True)
    taken = read_transformer(folder / "transformer").caption_channels
    return [*problems, *unlike(part, f"the text encoder's width is {width}", width, taken)]


def _other_vae(own: Path, other: CheckpointSource) -> list[Problem]:
    """vae_path names another copy of the same VAE, or it is a mistake: latents of another one mean nothing here."""
    folder = other.place("vae")
    config, mine = read_vae(folder), read_vae(own)
    theirs, ours = vae_meaning(folder), vae_meaning(own)
    path, remedy = str(folder / "config.json"), "Remove vae_path, or name a copy of the same VAE."
    if vae_class(folder) != vae_class(own):
        what = f"vae_path is a {vae_class(folder)}, and the VAE of [model] path is a {vae_class(own)}."
        return [Problem(path, what, remedy)]
    problems = component_weights(other, folder, DIFFUSERS_STEM) + _vae_weights(folder, config)
    if odd := sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)):
        what = f"vae_path is not the VAE of [model] path: {', '.join(odd)} differ."
        problems.append(Problem(path, what, remedy))
    elif not problems and isinstance(mine, Ltx2CodecConfig):
        problems += _other_statistics(own, folder, mine, remedy)
    return problems


def _other_statistics(own: Path, other: Path, config: Ltx2CodecConfig, remedy: str) -> list[Problem]:
    if any(weight_problems(each, DIFFUSERS_STEM) for each in (own, other)):
        return []  # reported, or still on the hub
    pairs = zip(ltx2_statistics(own, config), ltx2_statistics(other, config), LTX2_STATISTICS, strict=True)
    # The share that the rounding of a copy in bf16 changes.
    odd = [
        name
        for mine, theirs, name in pairs
        if any(abs(a - b) > abs(a) / 100 for a, b in zip(mine, theirs, strict=True))
    ]
    what = f"vae_path is not the VAE of [model] path: {', '.join(odd)} among the weights differ."
    return [Problem(str(other), what, remedy)] if odd else []
