"""Going on from a checkpoint: which one, and which changes of the configuration it allows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from vtrain import __version__
from vtrain.config.keys import key_path
from vtrain.config.record import Config
from vtrain.contract import CheckpointError, HashFile, Problem, SupportsFeatures
from vtrain.contract.specs import NOUNS, origin
from vtrain.data.sample import TRANSFORM_VERSION
from vtrain.data.scanning.database import HASHES, FileHashes
from vtrain.plan.parallel import samples_change
from vtrain.plan.places import CHECKPOINT, CHECKPOINTS, checkpoints_there, resume_path
from vtrain.plan.records import Plan
from vtrain.plan.text import stage_names, text_marks
from vtrain.train import checkpoint
from vtrain.train.checkpoint import misread, read_model
from vtrain.train.settings import Change, compare, counted_once, is_path, settings, shown

STATE = "state.json"
MOST = 2**48
"""Steps and micro-batches: no run has as many."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    step: optimizer steps done. micro_batch: the next global one. settings: key -> value. data: names the samples and
    their shapes (`Index.mark`). base: names the weights under an adapter (`base_mark`), "" when all weights are trained.
    features: regularizer -> fingerprint of the features that it learns from, of those that read some. encoders: marks of
    what makes clips and captions latents and embeddings (`encoder_marks`). folder: the configuration file's, absolute.
    versions: who did what (`versions`). These three are empty in checkpoints of before. adapter: "sha256 path" of the LoRA that the
    adapter started from, "" for none. machine: what decides over the last bits (`Processes.machine`); empty in those of before.
    """

    step: int
    micro_batch: int
    settings: Mapping[str, object]
    data: str
    base: str
    features: Mapping[str, str] = field(default_factory=dict)
    encoders: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    adapter: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)


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
    versions: dict[str, str] = {}
    adapter: str = ""
    machine: dict[str, str] = {}


@dataclass(frozen=True)
class Start:
    """Where a run begins. folder: the checkpoint it goes on from, None for a new run. notices: to tell the user. changes: what is
    not as it was, to tell too; warnings: the same, of what is hardly meant."""

    folder: Path | None
    state: RunState
    notices: tuple[str, ...]
    changes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def encoder_marks(plan: Plan) -> dict[str, str]:
    """What makes clips and captions what training reads -> its fingerprint. Raises ModelError, DataError."""
    hash_file = FileHashes(plan.config.cache.dir / HASHES)
    scheduler = json.dumps(dict(plan.family.scheduler_config()), sort_keys=True, default=str)
    return {
        **text_marks(plan.family, hash_file),
        "video": plan.family.video_fingerprint(hash_file),
        "scheduler": hashlib.sha256(scheduler.encode()).hexdigest(),
        "transform": str(TRANSFORM_VERSION),
        **condition_marks(plan, hash_file),
    }


def condition_marks(plan: Plan, hash_file: HashFile) -> dict[str, str]:
    """ "condition (name)" -> fingerprint of its encoder, of those that the run uses. Raises ModelError."""
    return {
        f"{_CONDITION}{each.name})": each.encoder.fingerprint(hash_file)
        for each in plan.encoded
        if each.encoder is not None
    }


_CONDITION = "condition ("


def held_beside(plan: Plan, marks: Mapping[str, str]) -> dict[str, str]:
    """What a model folder holds beside the denoiser: mark -> its name in a sentence. Of conditions' encoders those in `marks`."""
    encoders = stage_names(plan.family.text_encoders())
    texts = {key: f'text encoder "{name}"' if len(encoders) > 1 else "text encoder" for name, key in encoders.items()}
    conditions = {key: f"encoder of the {key}" for key in marks if key.startswith(_CONDITION)}
    return {**texts, "video": "video codec", "scheduler": "scheduler's configuration", **conditions}


_TEXT_AFTER = "captions are encoded again, and the model gets other embeddings than so far"
_CONDITION_AFTER = "it is encoded again, and the model gets other numbers than so far"
_AFTER = {
    "video": "clips are encoded again, and the model gets other latents than so far",
    "scheduler": "training and validation go by the new one",
}


