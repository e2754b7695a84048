"""Plan and survey to estimate: how many steps, what is cached, saved and kept in memory, and whether there is room for it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vtrain.config.keys import key_text
from vtrain.config.record import Config
from vtrain.contract import (
    ClipShape,
    ConfigError,
    OptimizerSpec,
    Problem,
    Section,
)
from vtrain.contract.specs import bytes_text
from vtrain.data.scanning import misfits
from vtrain.data.scanning.surveys import Survey
from vtrain.estimate.cached import STORED_BYTES, condition_bytes, feature_bytes, mask_bytes
from vtrain.estimate.tokens import token_warnings
from vtrain.plan.averages import average_length_warnings, average_place
from vtrain.plan.offload import memory_rows
from vtrain.plan.optimizer import optimizer_length_warnings
from vtrain.plan.precision import storage_words
from vtrain.plan.records import Plan
from vtrain.plan.rollout import rollout_warnings


@dataclass(frozen=True)
class Estimate:
    """What a run amounts to. Sizes in bytes; upper bounds for text, whose entries hold only real tokens, and for masks.

    checkpoint_bytes: one checkpoint; None under LoRA, whose size depends on modules not loaded yet.
    steps_per_epoch: not whole in general. validations: how many; None when timed in minutes. feature_bytes: of cached
    features, by regularizer. condition_bytes: of what is cached of each condition, by its name.
    """

    steps: int
    steps_per_epoch: float
    samples_per_step: int
    text_bytes: int
    video_bytes: int
    checkpoint_bytes: int | None
    checkpoints: int | None
    validations: int | None
    warnings: tuple[str, ...]
    feature_bytes: Mapping[str, int] = field(default_factory=dict)
    mask_bytes: int = 0
    condition_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch


def make_estimate(plan: Plan, survey: Survey) -> Estimate:
    """Count the run. Raises ConfigError if it cannot be done with this data."""
    config = plan.config
    per_step = config.train.batch_size * config.train.accumulate * plan.processes
    problems = _check_amount(plan, survey, per_step)
    if problems:
        raise ConfigError(problems)
    per_epoch = survey.epoch / per_step
    steps = config.train.steps or max(1, math.ceil(per_epoch * (config.train.epochs or 0) - 1e-9))
    every = config.checkpoint.every.in_steps(per_epoch)
    validate_every = config.validation.every.in_steps(per_epoch) if config.validation else None
    at_start = bool(config.validation and config.validation.at_start)
    return Estimate(
        steps=steps,
        steps_per_epoch=per_epoch,
        samples_per_step=per_step,
        text_bytes=_text_bytes(plan, survey),
        video_bytes=sum(_latent_bytes(plan, bucket.shape) * bucket.windows for bucket in survey.table()),
        checkpoint_bytes=_checkpoint_bytes(plan),
        checkpoints=math.ceil(steps / every) if every else None,
        validations=math.ceil(steps / validate_every) + at_start if validate_every else None,
        warnings=(
            *plan.warnings,
            *_of_data(plan, survey),
            *token_warnings(plan, survey),
            *_pointed_out(config, steps, per_epoch),
            *optimizer_length_warnings(config, plan.family, steps),
        ),
        feature_bytes=feature_bytes(plan, survey),
        mask_bytes=mask_bytes(plan, survey),
        condition_bytes=condition_bytes(plan, survey),
    )


def _latent_bytes(plan: Plan, shape: ClipShape) -> int:
    stored = 2 if plan.config.cache.latents == "sample" else 1  # mean, and std
    return stored * math.prod(plan.family.latent_shape(shape)) * FLOAT32


def _text_bytes(plan: Plan, survey: Survey) -> int:
    captions = survey.texts + 1 + (len(plan.validation.prompts) + 1 if plan.validation else 0)
    parts = [part for encoder in plan.family.text_encoders().values() for part in encoder.parts.values()]
    return captions * sum(math.prod(part.shape) * STORED_BYTES[part.dtype] for part in parts)


def _checkpoint_bytes(plan: Plan) -> int | None:
    if plan.config.model.table.train == "lora":
        return None
    optimizer = plan.config.optimizer.registered.spec
    assert isinstance(optimizer, OptimizerSpec)
    kept = STORED_BYTES[plan.loaded] + optimizer.bytes_of_state(plan.loaded)
    return int(plan.family.parameters * kept) + (average_bytes(plan) or 0)


def average_bytes(plan: Plan) -> int | None:
    """Of the average of the weights, in memory and in a checkpoint: fp32 of all that is trained of the denoiser. 0 without
    [ema]; None under LoRA, whose size depends on modules not loaded yet."""
    if plan.config.ema is None:
        return 0
    return None if plan.config.model.table.train == "lora" else plan.family.parameters * FLOAT32


def _check_amount(plan: Plan, survey: Survey, per_step: int) -> list[Problem]:
    """Every step's samples, and every batch's, must be different clips."""
    where = plan.config.where("train", "batch_size")
    batch = plan.config.train.batch_size
    problems = []
    if survey.epoch < per_step:
        problems.append(
            Problem(
                where,
                f"one step takes batch_size {batch} x accumulate {plan.config.train.accumulate} x "
                f"{plan.processes} process(es) = {per_step} samples, and one epoch has {survey.epoch}.",
                f"Set data.repeats to at least {_repeats(plan, survey.epoch, per_step)}, or lower batch_size or accumulate.",
            )
        )
    for shape, count in sorted(survey.buckets().items()):
        if count < batch:
            problems.append(
                Problem(
                    where,
                    f"bucket {shape} has {count} sample(s) in an epoch, fewer than batch_size = {batch}.",
                    f"Set data.repeats to at least {_repeats(plan, count, batch)}, lower batch_size, or list other sizes.",
                )
            )
    return problems


def _repeats(plan: Plan, have: float, need: int) -> int:
    """The least data.repeats, equal for all datasets, with which `have` samples become `need`."""
    passes = 1 + min(dataset.table.repeats for dataset in plan.datasets)
    return math.ceil(need * passes / max(have, 1)) - 1


def _pointed_out(config: Config, steps: int, per_epoch: float) -> tuple[str, ...]:
    found = []
    warmup = config.lr_schedule.warmup.in_steps(per_epoch) if config.lr_schedule.warmup else None
    if warmup is not None and warmup >= steps:
        found.append(
            f"lr_schedule.warmup is {warmup} steps and the run {steps}: the learning rate never gets past its warm-up"
        )
    if config.validation is not None:
        every = config.validation.every.in_steps(per_epoch)
        if every is not None and every > steps:
            found.append(f"validation.every is {every} steps and the run {steps}: videos come only at the end")
    cycles, left = config.lr_schedule.cycles, steps - (warmup or 0)
    if 0 < left < 2 * cycles and cycles > 1:
        found.append(
            f"lr_schedule.cycles is {cycles}, and the run has {left} steps after the warm-up: a cycle is no curve"
        )
    clip = config.train.gradient_clip
    if clip is None or not clip.max:
        found.append(f"no gradient clipping (train.gradient_clip{' is absent' if clip is None else '.max is 0'})")
    found += [*average_length_warnings(config, steps), *rollout_warnings(config, steps, per_epoch)]
    return tuple(found)


def _of_data(plan: Plan, survey: Survey) -> Iterator[str]:
    """What of the files is probably not meant."""
    for dataset, found in zip(plan.datasets, survey.datasets, strict=True):
        name = f"{dataset.id}: " if len(plan.datasets) > 1 else ""
        yield from (f"{name}{doubt}" for doubt in found.doubts)
        if found.misfits.clips:
            clips = sum(map(found.clips_of, found.samples))
            yield f"{name}{misfits.pointed_out(plan.family, dataset, found.misfits, clips)}"


def check_room(plan: Plan, estimate: Estimate) -> None:
    """Raises ConfigError if a disk lacks room for what is not there yet: caches, and checkpoints as they are kept.

    While the newest checkpoint is written, one more than are kept exists. Text entries are small and not counted. What the
    folders hold already is looked up only where room seems to lack.
    """
    config = plan.config
    kept = estimate.checkpoints or 1 if config.checkpoint.keep == "all" else config.checkpoint.keep
    at_once = min(kept, estimate.checkpoints or kept) + 1
    cached = [("video", estimate.video_bytes, "the cache"), ("mask", estimate.mask_bytes, "masks")]
    if estimate.feature_bytes:
        parts = [f"{bytes_text(size)} of {name}" for name, size in estimate.feature_bytes.items()]
        cached.append(("features", sum(estimate.feature_bytes.values()), f"cached features ({', '.join(parts)})"))
    if estimate.condition_bytes:
        parts = [f"{bytes_text(size)} of {name}" for name, size in estimate.condition_bytes.items()]
        cached.append(("condition", sum(estimate.condition_bytes.values()), f"conditions ({', '.join(parts)})"))
    wanted = (
        *(_RoomNeeded(("cache", "dir"), config.cache.dir, below, size, what) for below, size, what in cached),
        _RoomNeeded(
            ("run", "output_dir"),
            config.run.output_dir,
            "checkpoints",
            at_once * (estimate.checkpoint_bytes or 0),
            f"{at_once} checkpoints",
        ),
    )
    if config.offload.disk is not None:
        size = int(plan.family.parameters * STORED_BYTES[plan.loaded])
        wanted += (_RoomNeeded(("offload", "disk"), config.offload.disk, "", size, "offloaded weights"),)
    disks: dict[int, list[_RoomNeeded]] = {}
    for want in wanted:
        disks.setdefault(_existing(want.folder).stat().st_dev, []).append(want)
    problems = []
    for sharing in disks.values():
        free = shutil.disk_usage(_existing(sharing[0].folder)).free
        if sum(want.size for want in sharing) <= free:
            continue
        needed = sum(max(0, want.size - (_held(want.folder / want.below) if want.below else 0)) for want in sharing)
        if needed > free:
            *more, last = [want.what for want in sharing if want.size]
            what = f"{', '.join(more)} and {last}" if more else last
            words = f"{what} need {bytes_text(needed)} more and the disk of {sharing[0].folder} has {bytes_text(free)} free."
            keys = dict.fromkeys(key_text(want.key) for want in sharing if want.size)
            remedy = f"Make room there, or set {' or '.join(keys)} to a folder on another disk."
            problems.append(Problem(config.where(*sharing[0].key), words, remedy))
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True)
class _RoomNeeded:
    """Room that a run takes below folder/below. key: the table and key that say where."""

    key: tuple[str, str]
    folder: Path
    below: str  # "" for what is written again by each run
    size: int
    what: str


def _held(folder: Path) -> int:
    """Bytes of all files below a folder."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another run may rename or delete meanwhile
            size += path.stat().st_size if path.is_file() else 0
    return size


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def section(plan: Plan) -> Section:
    """What is in memory, on each process's device, at every step of training."""
    return Section("in memory while training", tuple(_rows(plan)))


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "denoiser", storage_words(plan.config, plan.family)
    if (ema := plan.config.ema) is not None:
        average = average_bytes(plan)
        of = (
            "the adapter, 4 bytes for each of its weights" if average is None else f"all weights, {bytes_text(average)}"
        )
        everywhere = " on each process" if plan.processes > 1 else ""
        yield "average (ema)", f"fp32 of {of}{everywhere}, {average_place(ema)}"
    yield from memory_rows(plan)
    yield "text encoder", "no: captions are cached"
    yield "video codec", _codec(plan)
    for name, part in plan.regularizers:
        if part.needs().features == "cached":
            yield f"encoder of {name}", "no: its features are cached"
        elif part.needs().features is not None:
            of = "the frames that the codec decodes" if part.needs().features == "decoded" else "the clips' own frames"
            yield f"encoder of {name}", f"yes: it runs at each step at which {name} is at work, on {of}"
    for each in plan.encoded:
        yield f"encoder of {each.name}", "no: what it makes is cached"


