"""Pictures that videos start from: encoded as clips of one frame, once, in the cache of encoded videos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vtrain.contract import DataError, Problem
from vtrain.data.caching.caches import Caches
from vtrain.data.caching.encoders import opened
from vtrain.data.caching.keys import video_key
from vtrain.data.caching.stores import Stores
from vtrain.data.decoding.decode import decode
from vtrain.data.decoding.video import FileFault, faults
from vtrain.data.sample import TRANSFORM_VERSION, Sample
from vtrain.data.scanning.pictures import REMEDY, of_file, pictures
from vtrain.plan.records import Plan


def fill_pictures(plan: Plan, device: str) -> None:
    """Encode what is missing; the codec is opened only if something is. Raises DataError."""
    stores = Stores(plan)
    try:
        named = {key_of(stores, sample): sample for sample in pictures(plan).values()}
        missing = {key: sample for key, sample in named.items() if not stores.video.sound(key)}
        if not missing:
            return
        with opened(stores.videos, device) as encode:
            for key, sample in missing.items():
                (parts,) = encode([_pixels(sample)], sample)
                if not all(bool(part.isfinite().all()) for part in parts.values()):
                    what = "it encodes to numbers that are not finite."
                    raise DataError(Problem(sample.ref_id, what, "Give another picture."))
                stores.video.write(key, parts)
    except FileFault as fault:
        raise _error(plan, fault) from fault


def first_frames(plan: Plan, caches: Caches) -> Mapping[str, Tensor]:
    """nickname -> clean first latent frame (1, C, 1, h, w) fp32 of those that start from a picture. Raises DataError."""
    try:
        return {name: caches.video_entries([key]).mean for name, key in keys(Stores(plan)).items()}
    except FileFault as fault:
        raise _error(plan, fault) from fault


def keys(stores: Stores) -> dict[str, str]:
    """nickname -> key of its entry among the encoded videos. Raises FileFault."""
    return {name: key_of(stores, sample) for name, sample in pictures(stores.plan).items()}


def key_of(stores: Stores, sample: Sample) -> str:
    """As that of a clip of one frame whose dataset is decoded by PyAV."""
    std = stores.plan.config.cache.latents == "sample"
    return video_key(sample.content, sample, 0.0, TRANSFORM_VERSION, stores.videos.fingerprint, std=std)


def _pixels(sample: Sample) -> Tensor:
    """uint8 (3, 1, H, W). Raises FileFault."""
    file = Path(sample.ref_id)
    with of_file(file), faults("cannot be read"), file.open("rb") as stream:
        return decode(stream, sample, 0.0)


def _error(plan: Plan, fault: FileFault) -> DataError:
    where = plan.config.where("validation", "images")
    return DataError(Problem(where, f"{fault.reason}.", REMEDY))
