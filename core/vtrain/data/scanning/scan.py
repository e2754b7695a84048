"""The scan: every file of every dataset becomes a sample or is skipped with its reason; so do validation's pictures. No torch.

It streams: a listing is merged with what the ledger knows of the place, what is new is scanned, what changed is
decided, and the counts are SQLite's. Samples are read from the ledger as they are asked for, never all in memory: nothing
grows with the number of files but the ledger.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vtrain.contract import Caption, ClipShape, ConfigError, DataError, Problem, Size, SourceRef
from vtrain.data.decoding.probe import Probe, probe
from vtrain.data.decoding.video import FileFault, faults
from vtrain.data.decoding.worker import Workers, available_cpus
from vtrain.data.sample import Box, MaskFile, Sample
from vtrain.data.scanning.database import HASHES, FileHashes, database_faults, moved_aside, open_readonly
from vtrain.data.scanning.decisions import decide
from vtrain.data.scanning.fitting import box
from vtrain.data.scanning.ledger import Ledger, pages, probe_of
from vtrain.data.scanning.sources import refresh
from vtrain.data.scanning.surveys import DatasetSurvey, Survey, count_texts, problems, survey
from vtrain.data.scanning.token_counts import TokenCounts, count_captions, cut_prompts, opened
from vtrain.plan.conditions import given_latents, least_frames
from vtrain.plan.records import DatasetPlan, Plan, ValidationPlan

_LIMIT_S = 120.0
"""Seconds for a file where its dataset says nothing else."""

_PICTURE_CROP = "center"

PICTURE_REMEDY = "Give an image or a video that can be played."

TORCHCODEC_TESTED = "0.13"
"""The version of torchcodec whose pixels were compared with ffmpeg's."""

_LOADING_S = 120.0

_REPORT = """
import json
try:
    import torchcodec
except (ImportError, OSError, RuntimeError) as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
else:
    print(json.dumps({"version": torchcodec.__version__, "ffmpeg": torchcodec.ffmpeg_major_version}))
"""

_MISSING = re.compile(r"(lib[\w.+-]+): cannot open shared object file")

_FFMPEG = re.compile(r"libav(util|codec|format|filter|device)\.so|libsw(scale|resample)\.so")

_PYAV = 'set data.decoder = "pyav"'

_INSTALL = "Install version 0.13: pip install 'vtrain[torchcodec]'"

_SAMPLES = """
    SELECT file_decision.ref, file_decision.size, file_decision.version, frames, height, width, made, captions, source.probe,
        source.sha256, mask.ref, mask.size, mask.version, mask.sha256
    FROM file_decision JOIN source ON source.place = :place AND source.ref = file_decision.ref AND source.size = file_decision.size
        AND source.version = file_decision.version
    LEFT JOIN source mask ON mask.place = :place AND mask.ref = file_decision.mask
    WHERE decision = :decision AND {which} AND made IS NOT NULL AND (file_decision.mask = '' OR mask.ref IS NOT NULL)
    ORDER BY file_decision.ref LIMIT :limit
"""

_USED, _ONE = _SAMPLES.format(which="file_decision.ref > :after"), _SAMPLES.format(which="file_decision.ref = :ref")


@dataclass(frozen=True)
class Scan:
    """samples: as the ledger gives them. survey: what was found. messages: about the ledger itself."""

    samples: Samples
    survey: Survey
    messages: tuple[str, ...]


