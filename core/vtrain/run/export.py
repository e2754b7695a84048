"""A checkpoint for other tools: a pipeline folder, a merged model, a LoRA file. Each is read back and proved before it is kept."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from vtrain import __version__
from vtrain.contract import (
    CheckpointError,
    ConfigError,
    Denoiser,
    DType,
    ModelError,
    Problem,
    SupportsLora,
    SupportsOriginalNames,
    comfyui_names,
    torch_type,
)
from vtrain.contract.pipelines import ExportFormat, SupportsReference
from vtrain.contract.specs import bytes_text
from vtrain.plan.adapter import lora_scale
from vtrain.plan.places import CHECKPOINT, CHECKPOINTS
from vtrain.plan.precision import loaded_in
from vtrain.run.trained_model import RECORD, Source, Weights, find_checkpoint, open_source

if TYPE_CHECKING:
    from torch import Tensor

    from vtrain.run.proof import Probe, Proof

EXPORTS, MANIFEST = "exports", "MANIFEST.json"
PARTIAL = ".partial"
BYTES: Mapping[DType, int] = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Exported:
    """An export that was proved. weights: which of the checkpoint's. error, effect, tolerance, rounding: as `Proof` has them.
    warnings: what its reader should know."""

    folder: Path
    export: ExportFormat
    checkpoint: Path
    step: int
    weights: Weights
    error: float
    effect: float | None
    tolerance: float
    rounding: float | None
    warnings: tuple[str, ...]


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
    folder, skipped = find_checkpoint(source)
    found = open_source(folder, ema=ema, model=model, form=form)
    chosen: ExportFormat = form or ("pipeline" if found.lora is None else "lora")
    target = to or found.run / EXPORTS / f"{folder.name}-{chosen}{'-ema' if ema else ''}"
    check(found, chosen, target, dtype)
    try:
        with _aside(target) as aside:
            proof = _write_and_prove(found, chosen, aside, dtype, on_part)
            _record(found, chosen, aside, dtype, proof)
            aside.rename(target)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"{'Make room on the disk, or choose' if full else 'Choose'} another folder with --to."
        raise CheckpointError(Problem(str(target), f"the export could not be written: {error}.", remedy)) from error
    dora = "a DoRA in peft's keys: diffusers reads it with this file's metadata; for tools that do not, export merged"
    warnings = (*skipped, *found.warnings, *_left_behind(target), *proof.warnings)
    return Exported(
        target, chosen, folder, found.state.step, found.weights, proof.error, proof.effect, proof.tolerance,
        proof.rounding, (*warnings, *((dora,) if chosen == "lora" and found.lora and found.lora.dora else ())),
    )  # fmt: skip


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A new folder beside the target, gone afterwards if it was not renamed. What is there already is nobody's to delete."""
    for turn in count(1):
        aside = target.with_name(f"{target.name}.{os.getpid()}-{turn}{PARTIAL}")
        with suppress(FileExistsError):
            aside.mkdir(parents=True)
            break
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _left_behind(target: Path) -> Iterator[str]:
    """Folders of exports to the same place that were killed, or that are being written by another process."""
    own = re.compile(rf"{re.escape(target.name)}\.\d+-\d+{re.escape(PARTIAL)}")
    for path in sorted(target.parent.iterdir()):
        if own.fullmatch(path.name) and path.is_dir():
            yield f"{path} is of an export that did not end: if none is running, delete it"


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
    place = next(folder for folder in target.parents if folder.exists())
    if not place.is_dir():
        return [Problem(str(target), f"{place} is a file.", "Choose another --to.")]
    if not os.access(place, os.W_OK):
        return [Problem(str(target), f"{place} may not be written to.", "Choose another --to.")]
    for folder in (Path(os.path.realpath(target)), *Path(os.path.realpath(target)).parents):
        # What is added to a checkpoint makes it unsound, and a folder beside them would be taken for one.
        inside = (folder / MANIFEST).is_file()
        if inside or _holds_checkpoints(folder):
            kind = "a checkpoint" if inside else "where a run keeps its checkpoints"
            what = f"{folder} is {kind}, and nothing else belongs there."
            return [Problem(str(target), what, "Choose another --to; without, it goes to the run's exports/.")]
    return []


