"""What is wrong with a model folder, all at once, from its JSON files and the headers of its weights. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from vtrain.contract import ModelError, Problem, misfit_problem, misfits, stored_shapes, weight_problems
from vtrain_sanavideo import installed
from vtrain_sanavideo.codec import LTX2_STATISTICS, ltx2_statistics
from vtrain_sanavideo.flow import scheduler_fault
from vtrain_sanavideo.geometry import SCALE_SHIFT_TABLE, AnyCodecConfig, CodecConfig, Ltx2CodecConfig, TransformerConfig
from vtrain_sanavideo.source import STEMS, CheckpointSource

CLASSES: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("Gemma2Model",),
    "tokenizer": ("GemmaTokenizerFast", "GemmaTokenizer"),
    "transformer": ("SanaVideoTransformer3DModel",),
    "vae": ("AutoencoderKLWan", "AutoencoderKLLTX2Video"),
}
"""The classes that this family works with; the scheduler may be any that follows a flow."""

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


def read_transformer(folder: Path) -> TransformerConfig:
    """The transformer's config, completed by its class's defaults. Raises ModelError."""
    defaults = installed.default_arguments(installed.TRANSFORMER, "SanaVideoTransformer3DModel", "__init__")
    return _typed(TransformerConfig, folder / "config.json", defaults)


def read_codec(folder: Path) -> AnyCodecConfig:
    """The VAE's config, completed by its class's defaults. Raises ModelError."""
    path, name = folder / "config.json", vae_class(folder)
    defaults, wan = _codec_defaults(name), name == CLASSES["vae"][0]
    config = _typed(CodecConfig, path, defaults) if wan else _typed(Ltx2CodecConfig, path, defaults)
    if faults := config.faults():
        raise ModelError(Problem(str(path), fault, "Take the VAE's own config.") for fault in faults)
    return config


def vae_class(folder: Path) -> str:
    """Of the VAEs that this family works with. Raises ModelError for another one."""
    path, known = folder / "config.json", CLASSES["vae"]
    found = read_json(path).get("_class_name", known[0])
    if found not in known:
        what = f"this VAE is a {found}, and this family works with {' or '.join(known)}."
        raise ModelError(Problem(str(path), what, "Take the VAE of this checkpoint, or another copy of it."))
    return str(found)


def codec_meaning(folder: Path) -> dict[str, object]:
    """What the VAE's config means, its class's defaults written out. Raises ModelError."""
    return _codec_defaults(vae_class(folder)) | meaning(read_json(folder / "config.json"))


def _codec_defaults(name: str) -> dict[str, object]:
    file = installed.VAE if name == CLASSES["vae"][0] else installed.LTX2_VAE
    return installed.default_arguments(file, name, "__init__")


def meaning(config: JsonObject) -> dict[str, object]:
    """A config without what says nothing about the model: who wrote it, from where, in which storage type."""
    silent = ("transformers_version", "torch_dtype", "dtype", "architectures")
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in silent}


def codec_folder(source: CheckpointSource) -> Path:
    """The VAE's folder: the sub-folder `vae` of a checkpoint, or the folder itself if it is a VAE alone."""
    alone = (source.folder / "config.json").is_file() and not (source.folder / "vae").exists()
    return source.folder if alone else source.folder / "vae"


def check(source: CheckpointSource, vae: CheckpointSource | None) -> list[Problem]:
    """Every problem of the checkpoint, and of the VAE that replaces its own, if any."""
    problems: list[Problem] = []
    if source.revision and not source.on_hub:
        problems.append(Problem(source.name, "revision is for hub ids, and this is a folder.", "Remove revision."))
    try:
        folder = source.folder
    except ModelError as error:
        return [*problems, *error.problems]
    problems += _index(folder)
    for part in STEMS:
        problems += _weights(folder / part, STEMS[part], source)
    problems += _tokenizer(folder / "tokenizer")
    problems += _scheduler(folder / "scheduler")
    problems += _geometry(folder)
    if vae is not None:
        problems += _other_vae(folder / "vae", vae)
    return list(dict.fromkeys(problems))


def _index(folder: Path) -> list[Problem]:
    path = folder / "model_index.json"
    try:
        index = read_json(path)
    except ModelError as error:
        return list(error.problems)
    problems = []
    for part, wanted in CLASSES.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found not in wanted:
            what = f"{part} is {f'a {found}' if found else 'not listed'}, and this family works with {' or '.join(wanted)}."
            problems.append(Problem(str(path), what, "Name a SANA-Video checkpoint in [model] path."))
        elif part == "vae" and (folder / part / "config.json").is_file():
            problems += _same_vae(path, str(found), folder / part)
    return problems


def _same_vae(index: Path, listed: str, folder: Path) -> list[Problem]:
    """diffusers loads the class of the index, whatever the VAE's own config says."""
    try:
        found = vae_class(folder)
    except ModelError:
        return []  # reported with the config
    what = f"the VAE is listed as a {listed}, and {folder.name}/config.json is of a {found}."
    return [] if found == listed else [Problem(str(index), what, "Take both files from the same checkpoint.")]