Doing = Literal["filling the caches", "loading the model", "training", "validating"]
"""What a run does when memory runs out."""


def remedies(plan: Plan, doing: Doing) -> Sequence[str]:
    """Settings that lower what a device has to hold meanwhile, the likeliest first, as this plan can still change them."""
    if doing == "filling the caches":
        cache = plan.config.cache
        sizes = [f"cache.{key} (it is {size})" for key, size in
                 (("video_batch", cache.video_batch), ("text_batch", cache.text_batch)) if size > 1]  # fmt: skip
        family = plan.config.model.registered.spec.name
        return [*sizes, f"the family's own options of its encoders (`vtrain plugins show {family}`)", *_SMALLER]
    if doing == "validating":
        return ["validation.size", "validation.frames", *_offloadable(plan, doing), *_stored(plan)]
    less = [*_offloadable(plan, doing), *_stored(plan)]
    return [*_activations(plan), *less, *_SMALLER] if doing == "training" else less


_SMALLER = ("data.video.frames", "data.resolution")


def _activations(plan: Plan) -> list[str]:
    """What a step keeps for its backward pass."""
    config, precision = plan.config, plan.config.precision
    interval = precision.gradient_checkpointing_interval
    return [
        text
        for text, applies in (
            ("precision.gradient_checkpointing = true", precision.gradient_checkpointing is not True),
            (f"precision.gradient_checkpointing_interval = 1 (it is {interval})", interval > 1),
            (f"train.batch_size (it is {config.train.batch_size})", config.train.batch_size > 1),
            ('precision.mixed = "bf16"', config.precision.mixed == "no"),
        )
        if applies
    ]


