"""Going on from a checkpoint: which one, and which changes of the configuration it allows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from vtrain.config.keys import KeyPath, as_called_now, key_path, key_text
from vtrain.config.record import TABLES, Config, Value, rule_when_gone, show
from vtrain.contract import CheckpointError, Problem, Resume, SupportsFeatures
from vtrain.data.sample import TRANSFORM_VERSION
from vtrain.data.scanning.database import HASHES, FileHashes
from vtrain.plan.make import base_of
from vtrain.plan.places import CHECKPOINT, CHECKPOINTS, checkpoints_there, resume_path
from vtrain.plan.records import Plan
from vtrain.train import checkpoint
from vtrain.train.checkpoint import misread, read_model

STATE = "state.json"
MOST = 2**48
"""Steps and micro-batches: no run has as many."""


@dataclass(frozen=True)
class Setting:
    """A resolved value of the configuration, and what another one means at a resume. location: it says where something is."""

    value: Value
    resume: Resume
    location: bool = False


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was: None where it was, or is, not there."""

    key: str
    old: object
    new: Value
    resume: Resume
    location: bool = False

    def __str__(self) -> str:
        return f"changed since the checkpoint: {self.key}: {_show(self.old)} -> {_show(self.new)}"


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    step: optimizer steps done. micro_batch: the next global one. settings: key -> value. data: names the samples and
    their shapes (`Index.mark`). base: names the weights under an adapter (`base_mark`), "" when all weights are trained.
    features: regularizer -> fingerprint of the features that it learns from, of those that read some. encoders: marks of
    what makes clips and captions latents and embeddings (`encoder_marks`). folder: the configuration file's, absolute. The
    last two are empty in checkpoints of before.
    """

    step: int
    micro_batch: int
    settings: Mapping[str, object]
    data: str
    base: str
    features: Mapping[str, str] = field(default_factory=dict)
    encoders: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""


Count = Annotated[int, Field(ge=0, le=MOST)]


class _Stored(BaseModel):
    """The fields of a RunState as a file may have them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    step: Count
    micro_batch: Count
    settings: dict[str, JsonValue]
    data: str
    base: str
    features: dict[str, str] = {}
    encoders: dict[str, str] = {}
    folder: str = ""


@dataclass(frozen=True)
class Start:
    """Where a run begins. folder: the checkpoint it goes on from, None for a new run. notices: to tell the user. changes: what is
    not as it was, to tell too; warnings: the same, of what is hardly meant."""

    folder: Path | None
    state: RunState
    notices: tuple[str, ...]
    changes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def settings(plan: Plan) -> dict[str, Setting]:
    """Every value by its key, with its resume rule; what the file leaves open is as the plan resolved it."""
    found = declared(plan.config)
    for path, value in _resolved(plan).items():
        found[key_text(path)] = replace(found[key_text(path)], value=value)
    return found | {"processes": Setting(plan.processes, "tell")}


def declared(config: Config) -> dict[str, Setting]:
    """Every value of the file or its default, with its resume rule; None where the plan decides."""
    return {row.key: Setting(row.value, row.resume, row.location) for row in show(config) if row.key not in TABLES}


def _resolved(plan: Plan) -> dict[KeyPath, Value]:
    values: dict[KeyPath, Value] = {("precision", "base"): plan.base}
    lora = plan.config.model.table.lora
    if lora is not None:
        # As it is used, so that a default that somebody writes out later is no change.
        values["model", "lora", "alpha"] = lora.alpha or float(lora.rank)
    enabled = [number for number, part in enumerate(plan.config.data) if part.table.enabled]
    for number, dataset in zip(enabled, plan.datasets, strict=True):
        values["data", number, "id"] = dataset.id
        values["data", number, "resolution"] = [str(size) for size in dataset.sizes]
        values["data", number, "video", "frames"] = dataset.frames
        values["data", number, "video", "min_frames"] = dataset.min_frames
        values["data", number, "video", "fps"] = dataset.fps
    made = plan.validation
    if made is not None:
        values["validation", "size"] = str(made.size)
        values["validation", "frames"] = made.shape.frames
        values["validation", "fps"] = made.fps
    return values


