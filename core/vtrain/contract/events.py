"""Everything that can be learnt of a run while it runs: one stream of typed events, in the order in which things happened.

`vtrain.api.run` gives them to whoever drives the run; trackers get those that they ask for. Each is frozen, torch-free and
JSON: `as_json(event)` is an object with the event's name under "event" and its fields beside it, which is a line of
events.jsonl and of `vtrain run --json`; `from_json` reads it back. VERSION rises when a field changes its meaning or goes;
fields and events may be added to a version, so that a reader ignores what it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

VERSION = 1


@dataclass(frozen=True)
class Section:
    """A part of a plan in words.

    title: of the section. rows: (label, text); of a table, cells. table: whether it is one, its first row the columns' names.
    """

    title: str
    rows: tuple[tuple[str, ...], ...]
    table: bool = False


@dataclass(frozen=True)
class StepMetrics:
    """The numbers of one optimizer step: a line of metrics.jsonl. What is measured (seconds, data_wait and memory) differs between
    runs; all else is the same when a run is resumed.

    step: 1-based. epoch: passes over the data by then. loss: flow loss plus terms, mean over the step's micro-batches. flow_loss:
    without terms. lr: learning rate of the denoiser. grad_norm: before clipping; None on steps where it was not read.
    sigmas, samples: in draw order over all processes. seconds: wall time of a step, mean since the last reading. data_wait: seconds
    of it in which the step waited for its data, on the slowest process. memory: resident bytes on a CPU, peak bytes on a device.
    terms: regularizers' numbers; with rollout its share of the clips and the flow loss of both kinds; those of train.statistics,
    whose names begin with statistics/. clip_losses: flow loss of each clip, in the order of samples.
    """

    step: int
    epoch: float
    loss: float
    flow_loss: float
    lr: float
    grad_norm: float | None
    sigmas: list[float | list[float]]
    samples: list[str]
    seconds: float
    data_wait: float
    memory: int
    terms: Mapping[str, float] = field(default_factory=dict)
    clip_losses: list[float] = field(default_factory=list)

    def scalars(self) -> dict[str, float]:
        """What trackers plot."""
        values = {"loss": self.loss, "flow_loss": self.flow_loss, "lr": self.lr, "epoch": self.epoch}
        if self.grad_norm is not None:
            values["grad_norm"] = self.grad_norm
        measured = {
            "step_seconds": self.seconds,
            "data_wait_seconds": self.data_wait,
            "memory_gib": self.memory / 2**30,
        }
        return values | dict(self.terms) | measured


MEASURED = ("seconds", "data_wait", "memory")
"""Fields of StepMetrics that differ between runs."""


@dataclass(frozen=True)
class DatasetStatistics:
    """What was found in one dataset. id: its name. files: source files. clips: those that are used. excluded: reason -> number of
    files."""

    id: str
    files: int
    clips: int
    excluded: Mapping[str, int]


@dataclass(frozen=True)
class Planned:
    """The configuration is sound.

    name: of the run, `run.name`. output_dir: absolute. processes: how many train together. device: "cuda:0". parts: "family
    sanavideo (vtrain-sanavideo 0.1.0)".
    """

    name: str
    output_dir: Path
    processes: int
    device: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Scanned:
    """Every source file was scanned. datasets: one entry for each dataset."""

    datasets: tuple[DatasetStatistics, ...]


@dataclass(frozen=True)
class Estimated:
    """What the run amounts to; made before the caches are filled and, if clips were excluded then, once more after it.

    steps: optimizer steps in all. steps_per_epoch: not whole in general. samples_per_step: over all processes. sections: the plan
    for people, empty the second time.
    """

    steps: int
    steps_per_epoch: float
    samples_per_step: int
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Filling:
    """How far this process's share of one stage of filling the caches is; the first of a stage says what was there.

    stage: "text", or "text (name)" of each of several encoders, counts captions, "mask" masks, "video", features and conditions
    clips (windows of them). done: of total that are in the cache. total: what this process has to have there. unusable: of total
    that cannot be. unread: of the others at the start, those whose file's bytes are not known yet, so that they may be there.
    made: of done, those that were made by this process.
    """

    stage: str
    done: int
    total: int
    unusable: int = 0
    unread: int = 0
    made: int = 0


@dataclass(frozen=True)
class Filled:
    """The caches hold all that can be trained on.

    clips: training samples. excluded: "<dataset>/<file>" -> why it cannot be used. duplicates: samples that are copies of
    another, byte for byte. duplicate_example: two of them.
    """

    clips: int
    excluded: Mapping[str, str]
    duplicates: int
    duplicate_example: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quarantined:
    """A bad file of a dataset with on_bad_file = "move".

    file: "<dataset>/<file>". reason: why it cannot be used. target: where it is now; None where it stayed. stays: why it was not
    moved.
    """

    file: str
    reason: str
    target: Path | None
    stays: str = ""


@dataclass(frozen=True)
class Started:
    """Training starts.

    session: how often this output folder was started, 1-based; 0 where there is nothing to do, and on processes beside the first.
    step: 0, or that of the checkpoint. steps: optimizer steps of the whole run. checkpoint: the folder that is resumed from.
    settings: every resolved key of the configuration.
    """

    session: int
    step: int
    steps: int
    checkpoint: Path | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Stepped:
    """An optimizer step was queued on the device; its numbers come later. step: its number, from 1."""

    step: int


@dataclass(frozen=True)
class Logged:
    """The device's numbers were read; they are in metrics.jsonl by now. steps: those of each step since the last reading."""

    steps: tuple[StepMetrics, ...]


