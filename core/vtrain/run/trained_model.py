"""A checkpoint as a trained model: which one is meant, what it says of its family and adapter, which weights are evaluated.

What the run recorded describes the model: neither its configuration file nor its data are looked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from vtrain.config.keys import key_path
from vtrain.config.tables import LoraTable
from vtrain.contract import (
    CheckpointError,
    Family,
    FamilySpec,
    ModelError,
    ModelSource,
    Options,
    Problem,
    is_location,
)
from vtrain.contract.pipelines import ExportFormat
from vtrain.plan.places import CHECKPOINT, CHECKPOINTS, PLAN
from vtrain.registry import discover
from vtrain.registry.guard import stdout_on_stderr

if TYPE_CHECKING:
    from vtrain.train.resume import RunState

OptionsT = TypeVar("OptionsT", bound=Options)

RECORD = "export.json"
"""The file in an export that says where it comes from."""

Weights = Literal["last", "ema", "averaged"]
"""last: of the last step. ema: their average ([ema]). averaged: those for evaluation, of an optimizer that trains at others
(schedule-free), which are exported in the place of the last."""

_FOLDERS: Mapping[str, Weights] = {"ema": "ema", "averaged": "averaged"}
"""Folders of a checkpoint that hold weights beside the last."""


@dataclass(frozen=True)
class Source:
    """A checkpoint, the model that it is of, and what of it is exported. lora: of an adapter; None: all weights were trained.

    model: values of the family's options that say which model it is on, as they are used now.
    """

    checkpoint: Path
    state: RunState
    family: Family
    lora: LoraTable | None
    weights: Weights
    model: Mapping[str, object]
    warnings: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """What was trained lies here, in the format in which checkpoints have it."""
        return self.checkpoint if self.weights == "last" else self.checkpoint / self.weights

    @property
    def run(self) -> Path:
        """The run's output folder, or where the checkpoint lies alone."""
        above = self.checkpoint.parent
        return above.parent if above.name == CHECKPOINTS else above


def find_checkpoint(source: Path) -> tuple[Path, list[str]]:
    """The checkpoint that is meant, a run's newest sound one, or `source` itself if it is sound; and which were skipped.

    Raises CheckpointError.
    """
    from vtrain.train import checkpoint

    source = source.absolute()
    if (source / checkpoint.MANIFEST).is_file() or (CHECKPOINT.fullmatch(source.name) and source.is_dir()):
        if (reason := checkpoint.fault(source)) is not None:
            raise CheckpointError(Problem(str(source), f"this checkpoint is not sound: {reason}.", "Name another one."))
        return source, []
    parent = source if source.name == CHECKPOINTS else source / CHECKPOINTS
    if not parent.is_dir():
        raise CheckpointError(_none_here(source))
    newest, faults = checkpoint.latest(parent)
    if newest is None:
        why = f": {faults[0].folder.name}: {faults[0].reason}" if faults else ""
        raise CheckpointError(Problem(str(parent), f"no checkpoint here is sound{why}.", "Name another run."))
    return newest, [f"skipped the damaged checkpoint {found.folder}: {found.reason}" for found in faults]


def _none_here(source: Path) -> Problem:
    """Of what is neither a run nor a checkpoint."""
    if source.parent.name == CHECKPOINTS and not source.exists():
        names = sorted(each.name for each in source.parent.glob("step-*") if CHECKPOINT.fullmatch(each.name))
        there = f"There {'are' if len(names) > 1 else 'is'} {', '.join(names[-6:])}." if names else ""
        return Problem(str(source), "there is no such checkpoint.", there)
    if source.name in _FOLDERS and CHECKPOINT.match(source.parent.name):
        how = f"vtrain export {source.parent}{' --ema' if source.name == 'ema' else ''}"
        return Problem(str(source), "this is a part of a checkpoint.", f"Name the checkpoint: {how}")
    if (source / PLAN).is_file():
        remedy = "Its first one comes at checkpoint.every, and where it ends or is stopped."
        return Problem(str(source), "this run has saved no checkpoint yet.", remedy)
    if (source / RECORD).is_file():
        return Problem(str(source), "this is an export already.", "Name the run or the checkpoint that it is of.")
    what = "this is neither a run's output folder nor a checkpoint." if source.exists() else "there is no such folder."
    remedy = "Name the run.output_dir of a run, or one of its checkpoints, such as output/checkpoints/step-000500."
    return Problem(str(source), what, remedy)


