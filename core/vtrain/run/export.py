"""A checkpoint for other tools: a pipeline folder, a merged model, a LoRA file. Each is read back and proved before it is kept.

What the run recorded describes the model: neither its configuration file nor its data are looked for.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from vtrain import __version__
from vtrain.config.keys import key_path
from vtrain.config.tables import LoraTable
from vtrain.contract import (
    CheckpointError,
    ConfigError,
    DType,
    Family,
    FamilySpec,
    ModelError,
    Options,
    Problem,
    SupportsLora,
    SupportsOriginalNames,
    comfyui_names,
    is_location,
    torch_type,
)
from vtrain.contract.pipelines import ExportFormat, SupportsReference
from vtrain.contract.specs import bytes_text
from vtrain.plan.adapter import lora_scale
from vtrain.plan.places import CHECKPOINT, CHECKPOINTS
from vtrain.registry import discover
from vtrain.registry.guard import stdout_on_stderr

if TYPE_CHECKING:
    from vtrain.contract import Denoiser
    from vtrain.run.proof import Proof
    from vtrain.train.resume import RunState

OptionsT = TypeVar("OptionsT", bound=Options)

EXPORTS, RECORD, EMA = "exports", "export.json", "ema"
PARTIAL = ".partial"
BYTES: Mapping[DType, int] = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Exported:
    """An export that was proved. error, effect: as `Proof` has them. warnings: what its reader should know."""

    folder: Path
    export: ExportFormat
    checkpoint: Path
    step: int
    error: float
    effect: float | None
    tolerance: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A checkpoint, the model that it is of, and what of it is exported. lora: of an adapter; None: all weights were trained.

    weights: the folder with what was trained, the checkpoint's own or its average's.
    """

    checkpoint: Path
    state: RunState
    family: Family
    lora: LoraTable | None
    weights: Path

    @property
    def run(self) -> Path:
        """The run's output folder, or where the checkpoint lies alone."""
        above = self.checkpoint.parent
        return above.parent if above.name == CHECKPOINTS else above