def encoder_marks(plan: Plan) -> dict[str, str]:
    """What makes clips and captions what training reads -> its fingerprint. Raises ModelError, DataError."""
    hash_file = FileHashes(plan.config.cache.dir / HASHES)
    scheduler = json.dumps(dict(plan.family.scheduler_config()), sort_keys=True, default=str)
    return {
        "text": plan.family.text_fingerprint(hash_file),
        "video": plan.family.video_fingerprint(hash_file),
        "scheduler": hashlib.sha256(scheduler.encode()).hexdigest(),
        "transform": str(TRANSFORM_VERSION),
    }


ENCODERS: Mapping[str, str] = {"text": "text encoder", "video": "video codec", "scheduler": "scheduler's configuration"}
"""Of `encoder_marks`, what a model folder holds beside the denoiser."""


_AFTER = {
    "text": "captions are encoded again, and the model gets other embeddings than so far",
    "video": "clips are encoded again, and the model gets other latents than so far",
    "scheduler": "training and validation go by the new one",
}


def _encoder_changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Where `encoder_marks` are others, at the same place, and what follows."""
    for key, word in ENCODERS.items():
        if before.get(key, now[key]) != now[key]:
            yield f"the {word}, or an option that shapes it, changed since the checkpoint: {_AFTER[key]}"
    if before.get("transform", now["transform"]) != now["transform"]:
        yield "this vtrain cuts and scales clips otherwise than the one of the checkpoint: they are encoded again"


def feature_marks(plan: Plan) -> dict[str, str]:
    """Regularizer -> fingerprint of its features, of those that read some. Raises ModelError."""
    hash_file = FileHashes(plan.config.cache.dir / HASHES)
    return {
        name: part.feature_fingerprint(hash_file)
        for name, part in plan.regularizers
        if part.needs().features is not None and isinstance(part, SupportsFeatures)
    }


def read_state(folder: Path) -> RunState:
    """Raises CheckpointError when the state cannot be read, or says what it cannot say."""
    file = folder / STATE
    state = RunState(**dict(read_model(file, _Stored)))
    if faults := list(_state_faults(state, folder)):
        raise misread(file, *faults)
    return state


def _state_faults(state: RunState, folder: Path) -> Iterator[str]:
    """What in it contradicts itself, or its folder's name."""
    named = CHECKPOINT.match(folder.name)
    if named is not None and int(named[1]) != state.step:
        yield f"step is {state.step}, and the folder is that of step {int(named[1])}."
    if state.micro_batch < state.step:
        yield f"micro_batch is {state.micro_batch}, and {state.step} steps have taken one each at least."
    for key in state.settings:
        try:
            key_path(key)
        except ValueError:
            yield f"settings: {json.dumps(key)} is no key."


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
    changes, moved = counted_once(compare(state.settings, now), plan.config), Moved.of(state, plan.config)
    refused = [(each.key, _refused(plan, state, each, moved)) for each in changes if each.resume == "refuse"]
    if any(why for _, why in refused):
        remedy = "Set it back, or choose another run.output_dir."
        raise CheckpointError(
            Problem(key, f"{why}; this cannot change in a run that resumes from {folder}.", remedy)
            for key, why in refused
            if why
        )
    notices.append(f"resuming from {folder} (step {state.step})")
    reported = (each for each in changes if each.resume != "free" and not (each.location and moved.alike(each)))
    warnings = tuple(_encoder_changes(state.encoders, encoder_marks(plan))) if state.encoders else ()
    return Start(folder, state, tuple(notices), tuple(map(str, reported)), warnings)


