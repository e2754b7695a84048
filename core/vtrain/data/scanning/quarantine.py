"""Moving bad files out of a dataset: data.on_bad_file = "move". Nothing is ever deleted or written over."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath

from vtrain.contract import SourceRef, SupportsFiles
from vtrain.data.scanning.decisions import settings_key
from vtrain.data.scanning.ledger import Ledger
from vtrain.plan.records import DatasetPlan, Plan

# A file with a fault that may pass, such as a storage that did not answer, is scanned again, and not moved.
_BAD = """
    SELECT file_decision.ref, file_decision.size, file_decision.version, file_decision.reason
    FROM file_decision JOIN decision ON decision = decision.number
    JOIN source ON source.place = decision.place AND source.ref = file_decision.ref AND NOT source.unseen
    LEFT JOIN source mask ON mask.place = decision.place AND mask.ref = file_decision.mask
    WHERE settings = :settings AND status = 'failed' AND file_decision.ref > :after AND NOT coalesce(mask.unseen, 0)
    ORDER BY file_decision.ref LIMIT :limit
"""


@dataclass(frozen=True)
class MovedFile:
    """A bad file of a dataset. reason: why it is bad. target: where it is now; None where it stayed, and `stays` says why."""

    dataset: str
    ref_id: str
    reason: str
    target: Path | None
    stays: str = ""


def move_bad(plan: Plan) -> Iterator[MovedFile]:
    """Move what the last scan and filling found bad, in the datasets whose settings say so. Raises DataError.

    A file of two datasets is moved once.
    """
    moved: set[tuple[str, str]] = set()
    with Ledger(plan.config.cache.dir) as ledger:
        for dataset in plan.datasets:
            if dataset.table.on_bad_file != "move":
                continue
            rows = ledger.pages(_BAD, {"settings": settings_key(dataset, plan.family)})
            bad = ((SourceRef(ref, size, version), reason) for ref, size, version, reason in rows)
            place = dataset.backend.location
            for each in quarantine(dataset, ((ref, why) for ref, why in bad if (place, ref.id) not in moved)):
                moved.add((place, each.ref_id))
                yield each


def quarantine(dataset: DatasetPlan, bad: Iterable[tuple[SourceRef, str]]) -> Iterator[MovedFile]:
    """Move the bad files of a dataset, each with its reason, if its settings say so; under the same path in the folder.

    A file stays where it is if it has changed since it was found bad, lies behind a link out of the dataset, or cannot be
    moved. Of a link, the link is moved.
    """
    folder, backend = dataset.table.quarantine, dataset.backend
    if dataset.table.on_bad_file != "move" or folder is None or not isinstance(backend, SupportsFiles):
        return
    for ref, reason in bad:
        try:
            file = backend.file(ref)
            # The folder's place, not the file's own: of a link, the link is moved.
            if not file.parent.resolve().is_relative_to(Path(backend.location).resolve()):
                raise OSError("it lies outside the dataset, behind a link")
            yield MovedFile(dataset.id, ref.id, reason, _move(file, folder.joinpath(*_parts(ref.id))))
        except OSError as error:
            yield MovedFile(dataset.id, ref.id, reason, None, error.strerror or str(error))


def _parts(ref_id: str) -> tuple[str, ...]:
    """The id as a path that leads nowhere else. Raises OSError."""
    path = PurePosixPath(ref_id)
    if path.is_absolute() or ".." in path.parts:
        raise OSError("its name leads out of the folder")
    return path.parts


def _move(file: Path, wanted: Path) -> Path:
    """Raises OSError; the file is then where it was."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    target = _reserved(wanted)  # first: a rename writes over whatever has that name
    try:
        try:
            file.replace(target)
        except OSError as error:
            if error.errno != errno.EXDEV:  # only another disk asks for a copy
                raise
            _carry(file, target)
    except OSError:
        with suppress(OSError):
            target.unlink()  # our own empty file
        raise
    return target


def _reserved(wanted: Path) -> Path:
    """An empty file of that name, or of the first "name.1.mp4", "name.2.mp4" ... that is free: made here, by nobody else."""
    for number in count():
        target = wanted if number == 0 else wanted.with_name(f"{wanted.stem}.{number}{wanted.suffix}")
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            continue
        return target
    raise AssertionError("there is always another number")


def _carry(file: Path, target: Path) -> None:
    """To another disk: the whole copy is there before the file goes."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".moving-")
    os.close(handle)
    copy = Path(name)
    try:
        if file.is_symlink():
            copy.unlink()
            copy.symlink_to(os.readlink(file))  # noqa: PTH115 (as it is written, a relative link too)
        else:
            shutil.copy2(file, copy)
            with copy.open("rb") as stream:
                os.fsync(stream.fileno())
        copy.replace(target)
    except OSError:
        copy.unlink(missing_ok=True)
        raise
    file.unlink()
