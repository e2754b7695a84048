"""What makes the entries of an artifact of decoded windows: the video codec, the encoder of a regularizer or a condition, or
nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vtrain.contract import (
    ClipShape,
    ConditionEncoder,
    Device,
    FeatureEncoder,
    Latents,
    VideoCodec,
    torch_type,
)
from vtrain.data.caching.artifacts import Artifact, ConditionArtifact, FeatureArtifact, VideoArtifact, Window
from vtrain.data.decoding.decode import unit_range
from vtrain.data.decoding.masks import is_empty
from vtrain.data.decoding.worker import Decoded, DecodeJob, MaskJob
from vtrain.data.sample import Sample
from vtrain.registry.blame import PartFault
from vtrain.registry.spelling import check_part

DecodingJob = DecodeJob | MaskJob

EncodeWindows = Callable[[Sequence[Tensor], Sample], list[dict[str, Tensor]]]
"""What was decoded of windows of one shape, and one of their samples -> the tensors of each one's entry, on the CPU.

Raises PartFault for tensors of other shapes than were promised.
"""


@contextmanager
def opened(artifact: Artifact, device: str) -> Iterator[EncodeWindows]:
    """The artifact's model is in memory for the length of the with block. Raises ModelError."""
    if isinstance(artifact, VideoArtifact):
        with artifact.plan.family.open_video_codec(device) as codec:
            check_part("video codec", codec)
            yield _video(artifact, codec, device)
    elif isinstance(artifact, FeatureArtifact):
        with artifact.part.open_feature_encoder(device) as encoder:
            check_part("feature encoder", encoder, artifact.name)
            yield _features(artifact, encoder, device)
    elif isinstance(artifact, ConditionArtifact):
        with artifact.encoder.open(device) as conditions:
            check_part("condition encoder", conditions)
            yield _conditions(artifact, conditions, device)
    else:
        yield _masks


def _video(artifact: VideoArtifact, codec: VideoCodec, device: str) -> EncodeWindows:
    here, sampled = Device.of(device), artifact.plan.config.cache.latents == "sample"

    def encode(pixels: Sequence[Tensor], sample: Sample) -> list[dict[str, Tensor]]:
        with torch.no_grad():
            latents = codec.encode(unit_range(here.move(torch.stack(list(pixels)))), std=sampled)
        if not isinstance(latents, Latents):
            raise PartFault("family", "", f"its video codec's encode gave a {type(latents).__name__}, not Latents")
        parts = {"mean": latents.mean} | ({} if latents.std is None or not sampled else {"std": latents.std})
        expected = (len(pixels), *artifact.plan.family.latent_shape(sample.shape))
        if sampled and "std" not in parts:
            raise PartFault("family", "", 'the video codec gave no std, which cache.latents = "sample" needs')
        for part in parts.values():
            if part.shape != expected:
                what = f"the video codec made latents of {tuple(part.shape)} where {expected} were promised"
                raise PartFault("family", "", what)
        whole = {name: part.float().cpu() for name, part in parts.items()}
        return [{name: part[number] for name, part in whole.items()} for number in range(len(pixels))]

    return encode


def _features(artifact: FeatureArtifact, encoder: FeatureEncoder, device: str) -> EncodeWindows:
    here, dtype = Device.of(device), torch_type(artifact.part.feature_dtype)

    def encode(pixels: Sequence[Tensor], sample: Sample) -> list[dict[str, Tensor]]:
        grid, _, shape = artifact.geometry(sample.shape)
        with torch.no_grad():
            found = encoder.encode(unit_range(here.move(torch.stack(list(pixels)))), grid)
        expected = (len(pixels), *shape)
        if found.shape != expected:
            what = f"its encoder made features of {tuple(found.shape)} where {expected} were promised"
            raise PartFault("regularizer", artifact.name, what)
        return [{"features": each} for each in found.to(dtype).cpu()]  # the type first: fewer bytes to copy

    return encode


def _conditions(artifact: ConditionArtifact, encoder: ConditionEncoder, device: str) -> EncodeWindows:
    here = Device.of(device)

    def encode(pixels: Sequence[Tensor], sample: Sample) -> list[dict[str, Tensor]]:
        with torch.no_grad():
            found = encoder.encode(unit_range(here.move(torch.stack(list(pixels)))), sample.shape)
        promised = artifact.tensors(sample.shape)
        wrong = [f"{name}, which is not declared" for name in sorted(found.keys() - promised.keys())]
        for name, (shape, dtype) in promised.items():
            expected, have = (len(pixels), *shape), found.get(name)
            if have is None:
                wrong.append(f"no {name}")
            elif (tuple(have.shape), have.dtype) != (expected, torch_type(dtype)):
                wrong.append(f"{name} {tuple(have.shape)} of {have.dtype} where {expected} of {dtype} were promised")
        if wrong:
            what = f"the encoder of the condition {artifact.condition.name} made {'; '.join(wrong)}"
            raise PartFault("family", "", what)
        whole = {name: part.cpu() for name, part in found.items()}
        return [{name: part[number] for name, part in whole.items()} for number in range(len(pixels))]

    return encode


def _masks(masks: Sequence[Tensor], sample: Sample) -> list[dict[str, Tensor]]:
    return [{_colour(mask): mask} for mask in masks]


def _colour(mask: Tensor) -> str:
    """As `MaskArtifact` names it."""
    if is_empty(mask, invert=False):
        return "black"
    return "white" if is_empty(mask, invert=True) else "mask"


def by_shape(windows: Iterable[Window], size: int) -> Iterator[Window]:
    """The same windows in runs of `size` of one shape, and at the end what is left of each; no decoded one is held."""
    waiting: dict[ClipShape, list[Window]] = {}
    for window in windows:
        batch = waiting.setdefault(window[0].shape, [])
        batch.append(window)
        if len(batch) == size:
            yield from waiting.pop(window[0].shape)
    for batch in waiting.values():
        yield from batch


def in_batches(
    decoded: Iterable[tuple[DecodingJob, Decoded]], size: int
) -> Iterator[list[tuple[DecodingJob, Decoded]]]:
    """Decoded windows of one shape, with at most `size` to encode in each list, nothing held back that need not be."""
    batch: list[tuple[DecodingJob, Decoded]] = []
    for job, found in decoded:
        if batch and batch[0][0].sample.shape != job.sample.shape:
            yield batch
            batch = []
        batch.append((job, found))
        # 0 to encode: nothing to wait for.
        if sum(other.pixels is not None for _, other in batch) in (0, size):
            yield batch
            batch = []
    if batch:
        yield batch