def _weights(folder: Path, stem: str, source: CheckpointSource) -> list[Problem]:
    if not folder.is_dir():
        return [Problem(str(folder), "this folder is missing.", "Is the model complete, and in diffusers layout?")]
    problems = weight_problems(folder, stem, may_be_fetched=source.may_fetch())
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if problems and pickled:  # beside sound safetensors they are not read, and do no harm
        what = f"the weights are pickled ({pickled[0]}), and pickles are not read."
        return [Problem(str(folder), what, "Convert them to safetensors.")]
    return problems


def _tokenizer(folder: Path) -> list[Problem]:
    config = folder / "tokenizer_config.json"
    problems = [] if config.is_file() else [Problem(str(config), "this file is missing.", "Download it again.")]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        problems.append(Problem(str(folder), "neither tokenizer.json nor tokenizer.model is here.", "Download one."))
    return problems


def _scheduler(folder: Path) -> list[Problem]:
    path = folder / "scheduler_config.json"
    try:
        fault = scheduler_fault(read_json(path))
    except ModelError as error:
        return list(error.problems)
    return [Problem(str(path), fault, "Take the checkpoint's own scheduler.")] if fault else []


def _geometry(folder: Path) -> list[Problem]:
    """The configs, the sizes that two of them share, and the transformer's weights."""
    problems: list[Problem] = []
    try:
        transformer = read_transformer(folder / "transformer")
    except ModelError as error:
        transformer = None
        problems += error.problems
    try:
        codec = read_codec(folder / "vae")
        problems += _statistics(folder / "vae", codec)
        if transformer is not None and codec.channels != transformer.in_channels:
            what = f"the VAE has {codec.channels} latent channels, and the transformer takes {transformer.in_channels}."
            problems.append(Problem(str(folder / "vae" / "config.json"), what, "Take the VAE of this checkpoint."))
    except ModelError as error:
        problems += error.problems
    try:
        text = read_json(folder / "text_encoder" / "config.json").get("hidden_size")
        if transformer is not None and text != transformer.caption_channels:
            what = f"the text encoder's width is {text}, and the transformer takes {transformer.caption_channels}."
            problems.append(Problem(str(folder / "text_encoder" / "config.json"), what, "Take this checkpoint's own."))
    except ModelError as error:
        problems += error.problems
    return problems + (_transformer_weights(folder / "transformer", transformer) if transformer is not None else [])


def _transformer_weights(folder: Path, config: TransformerConfig) -> list[Problem]:
    if weight_problems(folder, STEMS["transformer"]):
        return []  # reported, or still on the hub
    lines = misfits(config.shapes(), stored_shapes(folder, STEMS["transformer"]), (SCALE_SHIFT_TABLE,))
    return [misfit_problem(folder, lines)] if lines else []


def _statistics(folder: Path, config: AnyCodecConfig) -> list[Problem]:
    """The LTX-2 VAE has the mean and std of its latents among its weights."""
    if not isinstance(config, Ltx2CodecConfig) or weight_problems(folder, STEMS["vae"]):
        return []  # reported, or still on the hub
    try:
        ltx2_statistics(folder, config)
    except ModelError as error:
        return list(error.problems)
    return []


def _other_vae(own: Path, other: CheckpointSource) -> list[Problem]:
    """vae_path names another copy of the same VAE, or it is a mistake: latents of another one mean nothing here."""
    try:
        folder = codec_folder(other)
        config, mine = read_codec(folder), read_codec(own)
        theirs, ours = codec_meaning(folder), codec_meaning(own)
    except ModelError as error:
        return list(error.problems)
    path, remedy = str(folder / "config.json"), "Remove vae_path, or name a copy of the same VAE."
    if config.name != mine.name:
        what = f"vae_path is a {vae_class(folder)}, and the VAE of [model] path is a {vae_class(own)}."
        return [Problem(path, what, remedy)]
    problems = _weights(folder, STEMS["vae"], other)
    if odd := sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)):
        what = f"vae_path is not the VAE of [model] path: {', '.join(odd)} differ."
        problems.append(Problem(path, what, remedy))
    elif not problems:
        problems += _statistics(folder, config) or _other_statistics(own, folder, mine, remedy)
    return problems


def _other_statistics(own: Path, other: Path, config: AnyCodecConfig, remedy: str) -> list[Problem]:
    if not isinstance(config, Ltx2CodecConfig) or any(weight_problems(each, STEMS["vae"]) for each in (own, other)):
        return []
    try:
        pairs = zip(ltx2_statistics(own, config), ltx2_statistics(other, config), LTX2_STATISTICS, strict=True)
    except ModelError:
        return []  # of `own`, reported
    # The share that the rounding of a copy in bf16 changes.
    odd = [
        name
        for mine, theirs, name in pairs
        if any(abs(a - b) > abs(a) / 100 for a, b in zip(mine, theirs, strict=True))
    ]
    what = f"vae_path is not the VAE of [model] path: {', '.join(odd)} among the weights differ."
    return [Problem(str(other), what, remedy)] if odd else []


def _typed(kind: type[ConfigT], path: Path, defaults: JsonObject) -> ConfigT:
    try:
        return kind.model_validate({**defaults, **read_json(path)})
    except ValidationError as error:
        raise ModelError(
            Problem(str(path), f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}.", "This family cannot use that.")
            for entry in error.errors(include_url=False)
        ) from error
