"""Pictures that videos start from: encoded as clips of one frame, once, in the cache of encoded videos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vtrain.contract import DataError, PluginError, Problem, VideoCodec
from vtrain.data.caching.caches import Caches
from vtrain.data.caching.stores import Stores
from vtrain.data.decoding.decode import decode, unit_range
from vtrain.data.decoding.video import FileFault
from vtrain.data.sample import Sample
from vtrain.plan.records import Plan
from vtrain.validate.picture_files import keys, pictures


def fill_pictures(plan: Plan, device: str) -> None:
    """Encode what is missing; the codec is opened only if something is. Raises DataError."""
    stores = Stores(plan)
    try:
        named = {stores.video_key(sample, 0.0, sample.content): sample for sample in pictures(plan).values()}
        missing = {key: sample for key, sample in named.items() if not stores.video.sound(key)}
        if not missing:
            return
        with plan.family.open_video_codec(device) as codec, torch.no_grad():
            for key, sample in missing.items():
                stores.video.write(key, _encoded(plan, codec, sample, device))
    except FileFault as fault:
        raise _error(plan, fault) from fault


def first_frames(plan: Plan, caches: Caches) -> Mapping[str, Tensor]:
    """nickname -> clean first latent frame (1, C, 1, h, w) fp32 of those that start from a picture. Raises DataError."""
    try:
        return {name: caches.video_entries([key]).mean for name, key in keys(Stores(plan)).items()}
    except FileFault as fault:
        raise _error(plan, fault) from fault


def _encoded(plan: Plan, codec: VideoCodec, sample: Sample, device: str) -> dict[str, Tensor]:
    """The tensors of a picture's entry, on the CPU. Raises DataError, PluginError or FileFault."""
    with Path(sample.ref_id).open("rb") as stream:
        pixels = unit_range(decode(stream, sample, 0.0)[None].to(device))
    sampled = plan.config.cache.latents == "sample"
    latents = codec.encode(pixels, std=sampled)
    parts = {"mean": latents.mean} | ({} if latents.std is None or not sampled else {"std": latents.std})
    expected = (1, *plan.family.latent_shape(sample.shape))
    for part in parts.values():
        if part.shape != expected:
            what = f"the video codec made latents of {tuple(part.shape)} where {expected} were promised."
            raise PluginError(Problem("", what, "This is a fault of the model family's plugin."))
        if not bool(part.isfinite().all()):
            raise DataError(
                Problem(sample.ref_id, "it encodes to numbers that are not finite.", "Give another picture.")
            )
    return {name: part[0].float().cpu() for name, part in parts.items()}


def _error(plan: Plan, fault: FileFault) -> DataError:
    where = plan.config.where("validation", "images")
    return DataError(Problem(where, f"a picture {fault.reason}.", "Give an image or a video that can be played."))