def _offloadable(plan: Plan, doing: Doing) -> list[str]:
    """What can leave the card without changing a result, the cheapest in time first."""
    table, lora = plan.config.offload, plan.config.model.table.lora is not None
    many = table.blocks_per_group
    return [
        text
        for text, applies in (
            ("offload.model_cpu = true", doing == "validating" and not table.model_cpu and table.group is None),
            ("offload.optimizer = true", doing != "validating" and not table.optimizer and not lora),
            (_GROUP, lora and table.group is None and plan.processes == 1 and doing != "validating"),
            (f"offload.blocks_per_group (it is {many})", table.group == "block" and many > 1),
            ("offload.stream = false", table.group == "block" and table.stream),
            ('offload.group = "leaf"', table.group == "block"),
        )
        if applies
    ]


_GROUP = 'offload.group = "block"'


def _stored(plan: Plan) -> list[str]:
    """Weights, the optimizer's state, encoders that stay."""
    config = plan.config
    online = [name for name, part in plan.regularizers if part.needs().features in ("decoded", "source")]
    return [
        text
        for text, applies in (
            ('precision.base = "bf16"', config.model.table.lora is not None and plan.base == "fp32"),
            ('precision.base = "int8"', config.model.table.lora is not None and plan.base == "bf16"),
            ('model.train = "lora"', config.model.table.train == "full"),
            ('ema.on = "cpu"', config.ema is not None and config.ema.on == "device"),
            (f"cached features for {' and '.join(online)}, instead of an encoder at each step", bool(online)),
        )
        if applies
    ]


def _codec(plan: Plan) -> str:
    decoding = {name: part.needs() for name, part in plan.regularizers if part.needs().features == "decoded"}
    if decoding:
        half = all(needs.decoder_only for needs in decoding.values())
        what = "what decodes alone, where the family can part with the rest" if half else "all of it"
        again = "; another is loaded for each validation" if plan.validation is not None else ""
        return f"yes, {what}: it decodes clips at each step for {' and '.join(decoding)}{again}"
    return "no: latents are cached" + ("; it is loaded for each validation" if plan.validation is not None else "")


FLOAT32 = 4