def _refused(plan: Plan, state: RunState, change: Change, moved: Moved) -> str:
    """Why a setting that may not change has; "" for another place with the same model or encoder in it, by its fingerprints.

    Of a model the denoiser is not looked at: a checkpoint has all its weights, or the mark of those under its adapter.
    """
    what = f"was {_show(change.old)} and is now {_show(change.new)}"
    if not change.location:
        return what
    table, *rest = key_path(change.key)
    words, before, now = ENCODERS, state.encoders, {}
    if table == "regularizer":
        name = next((name for at, (name, _) in enumerate(plan.regularizers) if at == rest[0]), "")
        words, before = {name: "encoder"}, state.features
    if words.keys() <= before.keys():
        now = encoder_marks(plan) if table == "model" else feature_marks(plan)
    if not words.keys() <= now.keys():  # nothing says what was there, or what is
        return "" if moved.alike(change) else what
    odd = [word for key, word in words.items() if before[key] != now[key]]
    return f"{what}, where the {' and the '.join(odd)} {'are others' if odd[1:] else 'is another'}" if odd else ""


@dataclass(frozen=True)
class Moved:
    """Where a project was and where it is now."""

    old: str
    new: str

    @classmethod
    def of(cls, state: RunState, config: Config) -> Moved:
        """By the configuration file's folder, or, in a checkpoint of before, by the output folder."""
        if state.folder:
            return cls(state.folder, str(config.path.parent.absolute()))
        output = str(config.run.output_dir)
        was = state.settings.get("run.output_dir")
        return cls(was if isinstance(was, str) else output, output)

    def alike(self, change: Change) -> bool:
        """Whether the same way leads to both places, from where the project was and from where it is."""
        if not (_is_path(change.old) and _is_path(change.new)):
            return False
        return os.path.relpath(change.old, self.old) == os.path.relpath(change.new, self.new)


def _is_path(value: object) -> TypeGuard[str]:
    """Whether it is a place on this machine, as options have it: no hub id and no URL."""
    return isinstance(value, str) and Path(value).is_absolute() and "\0" not in value


def _same_place(old: object, new: object) -> bool:
    return _is_path(old) and _is_path(new) and os.path.realpath(old) == os.path.realpath(new)


def compare(old: Mapping[str, object], new: Mapping[str, Setting]) -> list[Change]:
    """All that differs, in the order of the keys. A key that only one side has counts as None.

    old: as a checkpoint has them, also one that was written when keys had other names or were written otherwise.
    """
    before = _as_written_now(old, new)
    changes = []
    for key in sorted({*before, *new}):
        setting = new.get(key) or Setting(None, rule_when_gone(key_path(key)))
        was = before.get(key)
        if was != setting.value and not (setting.location and _same_place(was, setting.value)):
            changes.append(Change(key, was, setting.value, setting.resume, setting.location))
    return changes


def counted_once(changes: Sequence[Change], config: Config) -> list[Change]:
    """Without those that come with another of them, and go when it is set back: alpha with rank, options with their part."""
    found = {key_path(change.key): change for change in changes}
    return [change for path, change in found.items() if not _comes_along(path, change, found, config)]


def _comes_along(path: KeyPath, change: Change, others: Mapping[KeyPath, Change], config: Config) -> bool:
    def counts(parent: KeyPath) -> bool:
        """Whether it has changed, and is reported as strictly."""
        return parent != path and parent in others and others[parent].resume in ("refuse", change.resume)

    # Keys that one side does not have. Of changes that are taken all are told: an error is corrected, a notice only read.
    above = ("model", "train") if path[:2] == ("model", "lora") else _use(path)
    if change.resume == "refuse" and None in (change.old, change.new) and counts(above):
        return True
    if path in config.lines:
        return False
    if path[0] == "sampler" and counts(("model", "use")):  # the family's own
        return True
    for child, source, derive in _DERIVED:
        parent = (*path[: -len(child)], *source)
        if path[-len(child) :] == child and counts(parent) and others[parent].old is not None:
            return derive(others[parent].old) == change.old
    return False


def _use(path: KeyPath) -> KeyPath:
    """The key of the part that an option is of."""
    return (*path[: 2 if len(path) > 1 and isinstance(path[1], int) else 1], "use")


