"""What a plan says of its datasets, and the table of buckets."""

from __future__ import annotations

from collections.abc import Iterable

from vtrain.contract import Section
from vtrain.plan.records import Bucket, DatasetPlan, DatasetSurvey, MasksPlan, Plan, Survey

HEADS = ("bucket", "clips", "windows", "batches an epoch", "latents", "share")


def dataset_rows(dataset: DatasetPlan, found: DatasetSurvey, *, alone: bool) -> Iterable[tuple[str, str]]:
    """(label, text) of one dataset. alone: its buckets are those of the run, which have a table."""
    yield "frames", _frames(dataset)
    yield "picture", _picture(dataset)
    yield "captions", _captions(dataset)
    if dataset.masks is not None:
        yield "masks", _masks(dataset.masks)
    if dataset.decoder:
        yield "decoder", f"{dataset.decoder}; PyAV for files that it would show wrongly"
    samples, clips = sum(found.samples.values()), sum(map(found.clips_of, found.samples))
    passes = f", {1 + found.repeats} passes an epoch" if found.repeats else ""
    if found.share != 1:
        passes += f", of which an epoch takes {float(found.share):.3g} (data.weight)"
    several = f" as {counted(samples, 'sample')}" if samples != clips else ""
    yield "files", f"{found.files} looked at, {clips} used{several}{passes}"
    if not alone:
        for shape, count in sorted(found.samples.items()):
            yield f"bucket {shape}", counted(count, "sample")
    for reason, (count, example) in sorted(found.left_out.items(), key=lambda item: (-item[1][0], item[0])):
        yield f"left out: {count}", f"{reason}  (such as {example})"
    if found.left_out:
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
        "textfile": "a .txt beside each clip, a caption a line",
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
    """The table of buckets; a column for the change of aspect where pictures are squeezed."""
    table, epoch, batch = survey.table(), survey.epoch, plan.config.train.batch_size
    stretched = any(bucket.stretch > 1 for bucket in table)
    rows = [
        (
            str(bucket.shape),
            str(bucket.clips),
            str(bucket.windows),
            f"{bucket.samples / batch:.4g}",
            "x".join(map(str, plan.family.latent_shape(bucket.shape))),
            f"{100 * bucket.samples / epoch:.1f}%",
            *([f"{100 * (bucket.stretch - 1):.1f}%"] if stretched else []),
        )
        for bucket in table
    ]
    heads = (*HEADS, *(["aspect changed by at most"] if stretched else []))
    return Section("buckets", (heads, *rows) if rows else (), table=True)


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
        "stretch": bucket.stretch,
    }


def counted(count: int, noun: str) -> str:
    """ "1 sample", "2 samples"."""
    return f"{count} {noun}{'s' if count != 1 else ''}"
