"""What a plan and its estimate say: sections for people, and the same as JSON. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from vtrain.contract import (
    Family,
    Section,
)
from vtrain.contract.specs import bytes_text
from vtrain.data.scanning.surveys import Bucket, DatasetSurvey, Survey
from vtrain.estimate.cached import condition_words, feature_words
from vtrain.estimate.estimate import Estimate
from vtrain.estimate.estimate import section as memory_section
from vtrain.estimate.memory import memory_json, memory_sections
from vtrain.estimate.pictures import picture_rows, price_rows
from vtrain.estimate.tokens import long_json, prompt_rows, token_rows, tokens_json
from vtrain.plan.adapter import adapter_rows
from vtrain.plan.averages import average_words, video_words
from vtrain.plan.offload import checkpointing_text
from vtrain.plan.optimizer import STATISTICS_COST, optimizer_words, schedule_words
from vtrain.plan.precision import error_words
from vtrain.plan.records import DatasetPlan, MasksPlan, Plan, ValidationPlan
from vtrain.plan.rollout import rollout_rows


def sections(plan: Plan, survey: Survey, estimate: Estimate) -> tuple[Section, ...]:
    """Everything the run would do."""
    parts = (
        Section("model", tuple(plan.family.describe()) + _training(plan)),
        Section("schedule", tuple(plan.sampler.describe())),
        *(
            Section(
                f"data: {found.id}",
                (*dataset_rows(dataset, found, alone=len(survey.datasets) == 1), *price_rows(plan, dataset, found)),
            )
            for dataset, found in zip(plan.datasets, survey.datasets, strict=True)
        ),
        buckets_section(plan, survey),
        losses_section(survey),
        Section("run", _run(plan, estimate)),
        *(Section(f"regularizer: {name}", tuple(part.describe())) for name, part in plan.regularizers),
        Section("validation", (*_validation(plan, estimate), *picture_rows(plan), *prompt_rows(survey))),
        memory_section(plan),
        *memory_sections(plan),
        Section("on disk", _disk(plan, survey, estimate)),
        Section(
            "parts",
            tuple((f"{p.spec.kind} {p.spec.name}", f"{p.distribution} {p.version}") for p in plan.config.parts()),
        ),
        Section("look at", tuple(("warning", text) for text in estimate.warnings)),
    )
    return tuple(section for section in parts if section.rows)


def _training(plan: Plan) -> tuple[tuple[str, str], ...]:
    table = plan.config.model.table
    if table.lora is not None:
        return (*adapter_rows(plan), *_precision(plan))
    return (("trained", "all weights"), *_precision(plan))


def _precision(plan: Plan) -> tuple[tuple[str, str], ...]:
    precision = plan.config.precision
    mixed = "bf16 autocast" if precision.mixed == "bf16" else "no autocast"
    return (("precision", f"weights {plan.base}, {mixed}, {checkpointing_text(plan)}{error_words(plan.storage)}"),)


def _run(plan: Plan, estimate: Estimate) -> tuple[tuple[str, str], ...]:
    train, config = plan.config.train, plan.config
    clip = train.gradient_clip
    clipping = f"{clip.method} at most {clip.max:g}" if clip and clip.max else "none"
    logged = f"every {counted(train.log_every, 'step')}" if train.log_every > 1 else "every step"
    return (
        (
            "steps",
            f"{counted(estimate.steps, 'optimizer step')}, {estimate.epochs:.4g} epoch{'s' if estimate.epochs != 1 else ''}",
        ),
        (
            "a step",
            f"{counted(estimate.samples_per_step, 'sample')} = batch {train.batch_size} x accumulate {train.accumulate} x "
            f"{plan.processes} process{'es' if plan.processes > 1 else ''}",
        ),
        ("optimizer", optimizer_words(plan)),
        ("learning rate", schedule_words(plan)),
        *((("average (ema)", average_words(config.ema, estimate.steps)),) if config.ema is not None else ()),
        ("caption dropout", f"{train.caption_dropout:g}"),
        *rollout_rows(config, estimate.steps, estimate.steps_per_epoch),
        ("clipping", f"{clipping}; the norm is logged {logged}"),
        *((("statistics", f"of each block, {logged}: {STATISTICS_COST}"),) if train.statistics else ()),
        *_skipping(train.skip_nonfinite),
        ("seed", str(config.run.seed)),
        *((("deterministic", "yes: on a GPU, the same bits each time"),) if config.run.deterministic else ()),
    )


def _skipping(limit: int | None) -> tuple[tuple[str, str], ...]:
    if limit is None:
        return ()
    what = (
        f"up to {counted(limit, 'step')} whose loss or gradient is not finite; for it the device is read at each step"
    )
    return (("skipped", what),)


def _validation(plan: Plan, estimate: Estimate) -> tuple[tuple[str, str], ...]:
    table, made = plan.config.validation, plan.validation
    if table is None or made is None:
        return (("videos", "none: no [validation]"),)
    times = f": {counted(estimate.validations, 'time')}" if estimate.validations is not None else ""
    return (
        ("videos", f"{len(made.prompts)} every {table.every} and at the end{times}{video_words(plan.config.ema)}"),
        ("each", f"{made.shape} at {made.fps:g} fps, {made.steps} solver steps, guidance {made.guidance:g}"),
        *((("resized", _resized(plan.family, made)),) if made.size != made.shape.size else ()),
    )


def _resized(family: Family, made: ValidationPlan) -> str:
    """Of a size that the family cannot generate."""
    return (
        f"to {made.size}: edges of this model family are multiples of {family.pixel_stride}, and {made.shape.size} is its "
        "nearest bucket; what is beyond the aspect is cut off"
    )


def _disk(plan: Plan, survey: Survey, estimate: Estimate) -> tuple[tuple[str, str], ...]:
    config = plan.config
    checkpoints = f"every {config.checkpoint.every} and the last"
    keep = config.checkpoint.keep
    kept = ", all kept" if keep == "all" else f", newest {keep} kept"
    each = f", {bytes_text(estimate.checkpoint_bytes)} each" if estimate.checkpoint_bytes is not None else ""
    windows = sum(bucket.windows for bucket in survey.table())
    return (
        ("output", str(config.run.output_dir)),
        ("checkpoints", checkpoints + kept + each),
        ("cache", str(config.cache.dir)),
        ("cached video", f"{counted(windows, 'clip')}, {bytes_text(estimate.video_bytes)}"),
        *(
            (
                f"cached features ({name})",
                f"{counted(windows, 'clip')}, {bytes_text(estimate.feature_bytes[name])}: {words}",
            )
            for name, words in feature_words(plan, survey)
        ),
        *(
            (
                f"cached condition ({name})",
                f"{counted(count, 'clip')}, {bytes_text(estimate.condition_bytes[name])}: {words}",
            )
            for name, count, words in condition_words(plan, survey)
        ),
        *((("cached masks", f"at most {bytes_text(estimate.mask_bytes)}"),) if estimate.mask_bytes else ()),
        ("cached text", f"{counted(survey.texts, 'caption')}, at most {bytes_text(estimate.text_bytes)}"),
    )


def as_json(plan: Plan, survey: Survey, estimate: Estimate) -> dict[str, object]:
    """The same for programs."""
    return {
        "steps": estimate.steps,
        "steps_per_epoch": estimate.steps_per_epoch,
        "samples_per_step": estimate.samples_per_step,
        "cache_bytes": {
            "text": estimate.text_bytes,
            "video": estimate.video_bytes,
            "features": dict(estimate.feature_bytes),
            "mask": estimate.mask_bytes,
            "condition": dict(estimate.condition_bytes),
        },
        "checkpoint_bytes": estimate.checkpoint_bytes,
        "datasets": [
            {
                "id": found.id,
                "files": found.files,
                "buckets": {str(shape): count for shape, count in found.samples.items()},
                "clips": sum(map(found.clips_of, found.samples)),
                "windows": sum(map(found.windows_of, found.samples)),
                "notes": list(found.notes),
                "skipped": {reason: {"files": n, "example": e} for reason, (n, e) in found.skipped.items()},
                "repeats": found.repeats,
                "tokens": tokens_json(found.tokens),
                "misfits": {"clips": found.misfits.clips, "worst": [list(each) for each in found.misfits.worst]},
            }
            for found in survey.datasets
        ],
        "buckets": buckets_json(plan, survey),
        "memory": memory_json(plan),
        "cut_prompts": [long_json(each) for each in survey.prompts],
        "parts": [
            {"kind": p.spec.kind, "name": p.spec.name, "distribution": p.distribution, "version": p.version}
            for p in plan.config.parts()
        ],
        "sections": {
            section.title: [list(row) for row in section.rows] for section in sections(plan, survey, estimate)
        },
        "warnings": list(estimate.warnings),
    }


HEADS = ("bucket", "clips", "windows", "batches an epoch", "latents", "share")


def dataset_rows(dataset: DatasetPlan, found: DatasetSurvey, *, alone: bool) -> Iterable[tuple[str, str]]:
    """(label, text) of one dataset. alone: its buckets are those of the run, which have a table."""
    yield "frames", _frames(dataset)
    yield "picture", _picture(dataset)
    yield "captions", _captions(dataset)
    yield from token_rows(found)
    if dataset.masks is not None:
        yield "masks", _masks(dataset.masks)
    if dataset.decoder:
        yield "decoder", f"{dataset.decoder}; PyAV for files that it would show wrongly"
    samples, clips = sum(found.samples.values()), sum(map(found.clips_of, found.samples))
    passes = f", {1 + found.repeats} passes an epoch" if found.repeats else ""
    if found.share != 1:
        passes += f", of which an epoch takes {float(found.share):.3g} (data.weight)"
    several = f" as {counted(samples, 'sample')}" if samples != clips else ""
    yield "files", f"{found.files} scanned, {clips} used{several}{passes}"
    if not alone:
        for shape, count in sorted(found.samples.items()):
            yield f"bucket {shape}", counted(count, "sample")
    for reason, (count, example) in sorted(found.skipped.items(), key=lambda item: (-item[1][0], item[0])):
        yield f"skipped: {count}", f"{reason}  ({'such as ' if count > 1 else ''}{example})"
    if found.skipped:
        yield "all of them", "`vtrain data list CONFIG --dropped --failed`"
    if dataset.table.on_bad_file == "move":
        yield "bad files", f"moved to {dataset.table.quarantine} when caches are filled"
    for note in found.notes:
        yield "note", note


def _frames(dataset: DatasetPlan) -> str:
    video = dataset.table.video
    count = f"{dataset.frames}" if dataset.min_frames == dataset.frames else f"{dataset.min_frames} to {dataset.frames}"
    rate = "the clip's own rate" if dataset.fps is None else f"{dataset.fps:g} fps"
    every = f", one of {video.frame_step} taken" if video.frame_step > 1 else ""
    where = {
        "start": "from the start",
        "center": "from the centre",
        "all": "every stretch of a clip",
        "random": f"one of {counted(video.windows, 'window')}, drawn at each use",
    }[video.window]
    longest = f", clips cut after {dataset.max_frames}" if dataset.max_frames is not None else ""
    return f"{count} at {rate}{every}, {where}{longest}"


def _picture(dataset: DatasetPlan) -> str:
    table = dataset.table
    crop = {
        "center": "cut to the nearest aspect at the centre",
        "random": "cut to the nearest aspect at a place drawn for each sample",
        "none": "squeezed to the nearest aspect",
    }
    limits = [f"at least {table.min_size}"] if table.min_size is not None else []
    if table.max_size is not None:
        limits.append(f"above {table.max_size} reduced to {table.downsample_to}")
    unit = f" ({table.resolution_type})" if limits else ""
    size = str(dataset.sizes[0]) if len(dataset.sizes) == 1 else f"{len(dataset.sizes)} sizes"
    return ", ".join((size, crop[table.crop], *limits)) + unit


def _captions(dataset: DatasetPlan) -> str:
    table = dataset.table
    words = {
        "textfile": f"a .txt beside each clip, a caption a {table.caption_per or 'line'}",
        "json": "a .json beside each clip",
        "filename": "the file's name",
        "instance_prompt": f'"{table.caption}" for all',
        "csv": str(table.captions_file),
        "parquet": str(table.captions_file),
        "backend": "the data backend's own",
    }[dataset.captions]
    prefix = f', after "{table.caption_prefix}"' if table.caption_prefix else ""
    missing = ", empty where there is none" if table.missing_caption == "empty" else ""
    return words + prefix + missing


def _masks(masks: MasksPlan) -> str:
    where = f"{'black' if masks.invert else 'white'} trains"
    missing = {"whole": "a clip without one trains whole", "drop": "a clip without one is dropped"}[masks.missing]
    return f"{masks.folder}/, under the clips' names: {where}, the loss of each clip divided by its area; {missing}"


def buckets_section(plan: Plan, survey: Survey) -> Section:
    """The table of buckets."""
    table, epoch, batch = survey.table(), survey.epoch, plan.config.train.batch_size
    rows = [
        (
            str(bucket.shape),
            str(bucket.clips),
            str(bucket.windows),
            f"{bucket.samples / batch:.4g}",
            "x".join(map(str, plan.family.latent_shape(bucket.shape))),
            f"{100 * bucket.samples / epoch:.1f}%",
        )
        for bucket in table
    ]
    return Section("buckets", (HEADS, *rows) if rows else (), table=True)


_LEAST = 0.01
"""A loss of less than this is of no interest: edges are whole numbers of pixels."""


def losses_section(survey: Survey) -> Section:
    """How much of the pictures of each bucket is cropped away or stretched, and the clip that loses most."""
    rows = []
    for bucket in survey.table():
        loss = bucket.loss
        shares = {"cropped": (loss.cropped_mean, loss.cropped), "stretched": (loss.stretch_mean - 1, loss.stretch - 1)}
        found = [
            f"{name} by {100 * mean:.1f}% on average, at most {100 * most:.1f}%"
            for name, (mean, most) in shares.items()
            if most >= _LEAST
        ]
        if found:
            rows.append((str(bucket.shape), f"{'; '.join(found)} ({loss.worst})"))
    return Section("pictures", tuple(rows))


def buckets_json(plan: Plan, survey: Survey) -> list[dict[str, object]]:
    """The same for programs. share: of an epoch's samples; batches_per_epoch: micro-batches, not whole in general."""
    return [_bucket_json(plan, survey, bucket) for bucket in survey.table()]


def _bucket_json(plan: Plan, survey: Survey, bucket: Bucket) -> dict[str, object]:
    return {
        "bucket": str(bucket.shape),
        "clips": bucket.clips,
        "windows": bucket.windows,
        "samples_per_epoch": bucket.samples,
        "batches_per_epoch": bucket.samples / plan.config.train.batch_size,
        "latent_shape": list(plan.family.latent_shape(bucket.shape)),
        "share": bucket.samples / survey.epoch,
        "stretch": bucket.loss.stretch,
        "stretch_mean": bucket.loss.stretch_mean,
        "cropped": bucket.loss.cropped,
        "cropped_mean": bucket.loss.cropped_mean,
        "worst": bucket.loss.worst or None,
    }


def counted(count: int, noun: str) -> str:
    """ "1 sample", "2 samples"."""
    return f"{count} {noun}{'s' if count != 1 else ''}"