_DERIVED: tuple[tuple[KeyPath, KeyPath, Callable[[Any], object]], ...] = (
    (("model", "lora", "alpha"), ("model", "lora", "rank"), float),
    (("precision", "base"), ("model", "train"), base_of),
    (("video", "min_frames"), ("video", "frames"), lambda frames: frames),
    (("id",), ("path",), lambda path: Path(path).name),
)
"""What the plan makes of another key where the file does not say it: key, the other key, how."""


def _as_written_now(old: Mapping[str, object], new: Mapping[str, Setting]) -> dict[str, object]:
    """Settings of a checkpoint under the keys of today: renamed ones, tables of free keys, which were one value each, and
    parts of a list told apart by their name: they are compared with the entry that names the same part."""
    values: dict[KeyPath, object] = {}
    for key, value in old.items():
        values |= _leaves(as_called_now(key_path(key)), value)
    for table in TABLES.values():
        if table.by_part:
            numbers = _numbers(table.name, values, new)
            values = {_numbered(path, table.name, numbers): value for path, value in values.items()}
    return {key_text(path): value for path, value in values.items()}


def _leaves(path: KeyPath, value: object) -> dict[KeyPath, object]:
    """A value, or each of a table's."""
    if not isinstance(value, Mapping):
        return {path: value}
    return {at: inner for key, each in value.items() for at, inner in _leaves((*path, key), each).items()}


def _numbers(table: str, old: Mapping[KeyPath, object], new: Mapping[str, Setting]) -> dict[str | int, int]:
    """What stands for an entry in a checkpoint's keys -> the entry's number in this run, a new one for an entry that is gone.

    It stands there as its number then, or, in checkpoints before those, as the name of its part.
    """
    paths = {path: setting.value for key, setting in new.items() if _names_part(path := key_path(key), table)}
    now = {part: int(path[1]) for path, part in paths.items()}
    gone = count(len(now))
    return {
        path[1]: now[str(part)] if str(part) in now else next(gone)
        for path, part in old.items()
        if _names_part(path, table)
    }


def _names_part(path: KeyPath, table: str) -> bool:
    """Whether a key is the `use` of an entry of [[table]]."""
    return len(path) == 3 and path[0] == table and path[2] == "use"


def _numbered(path: KeyPath, table: str, numbers: Mapping[str | int, int]) -> KeyPath:
    within = len(path) > 1 and path[0] == table and path[1] in numbers
    return (table, numbers[path[1]], *path[2:]) if within else path


def _show(value: object) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)


def _choose(config: Config) -> tuple[Path | None, list[str]]:
    parent = config.run.output_dir / CHECKPOINTS
    if config.run.resume == "never":
        if checkpoint.steps_saved(parent):
            what = 'resume = "never", and the folder holds checkpoints of an earlier run.'
            raise CheckpointError(Problem(str(parent), what, "Choose another run.output_dir, or move them away."))
        return None, []
    if config.run.resume != "latest":
        folder = resume_path(config)
        reason = checkpoint.fault(folder)
        if reason is not None:
            remedy = f"Name another one. {checkpoints_there(config)}"
            raise CheckpointError(Problem(str(folder), f"this checkpoint is not sound: {reason}.", remedy))
        return folder, []
    folder_or_none, faults = checkpoint.latest(parent)
    # Not from step 0 over them: a run that cannot find its checkpoints must not take their place.
    if folder_or_none is None and faults:
        remedy = "Nothing was deleted. Move them away to start again."
        problems = [Problem(str(found.folder), f"not a sound checkpoint: {found.reason}.") for found in faults]
        raise CheckpointError([*problems, Problem(str(parent), "no checkpoint here is sound.", remedy)])
    notices = [f"skipped the damaged checkpoint {found.folder}: {found.reason}" for found in faults]
    if folder_or_none is None:
        notices.append("no checkpoint yet: starting from step 0")
    return folder_or_none, notices
