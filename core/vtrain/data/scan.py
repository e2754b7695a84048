"""The scan: every file of every dataset becomes a sample, or is left out with its reason. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from vtrain.contract import ClipShape, DataError, FrameRule, Problem, Size, SourceRef, Words
from vtrain.data import captions
from vtrain.data.fitting import decides, fit
from vtrain.data.ledger import Fate, Ledger, Source
from vtrain.data.listing import Listing, list_files
from vtrain.data.sample import Left, Sample
from vtrain.data.sources import refresh
from vtrain.plan.records import DatasetPlan, DatasetSurvey, Plan, Survey

_DISTINCT = 4
"""Different reasons of one kind that a survey lists apart; more are counted together, with one as the example."""

Outcomes = Mapping[str, tuple[Sample, ...] | Left]
"""Ref id -> its samples, or why there is none."""


@dataclass(frozen=True)
class Scan:
    """samples: in order of their ids. survey: what was found. messages: about the ledger itself."""

    samples: tuple[Sample, ...]
    survey: Survey
    messages: tuple[str, ...]


def scan(plan: Plan, on_file: Callable[[int], None] | None = None) -> Scan:
    """Look at every file of the plan's datasets, opening only those that changed since the last scan.

    on_file: told the number of files done. Raises DataError with all problems of all datasets.
    """
    done = Counter[str]()

    def count() -> None:
        done["files"] += 1
        if on_file is not None:
            on_file(done["files"])

    problems: list[Problem] = []
    found: list[Outcomes] = []
    with Ledger(plan.config.cache.dir) as ledger:
        for place, dataset in enumerate(plan.datasets):
            try:
                outcomes = _scan_dataset(ledger, place, dataset, plan.family.frame_rule, count)
            except DataError as error:
                problems += error.problems
                continue
            problems += _problems(dataset, outcomes)
            found.append(outcomes)
        messages = (ledger.message,) if ledger.message else ()
    if problems:
        raise DataError(problems)
    samples = [s for outcomes in found for made in outcomes.values() if isinstance(made, tuple) for s in made]
    surveys = [_survey(dataset, outcomes) for dataset, outcomes in zip(plan.datasets, found, strict=True)]
    texts = len({caption.text for sample in samples for caption in sample.captions})
    return Scan(tuple(sorted(samples, key=lambda s: (s.id, s.place))), Survey(tuple(surveys), texts), messages)


def settings_key(dataset: DatasetPlan, rule: FrameRule) -> str:
    """Names everything of a dataset's settings that decides over its files."""
    return hashlib.sha256(json.dumps(decides(dataset, rule)).encode()).hexdigest()


def _scan_dataset(
    ledger: Ledger, place: int, dataset: DatasetPlan, rule: FrameRule, count: Callable[[], None]
) -> Outcomes:
    """Every file's outcome, in order of ref id; the ledger's fates are brought up to date. Raises DataError."""
    backend = dataset.backend
    try:
        listing = list_files(backend)
    except DataError as error:
        raise DataError([_at(dataset, problem) for problem in error.problems]) from error
    beside = _caption_refs(listing) if dataset.captions == "textfile" else {}
    sources = refresh(ledger, backend, chain(listing.videos, beside.values()), count)
    key = settings_key(dataset, rule)
    before = ledger.fates(key)
    outcomes: dict[str, tuple[Sample, ...] | Left] = dict(listing.left)
    for ref in listing.videos:
        outcomes[ref.id] = _undecodable(ref, before.get(ref.id)) or _decide(ref, place, dataset, rule, sources, beside)
    refs = {ref.id: ref for ref in listing.videos}
    fates = {ref_id: _fate(refs.get(ref_id), outcome) for ref_id, outcome in outcomes.items()}
    ledger.record_fates(key, {ref_id: fate for ref_id, fate in fates.items() if before.get(ref_id) != fate})
    ledger.forget_fates(key, before.keys() - fates.keys())
    return dict(sorted(outcomes.items()))


def _caption_refs(listing: Listing) -> dict[str, SourceRef]:
    """Stem -> caption file, of those that belong to a video."""
    stems = {captions.stem(ref.id) for ref in listing.videos}
    return {stem: ref for stem, ref in listing.captions.items() if stem in stems}


