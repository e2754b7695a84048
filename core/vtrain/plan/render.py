"""A plan as words: sections of labelled rows, and the same as JSON."""

from __future__ import annotations

from vtrain.contract import Section
from vtrain.plan.data_words import buckets_json, buckets_section, counted, dataset_rows
from vtrain.plan.image_to_video import picture_rows, price_rows
from vtrain.plan.price import Prices, bytes_text
from vtrain.plan.records import Plan, Survey
from vtrain.plan.residents import feature_words
from vtrain.plan.residents import section as memory_section


def sections(plan: Plan, survey: Survey, prices: Prices) -> tuple[Section, ...]:
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
        Section("run", _run(plan, prices)),
        *(Section(f"regularizer: {name}", tuple(part.describe())) for name, part in plan.regularizers),
        Section("validation", (*_validation(plan, prices), *picture_rows(plan))),
        memory_section(plan),
        Section("on disk", _disk(plan, survey, prices)),
        Section(
            "parts",
            tuple((f"{p.spec.kind} {p.spec.name}", f"{p.distribution} {p.version}") for p in plan.config.parts()),
        ),
        Section("look at", tuple(("warning", text) for text in prices.warnings)),
    )
    return tuple(section for section in parts if section.rows)


def _training(plan: Plan) -> tuple[tuple[str, str], ...]:
    table, precision = plan.config.model.table, plan.config.precision
    what = "all weights"
    if table.lora is not None:
        what = f"LoRA, rank {table.lora.rank}, alpha {table.lora.alpha or table.lora.rank:g}"
    checkpointing = (
        "with gradient checkpointing" if precision.gradient_checkpointing else "without gradient checkpointing"
    )
    mixed = "bf16 autocast" if precision.mixed == "bf16" else "no autocast"
    return (("trained", what), ("precision", f"weights {plan.base}, {mixed}, {checkpointing}"))


def _run(plan: Plan, prices: Prices) -> tuple[tuple[str, str], ...]:
    train, config = plan.config.train, plan.config
    warmup = f", warm-up {config.lr_schedule.warmup}" if config.lr_schedule.warmup else ""
    clip = f"{train.gradient_clip.method} at most {train.gradient_clip.max:g}" if train.gradient_clip else "none"
    return (
        (
            "steps",
            f"{counted(prices.steps, 'optimizer step')}, {prices.epochs:.4g} epoch{'s' if prices.epochs != 1 else ''}",
        ),
        (
            "a step",
            f"{counted(prices.samples_per_step, 'sample')} = batch {train.batch_size} x accumulate {train.accumulate} x "
            f"{plan.processes} process{'es' if plan.processes > 1 else ''}",
        ),
        ("learning rate", f"{config.lr_schedule.use}{warmup}"),
        ("caption dropout", f"{train.caption_dropout:g}"),
        ("clipping", clip),
        ("seed", str(config.run.seed)),
        *((("deterministic", "yes: on a GPU, the same bits each time"),) if config.run.deterministic else ()),
    )


def _validation(plan: Plan, prices: Prices) -> tuple[tuple[str, str], ...]:
    table, made = plan.config.validation, plan.validation
    if table is None or made is None:
        return (("videos", "none: no [validation]"),)
    times = f"{prices.validations} times" if prices.validations is not None else "timed"
    return (
        ("videos", f"{len(made.prompts)} every {table.every} ({times}) and at the end"),
        ("each", f"{made.shape} at {made.fps:g} fps, {made.steps} solver steps, guidance {made.guidance:g}"),
    )


def _disk(plan: Plan, survey: Survey, prices: Prices) -> tuple[tuple[str, str], ...]:
    config = plan.config
    checkpoints = f"every {config.checkpoint.every} and the last"
    keep = config.checkpoint.keep
    kept = ", all kept" if keep == "all" else f", newest {keep} kept"
    each = f", {bytes_text(prices.checkpoint_bytes)} each" if prices.checkpoint_bytes is not None else ""
    windows = sum(bucket.windows for bucket in survey.table())
    return (
        ("output", str(config.run.output_dir)),
        ("checkpoints", checkpoints + kept + each),
        ("cache", str(config.cache.dir)),
        ("cached video", f"{counted(windows, 'clip')}, {bytes_text(prices.video_bytes)}"),
        *(
            (
                f"cached features ({name})",
                f"{counted(windows, 'clip')}, {bytes_text(prices.feature_bytes[name])}: {words}",
            )
            for name, words in feature_words(plan, survey)
        ),
        *((("cached masks", f"at most {bytes_text(prices.mask_bytes)}"),) if prices.mask_bytes else ()),
        ("cached text", f"{counted(survey.texts, 'caption')}, at most {bytes_text(prices.text_bytes)}"),
    )


def as_json(plan: Plan, survey: Survey, prices: Prices) -> dict[str, object]:
    """The same for programs."""
    return {
        "steps": prices.steps,
        "steps_per_epoch": prices.steps_per_epoch,
        "samples_per_step": prices.samples_per_step,
        "cache_bytes": {
            "text": prices.text_bytes,
            "video": prices.video_bytes,
            "features": dict(prices.feature_bytes),
            "mask": prices.mask_bytes,
        },
        "checkpoint_bytes": prices.checkpoint_bytes,
        "datasets": [
            {
                "id": found.id,
                "files": found.files,
                "buckets": {str(shape): count for shape, count in found.samples.items()},
                "clips": sum(map(found.clips_of, found.samples)),
                "windows": sum(map(found.windows_of, found.samples)),
                "notes": list(found.notes),
                "left_out": {reason: {"files": n, "example": e} for reason, (n, e) in found.left_out.items()},
                "repeats": found.repeats,
            }
            for found in survey.datasets
        ],
        "buckets": buckets_json(plan, survey),
        "parts": [
            {"kind": p.spec.kind, "name": p.spec.name, "distribution": p.distribution, "version": p.version}
            for p in plan.config.parts()
        ],
        "sections": {section.title: [list(row) for row in section.rows] for section in sections(plan, survey, prices)},
        "warnings": list(prices.warnings),
    }