def scan(plan: Plan, on_file: Callable[[int], None] | None = None) -> Scan:
    """Look at every file of the plan's datasets, opening only those that changed since the last scan.

    on_file: called with the number of files done. Raises DataError with all problems of all datasets.
    """
    wrong = list(picture_faults(plan))
    found: list[tuple[ScannedDataset, DatasetSurvey]] = []
    folder = plan.config.cache.dir
    with Ledger(folder) as ledger:
        for place in decided(ledger, plan, wrong, on_file):
            dataset = plan.datasets[place.number]
            seen = survey(ledger, place.place, place.decision, dataset, plan.shares[place.number])
            wrong += problems(ledger, place.decision, dataset, seen)
            found.append((replace(place, count=sum(seen.samples.values())), seen))
        if wrong:
            raise DataError(wrong)
        with opened(folder, plan.family) or nullcontext() as counts:
            if counts is not None:
                found = [
                    (each, replace(seen, tokens=count_captions(ledger, each.decision, counts))) for each, seen in found
                ]
            prompts = cut_prompts(plan.validation, counts) if counts is not None else ()
        texts = count_texts(ledger, [each.decision for each, _ in found])
        messages = ledger_messages(ledger, counts)
        samples_of_all = Samples(ledger.path, tuple(each for each, _ in found))
    return Scan(samples_of_all, Survey(tuple(seen for _, seen in found), texts, prompts), messages)


def ledger_messages(ledger: Ledger, counts: TokenCounts | None = None) -> tuple[str, ...]:
    """What became of damaged files of the cache folder: of the ledger, the hashes of model files and counts of tokens."""
    told = None if counts is None else counts.message
    return tuple(filter(None, (ledger.message, moved_aside(ledger.path.parent), told)))


def decided(
    ledger: Ledger,
    plan: Plan,
    wrong: list[Problem],
    on_file: Callable[[int], None] | None = None,
    only: str | None = None,
) -> Iterator[ScannedDataset]:
    """The plan's datasets, each brought up to date, its samples not counted. only: the id of the one that is wanted.

    wrong: takes the problems of those that could not be. on_file: called with the number of files done.
    """
    count = _counting(on_file)
    with Workers(available_cpus(), _LIMIT_S) as workers:
        for number, dataset in enumerate(plan.datasets):
            if only not in (None, dataset.id):
                continue
            try:
                place = refresh(ledger, dataset, workers, count)
            except DataError as error:
                wrong += [_at(dataset, problem) for problem in error.problems]
                continue
            decision = decide(ledger, place, dataset, plan.family)
            yield ScannedDataset(dataset.id, number, dataset.table.crop, place, decision, count=0)


def _counting(on_file: Callable[[int], None] | None) -> Callable[[], None] | None:
    if on_file is None:
        return None
    done = Counter[str]()

    def count() -> None:
        done["files"] += 1
        on_file(done["files"])

    return count


def _at(dataset: DatasetPlan, problem: Problem) -> Problem:
    """A backend's problem, at the dataset's place in the configuration file."""
    return Problem(dataset.where, f"{problem.where}: {problem.what}" if problem.where else problem.what, problem.remedy)


@dataclass(frozen=True)
class ScannedDataset:
    """What a scan found in one dataset. id: the dataset's; number: its place in plan.datasets; crop: of its table.

    place, decision: numbers in the ledger. count: samples.
    """

    id: str
    number: int
    crop: str
    place: int
    decision: int
    count: int


@dataclass(frozen=True)
class Samples:
    """Every sample of every dataset: those of a dataset together, in order of the files' ids and of the windows.

    ledger: its file. May be iterated any number of times, in any process, while the ledger is written to: a sample bears
    the content hash that the ledger knows by then, and one whose file failed meanwhile still comes.
    """

    ledger: Path
    datasets: tuple[ScannedDataset, ...]

    def __len__(self) -> int:
        """How many the scan found."""
        return sum(found.count for found in self.datasets)

    def of(self, ref: str) -> tuple[Sample, ...]:
        """Those of one file, in all datasets. Raises DataError."""
        with database_faults(self.ledger), closing(open_readonly(self.ledger)) as db:
            return tuple(
                sample
                for found in self.datasets
                for row in db.execute(_ONE, {"place": found.place, "decision": found.decision, "ref": ref, "limit": 1})
                for sample in _samples(found, row)
            )

    def __iter__(self) -> Iterator[Sample]:
        """Raises DataError."""
        if not self.datasets:
            return
        with database_faults(self.ledger):
            connection = open_readonly(self.ledger)
        with closing(connection) as db:
            for found in sorted(self.datasets, key=lambda found: f"{found.id}/"):
                values = {"place": found.place, "decision": found.decision}
                for row in pages(db, self.ledger, _USED, values):
                    yield from _samples(found, row)