def open_source(
    folder: Path, *, ema: bool = False, model: str | None = None, form: ExportFormat | None = None
) -> Source:
    """What a checkpoint says of its model. model: where that is now. form: what it is wanted as.

    Raises CheckpointError, PluginError, ModelError.
    """
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
        own = {str(path[0]): each for path, each in values.items() if len(path) == 1}
        whole = form == "pipeline" or (form is None and values.get(("train",)) != "lora")
        given, warnings = _placed(spec.options, own, folder, model, whole=whole)
        family = spec.build(_table(spec.options, given, folder, state))
        if problems := family.check():
            raise ModelError(problems)
    lora = {str(path[1]): each for path, each in values.items() if path[0] == "lora" and len(path) > 1}
    table = _table(LoraTable, lora, folder, state) if values.get(("train",)) == "lora" else None
    places = {name: each for name, each in given.items() if name == "revision" or is_location(spec.options, name)}
    return Source(folder, state, family, table, _weights(folder, ema=ema), places, tuple(warnings))


def _weights(folder: Path, *, ema: bool) -> Weights:
    if ema and not (folder / "ema").is_dir():
        averaged = (folder / "averaged").is_dir()
        what = "this checkpoint has no averaged weights: it was saved without [ema]."
        remedy = "Export without --ema" + (
            ": its optimizer's own averaged weights are exported then." * averaged or "."
        )
        if beside := sorted(
            each.parent for each in folder.parent.glob("*/ema") if CHECKPOINT.fullmatch(each.parent.name)
        ):
            remedy += f" {beside[-1].name} beside it has some."
        raise CheckpointError(Problem(str(folder), what, remedy))
    return "ema" if ema else "averaged" if (folder / "averaged").is_dir() else "last"


def _placed(
    kind: type[Options], values: Mapping[str, object], folder: Path, model: str | None, *, whole: bool
) -> tuple[dict[str, object], list[str]]:
    """A family's options as the run recorded them, with places that are there; and warnings. Raises CheckpointError."""
    given = {name: each for name, each in values.items() if name in kind.model_fields and each is not None}
    if model is not None and (place := _model_place(model)) != given.get("path"):
        given["path"] = place
        given.pop("revision", None)  # of the place that it was at
    warnings = []
    for name, each in list(given.items()):
        if not (is_location(kind, name) and isinstance(each, str) and Path(each).is_absolute()) or Path(each).exists():
            continue
        if name == "path" or kind.model_fields[name].is_required():
            what = f"the model that it was trained from is not at {each} any more."
            raise CheckpointError(Problem(str(folder), what, "Say where it is: --model FOLDER, or a hub id."))
        if whole:
            what = f"a pipeline needs what model.{name} was, and it is not at {each} any more."
            remedy = "Put it back there, or export the transformer alone: --format merged."
            raise CheckpointError(Problem(str(folder), what, remedy))
        warnings.append(f"model.{name} is not at {each} any more: this export does not need it")
        del given[name]
    return given, warnings


def _model_place(model: str) -> str:
    """Of --model: an absolute folder, or a hub id. Raises CheckpointError."""
    try:
        place: str = TypeAdapter(ModelSource).validate_python(model)
    except ValidationError as error:
        raise CheckpointError(Problem("--model", f"{error.errors()[0]['msg']}.")) from error
    if Path(place).is_absolute() and not Path(place).is_dir():
        raise CheckpointError(Problem("--model", f"there is no folder {place}.", "Name the model folder, or a hub id."))
    return place


def _table(kind: type[OptionsT], values: Mapping[str, object], folder: Path, state: RunState) -> OptionsT:
    """As the configuration file was read: in the same mode, and relative to its folder."""
    known = {name: each for name, each in values.items() if name in kind.model_fields}
    try:
        return kind.model_validate(known, context={"folder": state.folder or folder})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"its settings are none of this version: {'.'.join(map(str, first['loc']))}: {first['msg']}."
        raise CheckpointError(
            Problem(str(folder), what, "Export it with the vtrain that it was trained with.")
        ) from error