def _undecodable(ref: SourceRef, fate: Fate | None) -> Left | None:
    """The reason, if decoding this very file failed in an earlier run under these settings."""
    if fate is None or fate.kind != "decoding" or (fate.size, fate.version) != (ref.size, ref.version):
        return None
    return Left("failed", fate.kind, fate.reason)


def _decide(
    ref: SourceRef,
    place: int,
    dataset: DatasetPlan,
    rule: FrameRule,
    sources: Mapping[str, Source],
    beside: Mapping[str, SourceRef],
) -> tuple[Sample, ...] | Left:
    source = sources[ref.id]
    if source.probe is None:
        return Left("failed", "bad file", str(source.fault))
    place_of = fit(source.probe, dataset, rule, ref.id)
    if isinstance(place_of, Left):
        return place_of
    chosen = captions.choose(ref.id, _beside(ref, sources, beside), dataset)
    if isinstance(chosen, Left):
        return chosen
    several = len(place_of.cuts) > 1
    return tuple(
        Sample(
            id=f"{dataset.id}/{ref.id}{f'#{number}' if several else ''}", dataset=dataset.id, place=place,
            ref_id=ref.id, size=ref.size, version=ref.version,
            picture=Size(source.probe.width, source.probe.height), box=cut.box, shape=place_of.shape,
            fps=place_of.fps, starts=cut.starts, crop=dataset.table.crop, captions=chosen,
        )
        for number, cut in enumerate(place_of.cuts, start=1)
    )  # fmt: skip


def _beside(ref: SourceRef, sources: Mapping[str, Source], beside: Mapping[str, SourceRef]) -> Words | Left | None:
    """What the caption file of a clip says, or why it cannot be read; None without one."""
    if (text_ref := beside.get(captions.stem(ref.id))) is None:
        return None
    source = sources[text_ref.id]
    return Left("dropped", "bad caption", source.fault) if source.fault is not None else source.words


def _fate(ref: SourceRef | None, outcome: tuple[Sample, ...] | Left) -> Fate:
    size, version = (ref.size, ref.version) if ref else (0, "")
    if isinstance(outcome, Left):
        return Fate(size, version, outcome.status, "", outcome.kind, outcome.reason)
    return Fate(size, version, "used", str(outcome[0].shape))


def _at(dataset: DatasetPlan, problem: Problem) -> Problem:
    """A backend's problem, at the dataset's place in the configuration file."""
    return Problem(dataset.where, f"{problem.where}: {problem.what}" if problem.where else problem.what, problem.remedy)


def _problems(dataset: DatasetPlan, outcomes: Outcomes) -> Iterable[Problem]:
    """What of a scanned dataset stops a run."""
    place = dataset.backend.location
    if dataset.table.on_bad_file == "stop":
        for ref_id, outcome in outcomes.items():
            if isinstance(outcome, Left) and outcome.status == "failed":
                remedy = 'Mend or remove the file, or set data.on_bad_file = "skip".'
                yield Problem(f"{place}/{ref_id}", f"{outcome.reason}.", remedy)
    if not outcomes:
        yield Problem(dataset.where, f"dataset {dataset.id}: no file in {place}.")
    elif not any(isinstance(outcome, tuple) for outcome in outcomes.values()):
        left = _survey(dataset, outcomes).left_out
        reasons = "; ".join(f"{count} x {reason} (such as {example})" for reason, (count, example) in left.items())
        yield Problem(dataset.where, f"dataset {dataset.id}: no usable clip in {place}: {reasons}.")


def _survey(dataset: DatasetPlan, outcomes: Outcomes) -> DatasetSurvey:
    shapes: Counter[ClipShape] = Counter(s.shape for o in outcomes.values() if isinstance(o, tuple) for s in o)
    lefts = {ref_id: o for ref_id, o in outcomes.items() if isinstance(o, Left)}
    reasons: dict[str, set[str]] = {}
    for left in lefts.values():
        reasons.setdefault(left.kind, set()).add(left.reason)
    left_out: dict[str, tuple[int, str]] = {}
    merged: dict[str, str] = {}
    for ref_id, left in lefts.items():
        many = len(reasons[left.kind]) > _DISTINCT
        reason = merged.setdefault(left.kind, f"{left.kind}, such as: {left.reason}") if many else left.reason
        count, example = left_out.get(reason, (0, ref_id))
        left_out[reason] = (count + 1, example)
    return DatasetSurvey(dataset.id, len(outcomes), dict(sorted(shapes.items())), left_out, dataset.table.repeats)