def _samples(found: ScannedDataset, row: tuple[Any, ...]) -> Iterator[Sample]:
    """The samples of one file."""
    ref, size, version, frames, height, width, made, captions, probe, sha256, *mask = row
    source = probe_of(probe)
    assert source is not None  # a file is used by its probe
    masked = MaskFile(SourceRef(*mask[:3]), mask[3] or "") if mask[0] is not None else None
    fps, cuts = json.loads(made)
    texts = tuple(Caption(text, extras) for text, extras in json.loads(captions))
    for number, (starts, corners) in enumerate(cuts, start=1):
        yield Sample(
            id=f"{found.id}/{ref}{f'#{number}' if len(cuts) > 1 else ''}", dataset=found.id, place=found.number,
            ref_id=ref, size=size, version=version, picture=Size(source.width, source.height), box=Box(*corners),
            shape=ClipShape(frames, height, width), fps=fps, starts=tuple(starts), crop=found.crop, captions=texts,
            content=sha256 or "", mask=masked,
        )  # fmt: skip


def with_decoders(plan: Plan) -> Plan:
    """The plan, its datasets with name and version of what decodes them. Raises ConfigError where torchcodec cannot be used.

    A process is started only if a dataset asks for torchcodec.
    """
    asking = [dataset for dataset in plan.datasets if dataset.table.decoder == "torchcodec"]
    if not asking:
        return plan
    found = find_torchcodec()
    if isinstance(found, NotLoadable):
        numbers = [
            n for n, part in enumerate(plan.config.data) if part.table.enabled and part.table.decoder == "torchcodec"
        ]
        raise ConfigError(
            Problem(plan.config.where("data", number, "decoder"), found.what, found.remedy) for number in numbers
        )
    return replace(plan, datasets=tuple(replace(d, decoder=found) if d in asking else d for d in plan.datasets))


@dataclass(frozen=True)
class NotLoadable:
    """Why it is not used, and what to do."""

    what: str
    remedy: str


def find_torchcodec() -> str | NotLoadable:
    """Its name and version and that of ffmpeg.

    It is loaded in a process of its own: it brings libraries that this one does not need. That takes some seconds.
    """
    command = [sys.executable, "-c", _REPORT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LOADING_S, check=False)
    except subprocess.TimeoutExpired:
        return NotLoadable(f"torchcodec did not load within {_LOADING_S:g} seconds.", f"Try again, or {_PYAV}.")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return NotLoadable(f"torchcodec does not load: {last}", f"{_INSTALL}, or {_PYAV}.")
    found = json.loads(done.stdout.splitlines()[-1])
    return unusable(found["error"]) if "error" in found else _tested(found["version"], found["ffmpeg"])


def unusable(error: str) -> NotLoadable:
    """error: what importing it raised, with the type in front."""
    if error.startswith("ModuleNotFoundError: No module named 'torchcodec'"):
        return NotLoadable("torchcodec is not installed.", f"{_INSTALL}, or {_PYAV}.")
    missing = list(dict.fromkeys(_MISSING.findall(error)))
    if others := [name for name in missing if not _FFMPEG.match(name)]:
        what = f"torchcodec does not load: its build wants {', '.join(others)}, which is not there."
        return NotLoadable(what, f"{_INSTALL}, or {_PYAV}.")
    if missing:
        what = "torchcodec does not load: ffmpeg's shared libraries, of a version from 4 to 8, are not there."
        return NotLoadable(what, f"Install them (Debian, Ubuntu: apt-get install ffmpeg), or {_PYAV}.")
    return NotLoadable(f"torchcodec does not load: {error.splitlines()[0]}", f"{_INSTALL}, or {_PYAV}.")


