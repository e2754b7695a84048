"""Files of [validation.images] as samples of one frame. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vtrain.config.record import Config
from vtrain.contract import ClipShape, Problem, Size
from vtrain.data.decoding.probe import Probe, probe
from vtrain.data.decoding.video import FileFault, faults
from vtrain.data.sample import Sample
from vtrain.data.scanning.database import HASHES, FileHashes
from vtrain.data.scanning.fitting import box
from vtrain.plan.records import Plan

CROP = "center"
REMEDY = "Give an image or a video that can be played."


@contextmanager
def of_file(file: Path) -> Iterator[None]:
    """Faults name the file."""
    try:
        yield
    except FileFault as fault:
        raise FileFault(f"{file}: {fault.reason}", lasting=fault.lasting) from fault


def picture_faults(config: Config) -> Iterator[Problem]:
    """Files that are there and show no picture."""
    for nickname, file in (config.validation.images if config.validation else {}).items():
        try:
            if file.is_file():
                _probe(file)
        except FileFault as fault:
            where = config.where("validation", "images", nickname)
            yield Problem(where, f"{fault.reason}.", REMEDY)


def pictures(plan: Plan) -> dict[str, Sample]:
    """nickname -> what is taken of its file: the first frame, cut at its centre to the size of the videos.

    A smaller picture is enlarged. Each bears the content hash of its file, remembered by path, size and time of change.
    Raises FileFault.
    """
    made = plan.validation
    if made is None or not made.images:
        return {}
    hash_file = FileHashes(plan.config.cache.dir / HASHES)
    shape = ClipShape(1, made.shape.height, made.shape.width)
    return {nickname: _sample(file, shape, hash_file) for nickname, file in made.images.items()}


def _sample(file: Path, shape: ClipShape, hash_file: FileHashes) -> Sample:
    found = _probe(file)
    with of_file(file), faults("cannot be read"):
        state, content = file.stat(), hash_file(file)
    size = Size(shape.width, shape.height)
    return Sample(
        id=str(file), dataset="", place=-1, ref_id=str(file), size=state.st_size, version=str(state.st_mtime_ns),
        picture=Size(found.width, found.height), box=box(found, size, CROP, None), shape=shape, fps=1.0, starts=(0.0,),
        crop=CROP, captions=(), content=content,
    )  # fmt: skip


def _probe(file: Path) -> Probe:
    with of_file(file), faults("cannot be read"), file.open("rb") as stream:
        return probe(stream)
