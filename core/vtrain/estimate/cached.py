"""What is cached beside latents and text, and its bytes: features, conditions, masks. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from vtrain.contract import (
    ClipShape,
    ConditionSpec,
    DType,
    FeatureShape,
    Regularizer,
    SupportsFeatures,
    tensors_of,
)
from vtrain.contract.precision import STORAGE
from vtrain.data.scanning.surveys import Survey
from vtrain.plan.datasets import token_grid
from vtrain.plan.records import Plan

STORED_BYTES: Mapping[DType, int] = {"fp32": STORAGE["fp32"].bits // 8, "bf16": STORAGE["bf16"].bits // 8}
"""Of one number of what is cached or trained, by storage type; what is quantised has scales beside (`StorageType.bytes`)."""


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
    return math.prod(shape) * STORED_BYTES[part.feature_dtype]


def _feature_shape(plan: Plan, part: Regularizer, clip: ClipShape) -> FeatureShape | None:
    """None where the plan refuses the regularizer anyway."""
    grid = token_grid(plan.family, clip)
    return part.feature_shape(clip, grid) if grid is not None and isinstance(part, SupportsFeatures) else None


def mask_bytes(plan: Plan, survey: Survey) -> int:
    """Bytes of all masks that may be cached: at most one for each window of a dataset with masks."""
    total = 0
    for dataset, found in zip(plan.datasets, survey.datasets, strict=True):
        for shape in found.samples if dataset.masks is not None else ():
            total += math.prod(plan.family.latent_shape(shape)[1:]) * STORED_BYTES["fp32"] * found.windows_of(shape)
    return total


def condition_bytes(plan: Plan, survey: Survey) -> dict[str, int]:
    """Bytes of what is cached of each condition with an encoder, for each window of a dataset whose draws may have it."""
    return {
        each.name: sum(
            _tensor_bytes(each, shape) * found.windows_of(shape)
            for dataset, found in zip(plan.datasets, survey.datasets, strict=True)
            for shape in (found.samples if dataset.has(each) else ())
        )
        for each in plan.encoded
    }


def _tensor_bytes(condition: ConditionSpec, shape: ClipShape) -> int:
    return sum(math.prod(size) * STORED_BYTES[dtype] for size, dtype in tensors_of([condition], shape).values())


def condition_words(plan: Plan, survey: Survey) -> Iterator[tuple[str, int, str]]:
    """(condition, windows, what its encoder makes of the largest clip: "picture 13x3x8x8 fp32, colours 4x6 bf16")."""
    for each in plan.encoded:
        covered = [found for dataset, found in zip(plan.datasets, survey.datasets, strict=True) if dataset.has(each)]
        shapes = [shape for found in covered for shape in found.samples]
        if shapes:
            largest = max(shapes, key=lambda shape, each=each: _tensor_bytes(each, shape))  # type: ignore[misc]
            made = tensors_of([each], largest).items()
            words = [f"{name} {'x'.join(map(str, size))} {dtype}" for name, (size, dtype) in made]
            yield (
                each.name,
                sum(found.windows_of(shape) for found in covered for shape in found.samples),
                ", ".join(words),
            )
