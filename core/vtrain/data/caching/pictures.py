"""The pictures that validation starts from, each encoded once: as clean frames by the codec, and by conditions' encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from vtrain.contract import ClipShape, ConditionSpec, DataError, Problem, tensors_of, torch_type
from vtrain.data.caching.artifacts import ConditionArtifact, VideoArtifact
from vtrain.data.caching.caches import Caches
from vtrain.data.caching.encoders import opened
from vtrain.data.caching.inventory import Stores
from vtrain.data.decoding.decode import decode
from vtrain.data.decoding.video import FileFault, faults
from vtrain.data.sample import TRANSFORM_VERSION, Sample
from vtrain.data.scanning.scan import PICTURE_REMEDY, clean_shape, picture_file_faults, pictures
from vtrain.plan.records import Plan


@dataclass(frozen=True)
class Given:
    """What videos are generated from beside their prompts. clean: (B, C, n, h, w) fp32, their first latent frames, which stay as
    they are; None: there are none. extras: what stands in Condition.extras."""

    clean: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, each: Sequence[Given]) -> Given:
        """Several in one batch, all with as many clean frames."""
        clean = [one.clean for one in each if one.clean is not None]
        names = each[0].extras
        return cls(
            torch.cat(clean) if clean else None, {name: torch.cat([one.extras[name] for one in each]) for name in names}
        )


def absent(conditions: Sequence[ConditionSpec], clip: ClipShape, count: int) -> dict[str, Tensor]:
    """What `count` clips of one shape without any of these conditions have in Condition.extras: zeros."""
    found = tensors_of(conditions, clip).items()
    return {name: torch.zeros((count, *shape), dtype=torch_type(dtype)) for name, (shape, dtype) in found}


@dataclass(frozen=True)
class _PictureEntry:
    """One entry of one picture. sample: of its file; shape and speed are those of what is decoded, or generated."""

    artifact: VideoArtifact | ConditionArtifact
    sample: Sample
    key: str

    def pixels(self) -> Tensor:
        """uint8 (3, F, H, W). Raises FileFault."""
        frames = self.artifact.frames(self.sample)
        file = Path(self.sample.ref_id)
        with picture_file_faults(file), faults("cannot be read"), file.open("rb") as stream:
            return decode(stream, self.sample if frames is None else self.sample.only(frames), 0.0)


def _entries(stores: Stores) -> dict[str, list[_PictureEntry]]:
    """nickname -> all that is encoded of its picture, as that of a clip whose dataset is decoded by PyAV. Raises FileFault."""
    plan, shape = stores.plan, clean_shape(stores.plan)
    return {nickname: list(_of_picture(stores, sample, shape)) for nickname, sample in pictures(plan).items()}


def _of_picture(stores: Stores, sample: Sample, clean: ClipShape | None) -> Iterator[_PictureEntry]:
    """clean: of what the codec encodes of it."""
    # A single picture has no speed; and entries from before there was more than one keep their names.
    still = replace(sample, fps=1.0)
    artifacts: list[tuple[VideoArtifact | ConditionArtifact, Sample]] = [
        (artifact, still if artifact.condition.source == "first_frame" else sample)
        for artifact in stores.conditions.values()
    ]
    if clean is not None:
        artifacts.insert(0, (stores.videos, replace(still if clean.frames == 1 else sample, shape=clean)))
    for artifact, own in artifacts:
        yield _PictureEntry(artifact, own, artifact.made_key(own, 0.0, own.content, TRANSFORM_VERSION))


def fill_pictures(plan: Plan, device: str) -> None:
    """Encode what is missing, a model after the other; one is opened only if something is. Raises DataError."""
    stores = Stores(plan)
    with _explained(plan):
        entries = [entry for each in _entries(stores).values() for entry in each]
        artifacts: list[VideoArtifact | ConditionArtifact] = [stores.videos, *stores.conditions.values()]
        for artifact in artifacts:
            named = {entry.key: entry for entry in entries if entry.artifact is artifact}
            missing = [entry for key, entry in named.items() if not artifact.entries.sound(key)]
            if missing:
                with opened(artifact, device) as encode:
                    for entry in missing:
                        (parts,) = encode([entry.pixels()], entry.sample)
                        if not all(bool(part.isfinite().all()) for part in parts.values()):
                            what = "it encodes to numbers that are not finite."
                            raise DataError(Problem(entry.sample.ref_id, what, "Give another picture."))
                        artifact.entries.write(entry.key, parts)


def given(plan: Plan, caches: Caches) -> Mapping[str, Given]:
    """nickname -> what its video is generated from, of those with a picture. Raises DataError."""
    found: dict[str, Given] = {}
    with _explained(plan):
        for nickname, entries in _entries(Stores(plan)).items():
            clean, extras = None, dict[str, Tensor]()
            for entry in entries:
                if isinstance(entry.artifact, VideoArtifact):
                    clean = caches.video_entries([entry.key]).mean
                else:
                    extras |= caches.condition_entries([entry.key])
            found[nickname] = Given(clean, extras)
    return found


def keys(stores: Stores) -> dict[str, dict[str, list[str]]]:
    """nickname -> kind of entry -> the keys of its picture's. Raises FileFault."""
    found: dict[str, dict[str, list[str]]] = {}
    for nickname, entries in _entries(stores).items():
        for entry in entries:
            found.setdefault(nickname, {}).setdefault(entry.artifact.entries.kind, []).append(entry.key)
    return found


@contextmanager
def _explained(plan: Plan) -> Iterator[None]:
    try:
        yield
    except FileFault as fault:
        where = plan.config.where("validation", "images")
        raise DataError(Problem(where, f"{fault.reason}.", PICTURE_REMEDY)) from fault