def _holds_checkpoints(folder: Path) -> bool:
    there = folder.name == CHECKPOINTS and folder.is_dir()
    return there and any(CHECKPOINT.fullmatch(path.name) for path in folder.iterdir())


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
    rounded = proof.Rounded.of(denoiser, probe, torch_type(dtype)) if dtype != "fp32" else None
    denoiser.module.to("meta")  # its memory is free for the one that is read back
    on_part("reading it back")
    try:
        read = proof.reread(source.family, denoiser, folder, form, source.lora)
    except ModelError as error:
        raise CheckpointError(_unread(source, form, each) for each in error.problems) from error
    found = proof.Proof.of(trained, plain, probe.run(read.denoiser), rounded, read.original)
    if fault := found.fault:
        raise CheckpointError(Problem(str(source.checkpoint), fault, _REPORT))
    return found


_REPORT = "The export was not kept. Report it with the versions of diffusers, peft and the family's plugin."


def _unread(source: Source, form: ExportFormat, problem: Problem) -> Problem:
    """Of an export that the original library does not read."""
    if form != "comfyui":
        return Problem(str(source.checkpoint), problem.what, _REPORT)
    what = f"diffusers does not read an adapter of all these layers in ComfyUI's keys, so that none can be proved: {problem.what}"
    return Problem(str(source.checkpoint), what, "Use --format lora, in diffusers' keys, or --format merged.")


def _trained(source: Source, probe: Probe) -> tuple[Denoiser, Tensor | None]:
    """The model as trained, fp32 on the CPU, and what it predicted without its adapter: None where all weights were trained."""
    from vtrain.train.parameters import add_lora, load_lora_state

    family, lora = source.family, source.lora
    if lora is None:
        denoiser = family.load_denoiser("cpu", "fp32", source.folder)
        denoiser.module.eval()
        return denoiser, None
    _check_base(source)
    denoiser = family.load_denoiser("cpu", "fp32")
    denoiser.module.eval()
    plain = probe.run(denoiser)
    add_lora(denoiser, lora, 0, str(source.checkpoint))
    assert isinstance(denoiser, SupportsLora)
    if odd := load_lora_state(denoiser.module, denoiser.load_lora(source.folder)):
        what = f"its adapter does not fit the model: {', '.join(odd[:3])}."
        raise CheckpointError(Problem(str(source.checkpoint), what))
    denoiser.module.eval()
    return denoiser, plain


def _check_base(source: Source) -> None:
    """That the model folder has the weights that the adapter was trained on. Raises CheckpointError."""
    from vtrain.train.parameters import base_mark

    # As training read them: what is quantised is marked before that, in bf16.
    marked = source.family.load_denoiser("cpu", loaded_in(str(source.state.settings.get("precision.base"))))
    if base_mark(marked.module) != source.state.base:
        place = source.model.get("path") or "the model"
        what = f"its adapter was trained on other weights than {place} has now."
        raise CheckpointError(Problem(str(source.checkpoint), what, "Say where the model is: --model FOLDER."))


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
    save_comfyui(folder, state, names, lora_scale(source.lora), name)


def _record(source: Source, form: ExportFormat, folder: Path, dtype: DType, proof: Proof) -> None:
    """Where the export comes from, what it is, what was proved of it, and the hashes of what was trained."""
    from vtrain.train.readback import read_through

    manifest = (source.checkpoint / MANIFEST).read_bytes()
    settings = source.state.settings
    content = {
        "format": form,
        "dtype": dtype,
        "weights": source.weights,
        "vtrain": __version__,
        "run": settings.get("run.name"),
        "step": source.state.step,
        "checkpoint": str(source.checkpoint),
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "model": source.model.get("path"),
        "revision": source.model.get("revision"),
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
