"""Going on from a checkpoint: which one, and which changes of the configuration it allows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vtrain.config.record import Config, Part, TableT
from vtrain.contract import CheckpointError, Options, Problem, resume_rule
from vtrain.plan.make import resume_path
from vtrain.plan.records import Plan
from vtrain.train import checkpoint

STATE = "state.json"
Value = str | int | float | bool | list[object] | None


@dataclass(frozen=True)
class Setting:
    """A resolved value of the configuration. refuse: whether a resumed run must have the same."""

    value: Value
    refuse: bool


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    step: optimizer steps done. micro_batch: the next global one. settings: key -> value. data: names the samples and
    their shapes (`Index.mark`). base: names the weights under an adapter (`base_mark`), "" when all weights are trained.
    features: regularizer -> fingerprint of the features that it learns from, of those that read some.
    """

    step: int
    micro_batch: int
    settings: Mapping[str, Value]
    data: str
    base: str
    features: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """Where a run begins. folder: the checkpoint it goes on from, None for a new run. notices: to tell the user."""

    folder: Path | None
    state: RunState
    notices: tuple[str, ...]


def settings(plan: Plan) -> dict[str, Setting]:
    """Every value by its dotted key, with its resume rule; what the file leaves open is as the plan resolved it."""
    found = declared(plan.config)
    resolved = {key: Setting(value, found[key].refuse) for key, value in _resolved(plan).items()}
    return found | resolved | {"processes": Setting(plan.processes, refuse=False)}


def declared(config: Config) -> dict[str, Setting]:
    """Every value of the file or its default, with its resume rule; None where the plan decides."""
    found: dict[str, Setting] = {}
    for name, table in (
        ("run", config.run),
        ("precision", config.precision),
        ("cache", config.cache),
        ("train", config.train),
        ("lr_schedule", config.lr_schedule),
        ("checkpoint", config.checkpoint),
        ("validation", config.validation),
    ):
        if table is not None:
            _flatten(found, name, table, refuse=False)
    _part(found, "model", config.model, refuse=True)
    _part(found, "sampler", config.sampler, refuse=True)
    _part(found, "optimizer", config.optimizer, refuse=True)
    for number, data in enumerate(config.data):
        _part(found, f"data[{number}]", data, refuse=False)
    for regularizer in config.regularizers:
        _part(found, f"regularizer.{regularizer.registered.spec.name}", regularizer, refuse=True)
    for number, tracker in enumerate(config.trackers):
        _part(found, f"tracker[{number}]", tracker, refuse=False)
    return found


def _resolved(plan: Plan) -> dict[str, Value]:
    values: dict[str, Value] = {"precision.base": plan.base}
    lora = plan.config.model.table.lora
    if lora is not None:
        values["model.lora.alpha"] = lora.alpha or float(lora.rank)
    enabled = [number for number, part in enumerate(plan.config.data) if part.table.enabled]
    for number, dataset in zip(enabled, plan.datasets, strict=True):
        values[f"data[{number}].id"] = dataset.id
        values[f"data[{number}].resolution"] = [str(size) for size in dataset.sizes]
        values[f"data[{number}].video.frames"] = dataset.frames
        values[f"data[{number}].video.min_frames"] = dataset.min_frames
        values[f"data[{number}].video.fps"] = dataset.fps
    made = plan.validation
    if made is not None:
        values["validation.size"] = str(made.shape.size)
        values["validation.frames"] = made.shape.frames
        values["validation.fps"] = made.fps
    return values


def _part(found: dict[str, Setting], name: str, part: Part[TableT], refuse: bool) -> None:
    found[f"{name}.use"] = Setting(part.registered.spec.name, refuse)
    _flatten(found, name, part.table, refuse=False)
    _flatten(found, name, part.options, refuse=False)


def _flatten(found: dict[str, Setting], prefix: str, table: Options, refuse: bool) -> None:
    plain = table.model_dump(mode="json")
    for key in type(table).model_fields:
        rule = refuse or resume_rule(type(table), key) == "refuse"
        inner = _value(table, key)
        if isinstance(inner, Options):
            _flatten(found, f"{prefix}.{key}", inner, rule)
        else:
            found[f"{prefix}.{key}"] = Setting(plain[key], rule)


def _value(table: Options, key: str) -> object:
    return dict(table)[key]


def read_state(folder: Path) -> RunState:
    """Raises CheckpointError when the state cannot be read."""
    try:
        return RunState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(Problem(str(folder / STATE), f"cannot be read: {error}.")) from error


def write_state(folder: Path, state: RunState) -> None:
    (folder / STATE).write_text(json.dumps(state.__dict__, indent=1), encoding="utf-8")


def find_start(plan: Plan) -> Start:
    """Pick the checkpoint that [run].resume asks for and compare the configurations.

    Raises CheckpointError when it is damaged or belongs to a run that this file does not describe.
    """
    folder, notices = _choose(plan.config)
    now = settings(plan)
    values = {key: setting.value for key, setting in now.items()}
    if folder is None:
        return Start(None, RunState(0, 0, values, "", ""), tuple(notices))
    state = read_state(folder)
    changes = compare(state.settings, now)
    refused = [f"{key} was {_show(old)} and is now {_show(new)}" for key, old, new, refuse in changes if refuse]
    if refused:
        remedy = "Restore it, or start anew with another run.output_dir."
        problems = [Problem("", f"{change}; this cannot change in a resumed run.") for change in refused]
        raise CheckpointError([Problem(str(folder), "this checkpoint is of another run.", remedy), *problems])
    notices.append(f"going on from {folder} (step {state.step})")
    notices += [f"changed since: {key}: {_show(old)} -> {_show(new)}" for key, old, new, _ in changes]
    return Start(folder, state, tuple(notices))


def compare(old: Mapping[str, Value], new: Mapping[str, Setting]) -> list[tuple[str, Value, Value, bool]]:
    """(key, old value, new value, whether it refuses) of all that differ. A key that only one side has counts as None."""
    changes = []
    for key in sorted({*old, *new}):
        before, setting = old.get(key), new.get(key)
        now = setting.value if setting else None
        refuse = setting.refuse if setting else key.startswith(("model.", "regularizer.", "sampler.", "optimizer.use"))
        if before != now and key != "run.resume":
            changes.append((key, before, now, refuse))
    return changes


def _show(value: Value) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)


def _choose(config: Config) -> tuple[Path | None, list[str]]:
    parent = config.run.output_dir / "checkpoints"
    if config.run.resume == "never":
        if checkpoint.steps_saved(parent):
            what = 'resume = "never", and the folder holds checkpoints of an earlier run.'
            raise CheckpointError(Problem(str(parent), what, "Choose another run.output_dir, or move them away."))
        return None, []
    if config.run.resume != "latest":
        folder = resume_path(config)
        reason = checkpoint.fault(folder)
        if reason is not None:
            raise CheckpointError(Problem(str(folder), f"this checkpoint is not sound: {reason}.", "Name another one."))
        return folder, []
    folder_or_none, faults = checkpoint.latest(parent)
    if folder_or_none is None and faults:
        remedy = "Nothing was deleted. Move them away to start anew."
        problems = [Problem(str(found.folder), f"not a sound checkpoint: {found.reason}.") for found in faults]
        raise CheckpointError([*problems, Problem(str(parent), "no checkpoint here is sound.", remedy)])
    notices = [f"passed over {found.folder}: {found.reason}" for found in faults]
    if folder_or_none is None:
        notices.append("no checkpoint yet: starting anew")
    return folder_or_none, notices
