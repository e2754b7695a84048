"""What image-to-video is in a plan: how many draws start from a picture, and what a level for each frame takes in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from vtrain.contract import (
    ClipShape,
    ConditionSpec,
    DType,
    SupportsBlockMemory,
    SupportsTokenGrid,
    takes_frame_levels,
)
from vtrain.contract.specs import bytes_text
from vtrain.data.scanning.surveys import DatasetSurvey
from vtrain.plan.conditions import frames_text, given_latents, least_frames
from vtrain.plan.records import DatasetPlan, Plan


def price_rows(plan: Plan, dataset: DatasetPlan, found: DatasetSurvey) -> Iterable[tuple[str, str]]:
    """Rows for a dataset some of whose draws have more than text: how many have what, and the memory of the dearest batch."""
    required = [each for each in plan.conditions if each.required]
    if required:
        yield "given", f"at every draw: {', '.join(each.summary for each in required)}"
    optional = [each for each in plan.conditions if not each.required]
    if not optional or not dataset.image_to_video:
        return
    frames = min(each.latent_frames for each in optional)
    least = least_frames(plan.family, frames)
    long = [shape.frames >= least for shape in found.samples]
    if not any(long):
        words = {2: "two latent frames"}.get(frames, f"{frames} latent frames")
        yield "image to video", f"no draw: no clip here has {frames_text(least)}, {words}"
        return
    whose = "draws" if all(long) else f"draws of clips of {frames_text(least)} or more"
    yield "image to video", f"{100 * dataset.image_to_video:.4g}% of {whose} {_given(optional)}{_price(plan, dataset)}"


def _given(optional: Sequence[ConditionSpec]) -> str:
    """What draws have."""
    clean, encoded = given_latents(optional), [each.summary for each in optional if each.encoder is not None]
    words = (
        ["start from a clean first frame" if clean == 1 else f"start from {clean} clean latent frames"] if clean else []
    )
    return " and ".join(words + ([f"are given {', '.join(encoded)}"] if encoded else []))


def _price(plan: Plan, dataset: DatasetPlan) -> str:
    """Of levels by frame, "" if they cost nothing."""
    if not given_latents(plan.conditions) or not takes_frame_levels(plan.family):
        return ""
    most = plan.config.train.batch_size * _frame_levels_bytes(plan, dataset)
    return f"; a batch with one takes up to {bytes_text(most)} more, for a level at each token" if most else ""


def _frame_levels_bytes(plan: Plan, dataset: DatasetPlan) -> int:
    """What the largest clip takes in training with a level for each frame, beyond one for the clip; 0 where nobody measured it."""
    family, precision = plan.family, plan.config.precision
    if not isinstance(family, SupportsBlockMemory) or not isinstance(family, SupportsTokenGrid):
        return 0
    compute: DType = "bf16" if precision.mixed == "bf16" else plan.loaded
    found = [family.block_memory(weights=plan.loaded, compute=compute, frame_levels=each) for each in (True, False)]
    shapes = (ClipShape(dataset.frames, size.height, size.width) for size in dataset.sizes)
    # Of some blocks, or of a part of each, no more than of all of them as a whole.
    every_block = precision.gradient_checkpointing is True and precision.gradient_checkpointing_interval == 1
    # What the first token takes would be there for the clip as a whole.
    tokens = max(prod(family.token_grid(family.latent_shape(shape))) for shape in shapes) - 1
    with_levels, without = (
        each.kept(tokens, family.block_count, checkpointing=every_block) if each else 0.0 for each in found
    )
    return round(with_levels - without) if None not in found else 0


def picture_rows(plan: Plan) -> Iterable[tuple[str, str]]:
    """A row for the prompts that start from a picture."""
    made = plan.validation
    return (("image to video", f"from a picture: {', '.join(made.images)}"),) if made and made.images else ()