def _encoder_changes(before: Mapping[str, str], plan: Plan) -> Iterator[str]:
    """Where `encoder_marks` are others, at the same place, and what follows. Raises ModelError, DataError."""
    now = encoder_marks(plan)
    for key, word in held_beside(plan, now).items():
        if before.get(key, now[key]) != now[key]:
            after = _AFTER.get(key, _CONDITION_AFTER if key.startswith(_CONDITION) else _TEXT_AFTER)
            yield f"the {word}, or an option that shapes it, changed since the checkpoint: {after}"
    if before.get("transform", now["transform"]) != now["transform"]:
        yield "this vtrain cuts and scales clips otherwise than the one of the checkpoint: they are encoded again"


def versions(config: Config) -> dict[str, str]:
    """ "family toy" -> "vtrain-toy 0.1.0", of each part that the run uses; "core" -> vtrain's own."""
    parts = {f"{part.spec.kind} {part.spec.name}": origin(part) for part in config.parts()}
    return {"core": f"vtrain {__version__}", **parts}


def _version_changes(before: Mapping[str, str], config: Config) -> Iterator[str]:
    """Of what the checkpoint and this run both use, where its distribution is of another version, or is another."""
    found: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for part, now in versions(config).items():
        if before.get(part, now) != now:
            found.setdefault((before[part], now), []).append(part.partition(" "))
    for (was, now), parts in found.items():
        words = ", ".join(f"{NOUNS[kind][0]} {name}" if name else kind for kind, _, name in parts)
        yield f"{was} became {now} since the checkpoint ({words}): the run continues with the new code"


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
        lora = plan.config.model.table.lora
        notices += [f"the adapter starts from {lora.start}"] if lora is not None and lora.start is not None else []
        return Start(None, RunState(0, 0, values, "", ""), tuple(notices))
    state = read_state(folder)
    changes, moved = counted_once(compare(state.settings, now), plan.config), Relocation.of(state, plan.config)
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
    warnings = [*_version_changes(state.versions, plan.config), *samples_change(state.settings, plan)]
    warnings += _encoder_changes(state.encoders, plan) if state.encoders else ()
    return Start(folder, state, tuple(notices), tuple(map(str, reported)), tuple(warnings))


def _refused(plan: Plan, state: RunState, change: Change, moved: Relocation) -> str:
    """Why a setting that may not change has; "" for another place with the same model or encoder in it, by its fingerprints.

    Of a model the denoiser is not looked at: a checkpoint has all its weights, or the mark of those under its adapter.
    """
    what = f"was {shown(change.old)} and is now {shown(change.new)}"
    if not change.location:
        return what
    table, *rest = key_path(change.key)
    now: dict[str, str] = {}
    if table == "regularizer":
        name = next((name for at, (name, _) in enumerate(plan.regularizers) if at == rest[0]), "")
        words, before = {name: "encoder"}, state.features
    else:
        words, before = held_beside(plan, state.encoders), state.encoders
    if words.keys() <= before.keys():
        now = encoder_marks(plan) if table == "model" else feature_marks(plan)
    words = {
        key: word for key, word in words.items() if key in now or not key.startswith(_CONDITION)
    }  # of what is still used
    if not words.keys() <= now.keys():  # nothing says what was there, or what is
        return "" if moved.alike(change) else what
    odd = [word for key, word in words.items() if before[key] != now[key]]
    return f"{what}, where the {' and the '.join(odd)} {'are others' if odd[1:] else 'is another'}" if odd else ""


@dataclass(frozen=True)
class Relocation:
    """Where a project was and where it is now."""

    old: str
    new: str

    @classmethod
    def of(cls, state: RunState, config: Config) -> Relocation:
        """By the configuration file's folder, or, in a checkpoint of before, by the output folder."""
        if state.folder:
            return cls(state.folder, str(config.path.parent.absolute()))
        output = str(config.run.output_dir)
        was = state.settings.get("run.output_dir")
        return cls(was if isinstance(was, str) else output, output)

    def alike(self, change: Change) -> bool:
        """Whether the same way leads to both places, from where the project was and from where it is."""
        if not (is_path(change.old) and is_path(change.new)):
            return False
        return os.path.relpath(change.old, self.old) == os.path.relpath(change.new, self.new)


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
