"""Models beside the denoiser: which of them stay in memory while it trains, and what their features take on the disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from vtrain.contract import ClipShape, FeatureShape, Regularizer, Section, SupportsFeatures
from vtrain.data.scanning.surveys import Survey
from vtrain.plan.datasets import token_grid
from vtrain.plan.records import Plan

BYTES = {"fp32": 4, "bf16": 2}
"""Of one number, by storage type."""


def feature_bytes(plan: Plan, survey: Survey) -> dict[str, int]:
    """Bytes of all features that are cached, by regularizer."""
    return {
        name: sum(_shape_bytes(plan, part, bucket.shape) * bucket.windows for bucket in survey.table())
        for name, part in plan.regularizers
        if part.needs().features == "cached"
    }


def feature_words(plan: Plan, survey: Survey) -> Iterator[tuple[str, str]]:
    """Regularizer -> what its encoder makes of the largest clip: "21 x 30x52 vectors of 1536, bf16"."""
    shapes = [bucket.shape for bucket in survey.table()]
    for name, part in plan.regularizers:
        if part.needs().features == "cached" and isinstance(part, SupportsFeatures) and shapes:
            largest = max(shapes, key=lambda shape, part=part: _shape_bytes(plan, part, shape))  # type: ignore[misc]
            found = _feature_shape(plan, part, largest)
            if found is not None:
                frames, height, width, channels = found
                yield name, f"{frames} x {width}x{height} vectors of {channels}, {part.feature_dtype}"


def _shape_bytes(plan: Plan, part: Regularizer, clip: ClipShape) -> int:
    shape = _feature_shape(plan, part, clip)
    if shape is None or not isinstance(part, SupportsFeatures):
        return 0
    return math.prod(shape) * BYTES[part.feature_dtype]


def _feature_shape(plan: Plan, part: Regularizer, clip: ClipShape) -> FeatureShape | None:
    """None where the plan refuses the regularizer anyway."""
    grid = token_grid(plan.family, clip)
    return part.feature_shape(clip, grid) if grid is not None and isinstance(part, SupportsFeatures) else None


def mask_bytes(plan: Plan, survey: Survey) -> int:
    """Bytes of all masks that may be cached: at most one for each window of a dataset with masks."""
    total = 0
    for dataset, found in zip(plan.datasets, survey.datasets, strict=True):
        for shape in found.samples if dataset.masks is not None else ():
            total += math.prod(plan.family.latent_shape(shape)[1:]) * BYTES["fp32"] * found.windows_of(shape)
    return total


def section(plan: Plan) -> Section:
    """What is in memory, on each process's device, at every step of training."""
    return Section("in memory while training", tuple(_rows(plan)))


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    size = plan.family.parameters
    yield "denoiser", f"{size:,} parameters, {plan.base}"
    yield "text encoder", "no: captions are cached"
    yield "video codec", _codec(plan)
    for name, part in plan.regularizers:
        if part.needs().features == "cached":
            yield f"encoder of {name}", "no: its features are cached"
        elif part.needs().features is not None:
            of = "the frames that the codec decodes" if part.needs().features == "decoded" else "the clips' own frames"
            yield f"encoder of {name}", f"yes: it runs at each step at which {name} is at work, on {of}"


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
        return ["validation.size", "validation.frames", *_stored(plan)]
    return [*_activations(plan), *_stored(plan), *_SMALLER] if doing == "training" else _stored(plan)


_SMALLER = ("data.video.frames", "data.resolution")


def _activations(plan: Plan) -> list[str]:
    """What a step keeps for its backward pass."""
    config = plan.config
    return [
        text
        for text, applies in (
            ("precision.gradient_checkpointing = true", not config.precision.gradient_checkpointing),
            (f"train.batch_size (it is {config.train.batch_size})", config.train.batch_size > 1),
            ('precision.mixed = "bf16"', config.precision.mixed == "no"),
        )
        if applies
    ]


def _stored(plan: Plan) -> list[str]:
    """Weights, the optimizer's state, encoders that stay."""
    config = plan.config
    online = [name for name, part in plan.regularizers if part.needs().features in ("decoded", "source")]
    return [
        text
        for text, applies in (
            ('precision.base = "bf16"', config.model.table.lora is not None and plan.base == "fp32"),
            ('model.train = "lora"', config.model.table.train == "full"),
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