@dataclass(frozen=True)
class LossSpike:
    """The flow loss of a step lies far above those of the steps before, at equal noise levels; training continues.

    step: its number. loss: its flow loss. expected: what the steps before let expect at its noise levels. samples: its clips.
    sigmas: their noise levels. text: what the terminal shows.
    """

    step: int
    loss: float
    expected: float
    samples: tuple[str, ...]
    sigmas: tuple[float | tuple[float, ...], ...]
    text: str


@dataclass(frozen=True)
class StepSkipped:
    """A step whose loss or gradient was not finite was not taken (train.skip_nonfinite): weights and optimizer are as before it.

    step: its number, which counts. skipped: how many have been by now. limit: how many are allowed. samples: its clips. text: what
    the terminal shows.
    """

    step: int
    skipped: int
    limit: int
    samples: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written. step: optimizer steps done by then. folder: the checkpoint's. deleted: older ones that
    checkpoint.keep let go. seconds: that writing it took, from beginning to end, beside training or not."""

    step: int
    folder: Path
    deleted: tuple[Path, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True)
class Validating:
    """Videos are being generated. step: optimizer steps done by then. videos: how many."""

    step: int
    videos: int


@dataclass(frozen=True)
class Generating:
    """How far this process's share of a validation's videos is.

    step: optimizer steps done by then. stage: "solving", after each solver step where the sampler tells them, else before
    each video; "decoding", before each video, once all are solved. video: number of the one at work, from 1. videos: how many
    this process generates. solved: solver steps of it that are done. solver_steps: how many it takes.
    """

    step: int
    stage: Literal["solving", "decoding"]
    video: int
    videos: int
    solved: int
    solver_steps: int


@dataclass(frozen=True)
class Validated:
    """Videos were generated.

    step: optimizer steps done by then. files: nickname of the prompt -> mp4; of averaged weights "nickname.ema". sheet: a PNG of
    them all, None if there are none. failures: why others could not be made. interrupted: whether the run was asked to stop before
    all were. averaged: keys of those files that were generated with the averaged weights ([ema]), not those in training.
    """

    step: int
    files: Mapping[str, Path]
    sheet: Path | None
    failures: tuple[str, ...] = ()
    interrupted: bool = False
    averaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Noted:
    """Something that the user should know and need not act on. text: what the terminal shows."""

    text: str


@dataclass(frozen=True)
class Warned:
    """Something went wrong that the run survives. text: what the terminal shows."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The run is over, and everything is saved.

    step: optimizer steps done. steps: of the whole run. reason: "finished", all steps are done; "stopped", as asked; "nothing to
    do", all steps were done already. signal: number of the signal that asked for it. failed_validations: optimizer steps done by
    then -> why, of the validations since the run was started that failed. last_validation_failed: whether the newest is one of
    them. estimated_memory, peak_memory: bytes of a training step, as the plan estimates them and as the first process measured
    them: of tensors on its card, or on a CPU of the whole process. None: not known.
    """

    step: int
    steps: int
    reason: Literal["finished", "stopped", "nothing to do"]
    signal: int | None = None
    failed_validations: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    last_validation_failed: bool = False
    estimated_memory: int | None = None
    peak_memory: int | None = None


@dataclass(frozen=True)
class Failed:
    """The run is over by an error, which is raised after this event. error: its class, such as `DataError`. problems: its lines, as
    the terminal shows them."""

    error: str
    problems: tuple[str, ...]


Event = (
    Planned
    | Scanned
    | Estimated
    | Filling
    | Filled
    | Quarantined
    | Started
    | Stepped
    | Logged
    | LossSpike
    | StepSkipped
    | Saved
    | Validating
    | Generating
    | Validated
    | Noted
    | Warned
    | Ended
    | Failed
)
EVENTS: Mapping[str, type[Event]] = {kind.__name__.lower(): kind for kind in Event.__args__}
"""Name -> class: Stepped is "stepped"."""

E = TypeVar("E")


def as_json(event: Event) -> dict[str, Any]:
    """{"event": its name, field: value ...}, of what json.dumps takes. Paths become text."""
    return {"event": type(event).__name__.lower()} | {
        each.name: _plain(getattr(event, each.name)) for each in fields(event)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(asdict(value)) if hasattr(value, "__dataclass_fields__") else value


def from_json(record: Mapping[str, Any]) -> Event | None:
    """The event of such an object, without keys that it does not know; None for an event of a later version.

    Raises ValueError (pydantic's) where a field is missing or of another type.
    """
    from pydantic import TypeAdapter

    kind = EVENTS.get(str(record.get("event")))
    if kind is None:
        return None
    known = {each.name for each in fields(kind)}
    return TypeAdapter(kind).validate_python({key: value for key, value in record.items() if key in known})


def schema() -> dict[str, Any]:
    """JSON Schema of a line: one of the events, by the name under "event"."""
    from pydantic import TypeAdapter

    shared: dict[str, Any] = {}
    each = []
    for name, kind in EVENTS.items():
        found = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        shared |= found.pop("$defs", {})
        found["properties"] = {"event": {"const": name}, **found.get("properties", {})}
        found["required"] = ["event", *found.get("required", ())]
        each.append(found | {"title": kind.__name__, "description": " ".join((kind.__doc__ or "").split())})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "oneOf": each, "$defs": shared}