def _tested(version: str, ffmpeg: int) -> str | NotLoadable:
    number = version.partition("+")[0]
    if number.rpartition(".")[0] != TORCHCODEC_TESTED:
        what = f"torchcodec is there in version {number}, and only {TORCHCODEC_TESTED} was compared with ffmpeg."
        return NotLoadable(what, f"{_INSTALL}, or {_PYAV}.")
    return f"torchcodec {number}, ffmpeg {ffmpeg}"


@contextmanager
def picture_file_faults(file: Path) -> Iterator[None]:
    """Faults name the file."""
    try:
        yield
    except FileFault as fault:
        raise FileFault(f"{file}: {fault.reason}", lasting=fault.lasting) from fault


def picture_faults(plan: Plan) -> Iterator[Problem]:
    """Files that are there and show no picture, or too few."""
    made = plan.validation
    for nickname, file in (made.images if made is not None else {}).items():
        try:
            if file.is_file():
                _check_length(plan, file, _probe_picture(file))
        except FileFault as fault:
            where = plan.config.where("validation", "images", nickname)
            yield Problem(where, f"{fault.reason}.", PICTURE_REMEDY)


def _check_length(plan: Plan, file: Path, found: Probe) -> None:
    """Raises FileFault for a file that is shorter than what conditions are made of."""
    made = plan.validation
    assert made is not None
    clips = [each for each in plan.conditions if each.source == "clip"]
    first = clean_shape(plan)
    least = max(made.shape.frames if any(each.encoder for each in clips) else 1, first.frames if first else 1)
    if least > 1 and found.duration * made.fps < least - 0.5:
        lasts = f"{found.duration:.3g} s" if found.frames > 1 else "one picture"
        needed = f"{least} frames at {made.fps:g} fps"
        raise FileFault(
            f"{file}: it is {lasts}, and {' and '.join(each.summary for each in clips)} is made of {needed}"
        )


def clean_shape(plan: Plan) -> ClipShape | None:
    """Of what is encoded as the first latent frames of validation's videos, which stay clean; None if none are."""
    made, frames = plan.validation, given_latents(plan.conditions)
    if made is None or not frames:
        return None
    return ClipShape(least_frames(plan.family, frames), made.shape.height, made.shape.width)


def pictures(plan: Plan) -> dict[str, Sample]:
    """nickname -> its file as a clip like the videos: of their frames and speed, from the first frame on, cut at its centre.

    How many frames are taken of it is for each use to say. A smaller picture is enlarged. Each bears the content hash of its
    file, remembered by path, size and time of change. Raises FileFault.
    """
    made = plan.validation
    if made is None or not made.images:
        return {}
    hash_file = FileHashes(plan.config.cache.dir / HASHES)
    return {nickname: _picture_sample(file, made, hash_file) for nickname, file in made.images.items()}


def _picture_sample(file: Path, made: ValidationPlan, hash_file: FileHashes) -> Sample:
    found = _probe_picture(file)
    with picture_file_faults(file), faults("cannot be read"):
        state, content = file.stat(), hash_file(file)
    return Sample(
        id=str(file), dataset="", place=-1, ref_id=str(file), size=state.st_size, version=str(state.st_mtime_ns),
        picture=Size(found.width, found.height), box=box(found, made.shape.size, _PICTURE_CROP, None), shape=made.shape,
        fps=made.fps, starts=(0.0,), crop=_PICTURE_CROP, captions=(), content=content,
    )  # fmt: skip


def _probe_picture(file: Path) -> Probe:
    with picture_file_faults(file), faults("cannot be read"), file.open("rb") as stream:
        return probe(stream)
