"""What is wrong with a model folder, all at once, from its JSON files and the headers of its weights. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from vtrain.contract import ModelError, Problem, misfit_problem, misfits, stored_shapes, weight_problems
from vtrain_wan.config import CodecConfig, TransformerConfig, Version, identity
from vtrain_wan.source import STEMS, CheckpointSource

CLASSES: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("UMT5EncoderModel",),
    "tokenizer": ("T5TokenizerFast", "T5Tokenizer"),
    "transformer": ("WanTransformer3DModel",),
    "vae": ("AutoencoderKLWan",),
}
"""The classes that this family works with; the scheduler may be any: it is not used."""

ConfigT = TypeVar("ConfigT", bound=BaseModel)
JsonObject = Mapping[str, object]


def read_json(path: Path) -> JsonObject:
    """A JSON object. Raises ModelError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(Problem(str(path), "this file is missing.", "Is the folder in diffusers layout?")) from error
    except (OSError, ValueError) as error:
        raise ModelError(Problem(str(path), f"this file cannot be read: {error}.", "Download it again.")) from error
    if not isinstance(content, dict):
        raise ModelError(Problem(str(path), "this file holds no JSON object.", "Download it again."))
    return content


def read_config(kind: type[ConfigT], path: Path) -> ConfigT:
    """A part's config.json as a typed record. Raises ModelError."""
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        raise ModelError(
            Problem(str(path), f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}.", "This family cannot use that.")
            for entry in error.errors(include_url=False)
        ) from error


def meaning(config: JsonObject) -> dict[str, object]:
    """A config without what says nothing about the model: who wrote it, from where, in which storage type."""
    silent = ("transformers_version", "torch_dtype", "dtype", "architectures")
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in silent}


def check(source: CheckpointSource, version: Version, size: str | None) -> list[Problem]:
    """Every problem of the checkpoint. size: which it must be, if the user says so."""
    problems: list[Problem] = []
    if source.revision and not source.on_hub:
        problems.append(Problem(source.name, "revision is for hub ids, and this is a folder.", "Remove revision."))
    try:
        folder = source.folder
    except ModelError as error:
        return [*problems, *error.problems]
    for part, stem in STEMS.items():
        problems += weight_problems(folder / part, stem, may_be_fetched=source.may_fetch())
    problems += _identity(folder, version, size)
    return list(dict.fromkeys(problems))


def _identity(folder: Path, version: Version, size: str | None) -> list[Problem]:
    """Whether this is a checkpoint of this version and size, by its index, its configs and the headers of its weights."""
    problems: list[Problem] = []
    try:
        index, part = folder / "model_index.json", folder / "transformer"
        problems += index_problems(index, version)
        config = read_config(TransformerConfig, part / "config.json")
        known, wanted = identity(config.shapes()), f"{version.title} {size or ''}".rstrip()
        if not known.startswith(version.title) or not known.endswith(size or ""):
            what = f"this is {known or 'no Wan that is known'}, and [model] asks for {wanted}."
            problems.append(Problem(str(part / "config.json"), what, "Name another checkpoint, or another family or size."))
        if not weight_problems(part, STEMS["transformer"]):
            stored = stored_shapes(part, STEMS["transformer"])
            if (found := identity(stored)) != known:
                what = f"these weights are those of {found or 'no Wan'}, and the config beside them is of {known}."
                problems.append(Problem(str(part), what, "Take weights and config.json from the same model."))
            elif lines := misfits(config.shapes(), stored):
                problems.append(misfit_problem(part, lines))
        codec = read_config(CodecConfig, folder / "vae" / "config.json")
        if {codec.z_dim, len(codec.latents_mean), len(codec.latents_std)} != {config.in_channels}:
            what = f"the VAE has {codec.z_dim} latent channels, and the transformer takes {config.in_channels}."
            problems.append(Problem(str(folder / "vae" / "config.json"), what, "Take the VAE of this checkpoint."))
        text = read_json(folder / "text_encoder" / "config.json").get("d_model")
        if text != config.text_dim:
            what = f"the text encoder's width is {text}, and the transformer takes {config.text_dim}."
            problems.append(Problem(str(folder / "text_encoder" / "config.json"), what, "Take this checkpoint's own."))
    except ModelError as error:
        problems += error.problems
    return problems


def index_problems(path: Path, version: Version) -> list[Problem]:
    """Raises ModelError."""
    index, remedy = read_json(path), f"Name a checkpoint of {version.title} in [model] path."
    problems = []
    for part, wanted in CLASSES.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found not in wanted:
            what = f"{part} is {f'a {found}' if found else 'not listed'}, and this family works with {wanted[0]}."
            problems.append(Problem(str(path), what, remedy))
    if index.get("_class_name") != "WanPipeline":
        what = f"this is a checkpoint of {index.get('_class_name')}, and {version.title} is one of WanPipeline."
        problems.append(Problem(str(path), what, remedy))
    if index.get("boundary_ratio") is not None or index.get("transformer_2", [None, None]) != [None, None]:
        what = f"this checkpoint has two experts (Wan 2.2 A14B), and {version.title} has one transformer."
        problems.append(Problem(str(path), what, remedy))
    if bool(index.get("expand_timesteps")) != version.expand_timesteps:
        what = f"expand_timesteps is {index.get('expand_timesteps')}, and is not so with {version.title}."
        problems.append(Problem(str(path), what, remedy))
    return problems