def export(
    source: Path,
    to: Path | None = None,
    form: ExportFormat | None = None,
    *,
    ema: bool = False,
    model: str | None = None,
    dtype: DType = "fp32",
    on_part: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Export a run's newest checkpoint, or a checkpoint.

    form: absent: "lora" of an adapter, "pipeline" of a whole model. to: a new folder; absent: in exports/ of the run. ema: the
    averaged weights. model: where the model folder is now, if not where it was. dtype: of exported whole weights. on_part:
    called with what is done next. Raises CheckpointError, ConfigError, ModelError, PluginError; nothing is left then.
    """
    found = open_source(find_checkpoint(source), ema=ema, model=model)
    chosen: ExportFormat = form or ("pipeline" if found.lora is None else "lora")
    target = to or found.run / EXPORTS / f"{found.checkpoint.name}-{chosen}{'-ema' if ema else ''}"
    check(found, chosen, target, dtype)
    aside = target.with_name(target.name + PARTIAL)
    shutil.rmtree(aside, ignore_errors=True)  # what a killed export left
    try:
        aside.mkdir(parents=True)
        proof = _write_and_prove(found, chosen, aside, dtype, on_part)
        _record(found, chosen, aside, dtype, ema, proof)
        aside.rename(target)
    except OSError as error:
        remedy = "Make room on the disk, or choose another folder with --to."
        raise CheckpointError(Problem(str(target), f"the export could not be written: {error}.", remedy)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    dora = "a DoRA in peft's keys: diffusers reads it with this file's metadata; for tools that do not, export merged"
    told = (*proof.warnings, *((dora,) if chosen == "lora" and found.lora and found.lora.dora else ()))
    return Exported(
        target, chosen, found.checkpoint, found.state.step, proof.error, proof.effect, proof.tolerance, told
    )


def find_checkpoint(source: Path) -> Path:
    """The checkpoint that is meant: a run's newest sound one, or `source` itself if it is sound. Raises CheckpointError."""
    from vtrain.train import checkpoint

    source = source.absolute()
    if (source / checkpoint.MANIFEST).is_file() or CHECKPOINT.match(source.name):
        if (reason := checkpoint.fault(source)) is not None:
            raise CheckpointError(Problem(str(source), f"this checkpoint is not sound: {reason}.", "Name another one."))
        return source
    parent = source if source.name == CHECKPOINTS else source / CHECKPOINTS
    if not parent.is_dir():
        what = (
            "there is no such folder."
            if not source.exists()
            else "this is neither a run's output folder nor a checkpoint."
        )
        remedy = "Name the run.output_dir of a run, or one of its checkpoints, such as output/checkpoints/step-000500."
        raise CheckpointError(Problem(str(source), what, remedy))
    newest, faults = checkpoint.latest(parent)
    if newest is None:
        why = f": {faults[0].folder.name}: {faults[0].reason}" if faults else ""
        raise CheckpointError(Problem(str(parent), f"no checkpoint here is sound{why}.", "Name another run."))
    return newest


def open_source(folder: Path, *, ema: bool = False, model: str | None = None) -> Source:
    """What a checkpoint says of its model. Raises CheckpointError, PluginError, ModelError."""
    from vtrain.train.resume import read_state

    state = read_state(folder)
    values = {key_path(key)[1:]: value for key, value in state.settings.items() if key_path(key)[0] == "model"}
    with stdout_on_stderr():  # plugins' code is imported
        registered = discover().find("family", use := str(values.get(("use",))))
        if registered is None:
            what = f'its model is of the family "{use}", which is not installed.'
            raise CheckpointError(
                Problem(str(folder), what, "Install its plugin: vtrain plugins list shows what is there.")
            )
        spec = registered.spec
        assert isinstance(spec, FamilySpec)
        options = _options(
            spec.options, {path[0]: each for path, each in values.items() if len(path) == 1}, folder, model
        )
        family = spec.build(options)
        if problems := family.check():
            raise ModelError(problems)
    lora = {str(path[1]): each for path, each in values.items() if len(path) > 1 and path[0] == "lora"}
    table = _table(LoraTable, lora, folder) if values.get(("train",)) == "lora" else None
    if ema and not (folder / EMA).is_dir():
        what = "this checkpoint has no averaged weights: the run was made without [ema]."
        raise CheckpointError(Problem(str(folder), what, "Export without --ema."))
    return Source(folder, state, family, table, folder / EMA if ema else folder)


def _options(kind: type[Options], values: Mapping[object, object], folder: Path, model: str | None) -> Options:
    """A family's options as the run recorded them. model: another place of the model folder."""
    given = {str(name): each for name, each in values.items() if name in kind.model_fields and each is not None}
    if model is not None:
        given["path"] = model
    gone = [
        (name, each)
        for name, each in given.items()
        if is_location(kind, name) and isinstance(each, str) and Path(each).is_absolute() and not Path(each).exists()
    ]
    if gone and gone[0][0] == "path":
        what = f"the model that it was trained from is not at {gone[0][1]} any more."
        raise CheckpointError(Problem(str(folder), what, "Say where it is: --model FOLDER, or a hub id."))
    return _table(kind, given, folder)


def _table(kind: type[OptionsT], values: Mapping[str, object], folder: Path) -> OptionsT:
    try:
        known = {name: each for name, each in values.items() if name in kind.model_fields}
        return kind.model_validate_json(json.dumps(known))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"its settings are none of this version: {'.'.join(map(str, first['loc']))}: {first['msg']}."
        raise CheckpointError(
            Problem(str(folder), what, "Export it with the vtrain that it was trained with.")
        ) from error


def check(source: Source, form: ExportFormat, target: Path, dtype: DType) -> None:
    """Raises ConfigError for what cannot be exported so, or where it is to go."""
    problems = [*_format_problems(source, form, dtype), *_target_problems(target)]
    if problems:
        raise ConfigError(problems)
    size = 0
    if form in ("pipeline", "merged"):
        size = source.family.parameters * BYTES[dtype]
    if form == "pipeline" and isinstance(source.family, SupportsReference):
        size += source.family.parts_bytes()
    place = next(folder for folder in target.parents if folder.is_dir())
    if (free := shutil.disk_usage(place).free) < size:
        what = f"the export takes {bytes_text(size)}, and {bytes_text(free)} are free."
        raise ConfigError(Problem(str(target), what, "Make room, or choose a folder on another disk with --to."))


def _format_problems(source: Source, form: ExportFormat, dtype: DType) -> list[Problem]:
    lora, family = source.lora, source.family
    problems = []
    if form in ("lora", "comfyui") and lora is None:
        what = f"all weights were trained, so that there is no LoRA to export as {form}."
        problems.append(Problem("--format", what, "Use --format pipeline or merged."))
    if form == "comfyui" and lora is not None and lora.dora:
        what = "DoRA's magnitudes have no key by which a loader here could prove them: diffusers' drop dora_scale with a warning."
        problems.append(Problem("--format", what, "Use --format merged or pipeline, which hold the whole effect."))
    if form in ("lora", "comfyui") and dtype != "fp32":
        what = "a LoRA is exported in fp32, as it was trained: its file is small."
        problems.append(Problem("--dtype", what, "Leave it out, or use --format merged or pipeline."))
    if form == "comfyui" and not getattr(family, "original_names", None):
        what = "the names by which ComfyUI knows the modules of this model family are not known."
        problems.append(Problem("--format", what, "Use --format lora, in diffusers' keys."))
    if form == "pipeline" and not isinstance(family, SupportsReference):
        what = "this model family does not say what a pipeline of it is (SupportsReference)."
        problems.append(Problem("--format", what, "Use --format merged."))
    return problems


def _target_problems(target: Path) -> list[Problem]:
    if target.exists() or target.is_symlink():
        return [Problem(str(target), "this is there already, and nothing is written over.", "Choose another --to.")]
    return []


def _write_and_prove(
    source: Source, form: ExportFormat, folder: Path, dtype: DType, on_part: Callable[[str], None]
) -> Proof:
    """Write the export into `folder`, and read it back by the original library. Raises CheckpointError for what is not the same."""
    from vtrain.run import proof

    on_part("loading the model")
    probe = proof.Probe.of(source.family)
    denoiser, plain = _trained(source, probe)
    trained = probe.run(denoiser)
    on_part("writing")
    _write(source, form, folder, dtype, denoiser)
    denoiser.module.to("meta")  # its memory is free for the one that is read back
    on_part("reading it back")
    read = proof.reread(source.family, denoiser, folder, form, source.lora)
    found = proof.Proof.of(trained, plain, probe.run(read.denoiser), dtype, read.original)
    if fault := found.fault:
        remedy = "The export was not kept. Report it with the versions of diffusers, peft and the family's plugin."
        raise CheckpointError(Problem(str(source.checkpoint), fault, remedy))
    return found


def _trained(source: Source, probe: object) -> tuple[Denoiser, object]:
    """The model as trained, fp32 on the CPU, and what it predicted without its adapter: None where all weights were trained."""
    from vtrain.run.proof import Probe
    from vtrain.train.parameters import add_lora, base_mark, load_lora_state

    assert isinstance(probe, Probe)
    family, lora = source.family, source.lora
    if lora is None:
        denoiser = family.load_denoiser("cpu", "fp32", source.weights)
        denoiser.module.eval()
        return denoiser, None
    base = source.state.settings.get("precision.base")
    if base in BYTES and source.state.base:
        marked = family.load_denoiser("cpu", "bf16" if base == "bf16" else "fp32")
        if base_mark(marked.module) != source.state.base:
            what = "its adapter was trained on other weights than the model folder has now."
            raise CheckpointError(Problem(str(source.checkpoint), what, "Say where the model is: --model FOLDER."))
        del marked
    denoiser = family.load_denoiser("cpu", "fp32")
    denoiser.module.eval()
    plain = probe.run(denoiser)
    add_lora(denoiser, lora, 0, str(source.checkpoint))
    assert isinstance(denoiser, SupportsLora)
    if odd := load_lora_state(denoiser.module, denoiser.load_lora(source.weights)):
        what = f"its adapter does not fit the model: {', '.join(odd[:3])}."
        raise CheckpointError(Problem(str(source.checkpoint), what))
    denoiser.module.eval()
    return denoiser, plain


def _write(source: Source, form: ExportFormat, folder: Path, dtype: DType, denoiser: Denoiser) -> None:
    from vtrain.train.adapter import folded_settings, merged_state, save_comfyui
    from vtrain.train.parameters import lora_settings, lora_state
    from vtrain.train.pieces import on_cpu

    if form in ("pipeline", "merged"):
        denoiser.save(folder, on_cpu(merged_state(denoiser.module, torch_type(dtype))))
        if form == "pipeline":
            assert isinstance(source.family, SupportsReference)
            source.family.save_parts(folder)
        return
    assert source.lora is not None
    assert isinstance(denoiser, SupportsLora)
    state = {name: value.detach() for name, value in lora_state(denoiser.module).items()}
    if form == "lora":
        denoiser.save_lora(folder, state, folded_settings(lora_settings(denoiser, source.lora)))
        return
    assert isinstance(denoiser, SupportsOriginalNames)
    name = f"{source.run.name}-{source.checkpoint.name}-comfyui.safetensors"
    names = comfyui_names(state, denoiser.original_names)
    save_comfyui(folder, state, names, lora_scale(source.lora) * source.lora.rank, name)


def _record(source: Source, form: ExportFormat, folder: Path, dtype: DType, ema: bool, proof: Proof) -> None:
    """Where the export comes from, what it is, what was proved of it, and the hashes of what was trained."""
    from vtrain.train.checkpoint import MANIFEST
    from vtrain.train.readback import read_through

    manifest = (source.checkpoint / MANIFEST).read_bytes()
    settings = source.state.settings
    content = {
        "format": form,
        "dtype": dtype,
        "ema": ema,
        "vtrain": __version__,
        "run": settings.get("run.name"),
        "step": source.state.step,
        "checkpoint": str(source.checkpoint),
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "model": settings.get("model.path"),
        "revision": settings.get("model.revision"),
        "base": source.state.base,
        "started_from": source.state.adapter,
        "lora": source.lora.model_dump(mode="json", exclude={"start"}) if source.lora else None,
        "proof": {key: each for key, each in asdict(proof).items() if key != "warnings"},
        "files": {
            path.relative_to(folder).as_posix(): read_through(path)[0]
            for path in sorted(folder.rglob("*.safetensors"))
            if path.parent.name in ("transformer", folder.name)
        },
    }
    with suppress(KeyError):
        content["plugin"] = source.state.versions[f"family {settings['model.use']}"]
    (folder / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
