"""Plan and survey to estimate: how many steps, how much is cached and saved, and whether there is room for it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vtrain.config.record import Config
from vtrain.contract import ClipShape, ConfigError, OptimizerSpec, Problem
from vtrain.data.scanning.surveys import Survey
from vtrain.estimate.memory import feature_bytes, mask_bytes
from vtrain.plan.records import Plan

FLOAT32 = 4
STORED_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Estimate:
    """What a run amounts to. Sizes in bytes; upper bounds for text, whose entries hold only real tokens, and for masks.

    checkpoint_bytes: one checkpoint; None under LoRA, whose size depends on modules not loaded yet.
    steps_per_epoch: not whole in general. validations: how many; None when timed in minutes. feature_bytes: of cached
    features, by regularizer.
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
    return Estimate(
        steps=steps,
        steps_per_epoch=per_epoch,
        samples_per_step=per_step,
        text_bytes=_text_bytes(plan, survey),
        video_bytes=sum(_latent_bytes(plan, bucket.shape) * bucket.windows for bucket in survey.table()),
        checkpoint_bytes=_checkpoint_bytes(plan),
        checkpoints=math.ceil(steps / every) if every else None,
        validations=steps // validate_every if validate_every else None,
        warnings=plan.warnings + _pointed_out(config, steps, per_epoch),
        feature_bytes=feature_bytes(plan, survey),
        mask_bytes=mask_bytes(plan, survey),
    )


def _latent_bytes(plan: Plan, shape: ClipShape) -> int:
    stored = 2 if plan.config.cache.latents == "sample" else 1  # mean, and std
    return stored * math.prod(plan.family.latent_shape(shape)) * FLOAT32


def _text_bytes(plan: Plan, survey: Survey) -> int:
    captions = survey.texts + 1 + (len(plan.validation.prompts) + 1 if plan.validation else 0)
    return captions * plan.family.text_tokens * plan.family.text_width * FLOAT32


def _checkpoint_bytes(plan: Plan) -> int | None:
    if plan.config.model.table.train == "lora":
        return None
    optimizer = plan.config.optimizer.registered.spec
    assert isinstance(optimizer, OptimizerSpec)
    return int(plan.family.parameters * (STORED_BYTES[plan.base] + optimizer.state_bytes))


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
        found.append(f"lr_schedule.warmup is {warmup} steps and the run {steps}: the full rate is never held")
    if config.validation is not None:
        every = config.validation.every.in_steps(per_epoch)
        if every is not None and every > steps:
            found.append(f"validation.every is {every} steps and the run {steps}: videos come only at the end")
    if config.train.gradient_clip is None:
        found.append("no gradient clipping (train.gradient_clip is absent)")
    return tuple(found)


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
    wanted = (
        *(_Wanted(("cache", "dir"), config.cache.dir, below, size, what) for below, size, what in cached),
        _Wanted(
            ("run", "output_dir"),
            config.run.output_dir,
            "checkpoints",
            at_once * (estimate.checkpoint_bytes or 0),
            f"{at_once} checkpoints",
        ),
    )
    disks: dict[int, list[_Wanted]] = {}
    for want in wanted:
        disks.setdefault(_existing(want.folder).stat().st_dev, []).append(want)
    problems = []
    for sharing in disks.values():
        free = shutil.disk_usage(_existing(sharing[0].folder)).free
        if sum(want.size for want in sharing) <= free:
            continue
        needed = sum(max(0, want.size - _held(want.folder / want.below)) for want in sharing)
        if needed > free:
            *more, last = [want.what for want in sharing if want.size]
            what = f"{', '.join(more)} and {last}" if more else last
            words = f"{what} need {bytes_text(needed)} more and the disk of {sharing[0].folder} has {bytes_text(free)} free."
            problems.append(Problem(config.where(*sharing[0].key), words))
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True)
class _Wanted:
    """Room that a run takes below folder/below. key: the table and key that say where."""

    key: tuple[str, str]
    folder: Path
    below: str
    size: int
    what: str


def _held(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def bytes_text(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
