"""Surveys: what a decision amounts to, counted by SQLite and kept until something changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from vtrain.contract import ClipShape, Problem, SourceRef
from vtrain.data.scanning import extras
from vtrain.data.scanning.captions import BESIDE, JSON, SIDECAR, SUFFIX, stem
from vtrain.data.scanning.decisions import TOLD
from vtrain.data.scanning.ledger import Ledger, marks
from vtrain.data.scanning.misfits import NO_LOSS, NO_MISFITS, Loss, Misfits, find_misfits, joined, misfits_of
from vtrain.data.scanning.sources import origin_of
from vtrain.data.scanning.token_counts import CutCaptions, LongText
from vtrain.plan.records import DatasetPlan, MasksPlan


@dataclass(frozen=True)
class DatasetSurvey:
    """What a scan found in one dataset.

    files: scanned, captions not counted. samples: clip shape -> number of training samples, repeats not counted.
    skipped: reason -> (number of files, an example's id), dropped and failed alike. clips: clip shape -> number of files
    that the samples are of; windows: -> number of windows, each encoded once; where either is empty, each sample has one.
    losses: clip shape -> what pictures lose in it, where any does; misfits: the clips that lose much. notes: what else is worth
    knowing, such as caption rows without a clip. doubts: what of its captions is probably not meant. share: the part of it that
    an epoch takes. foreign_keys: of caption files, which another model family reads. tokens: what its captions take of the
    text encoder; None where the family cannot say.
    """

    id: str
    files: int
    samples: Mapping[ClipShape, int]
    skipped: Mapping[str, tuple[int, str]]
    repeats: int
    clips: Mapping[ClipShape, int] = field(default_factory=dict)
    windows: Mapping[ClipShape, int] = field(default_factory=dict)
    losses: Mapping[ClipShape, Loss] = field(default_factory=dict)
    misfits: Misfits = NO_MISFITS
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    share: Fraction = Fraction(1)
    foreign_keys: tuple[extras.Key, ...] = ()
    tokens: CutCaptions | None = None

    def clips_of(self, shape: ClipShape) -> int:
        """Files that give samples of a shape."""
        return self.clips.get(shape, 0) if self.clips else self.samples.get(shape, 0)

    def windows_of(self, shape: ClipShape) -> int:
        """Windows of a shape: what is encoded and cached."""
        return self.windows.get(shape, 0) if self.windows else self.samples.get(shape, 0)


@dataclass(frozen=True)
class Bucket:
    """What all datasets have of one shape.

    clips, windows: files, and windows to encode. samples: in an epoch, repeats counted. loss: of their pictures.
    """

    shape: ClipShape
    clips: int
    windows: int
    samples: int
    loss: Loss = NO_LOSS


@dataclass(frozen=True)
class Survey:
    """What a scan found in all datasets. texts: different captions to encode, of samples only. prompts: of validation's, those
    that the text encoder does not read to their end."""

    datasets: tuple[DatasetSurvey, ...]
    texts: int
    prompts: tuple[LongText, ...] = ()

    def table(self) -> tuple[Bucket, ...]:
        """Every bucket, in order of shape."""
        return tuple(
            Bucket(
                shape,
                clips=sum(found.clips_of(shape) for found in self.datasets),
                windows=sum(found.windows_of(shape) for found in self.datasets),
                samples=round(samples),
                loss=joined([(found.losses.get(shape, NO_LOSS), found.clips_of(shape)) for found in self.datasets]),
            )
            for shape, samples in sorted(self.buckets().items())
        )

    def buckets(self) -> dict[ClipShape, float]:
        """Samples of one epoch by clip shape, repeats and weights counted: whole unless a weight thins a dataset out."""
        total: dict[ClipShape, Fraction] = {}
        for dataset in self.datasets:
            for shape, count in dataset.samples.items():
                total[shape] = total.get(shape, Fraction(0)) + count * (1 + dataset.repeats) * dataset.share
        return {shape: _plain(count) for shape, count in total.items()}

    @property
    def epoch(self) -> float:
        """Samples in one epoch, repeats and weights counted, on average."""
        return sum(self.buckets().values())


def _plain(number: Fraction) -> float:
    """As whole as it is."""
    return number.numerator if number.denominator == 1 else float(number)


DISTINCT = 5
"""Different reasons of one kind that a survey lists apart; more are counted together, with one as the example."""

_KINDS = """SELECT kind, count(*), count(DISTINCT reason), reason, min(ref) FROM file_decision
    WHERE decision = :decision AND status != 'used' GROUP BY kind"""

_REASONS = """SELECT reason, count(*), min(ref) FROM file_decision
    WHERE decision = :decision AND status != 'used' AND kind = :kind GROUP BY reason"""

# SQLite takes ref, cropped and stretch, which stand in no aggregate, from the row that has the maximum. Of the two at most one
# is a loss in a dataset.
_SHAPES = """SELECT frames, height, width, sum(samples), count(*), sum(windows), cropped, avg(cropped), stretch, avg(stretch), ref,
    max(cropped + stretch) FROM file_decision
    WHERE decision = :decision AND status = 'used' GROUP BY frames, height, width ORDER BY frames, height, width"""

_LOOKS = """SELECT looks, count(*), min(ref) FROM file_decision
    WHERE decision = :decision AND status = 'used' AND looks != '' GROUP BY looks ORDER BY looks"""

_UNMATCHED = """SELECT count(*), min(name) FROM dataset_caption WHERE place = :place AND origin = :origin
    AND NOT EXISTS (SELECT 1 FROM source WHERE source.place = dataset_caption.place AND source.ref = dataset_caption.name
    AND source.kind IN ('video', 'image'))"""

# By the index alone, so that a million captions take half a second. Masks are no clips, and their words no captions.
_UNMATCHED_FILES = """SELECT count(*), min(ref) FROM source INDEXED BY source_by_stem
    WHERE place = :place AND kind = :captions AND NOT EXISTS (SELECT 1 FROM source clip WHERE clip.place = source.place
    AND clip.stem = source.stem AND clip.kind IN ('video', 'image'))
    AND (:masks IS NULL OR NOT (ref > :masks || '/' AND ref < :masks || '0'))
    AND stem NOT LIKE 'readme' AND stem NOT LIKE '%/readme'"""

_MASKS = """FROM source WHERE place = :place AND ref > :masks || '/' AND ref < :masks || '0'"""

_STRAY_MASKS = f"""SELECT count(*), min(ref) {_MASKS} AND kind IN ('video', 'image') AND NOT EXISTS (
    SELECT 1 FROM source clip WHERE clip.place = source.place AND clip.stem = substr(source.stem, length(:masks) + 2)
    AND clip.kind IN ('video', 'image'))"""

_NO_MASKS = f"SELECT count(*), min(ref) {_MASKS} AND kind NOT IN ('video', 'image')"


def survey(ledger: Ledger, place: int, decision: int, dataset: DatasetPlan, share: Fraction) -> DatasetSurvey:
    """Of a decision that is up to date. share: of the dataset in an epoch."""
    values = {"decision": decision}
    ((kept,),) = ledger.rows("SELECT statistics FROM decision WHERE number = :decision", values)
    if kept is None:
        kept = json.dumps(_count(ledger, decision, place, dataset))
        with ledger.transaction() as db:
            # What failed in filling had kept its cuts for those who went through the samples then (ledger._TABLES).
            db.execute("UPDATE file_decision SET made = NULL WHERE decision = ? AND status != 'used'", (decision,))
            db.execute("UPDATE decision SET statistics = ? WHERE number = ?", (kept, decision))
    files, shapes, skipped, unmatched, masks, misfits, looks, keys = json.loads(kept)
    rows = [(ClipShape(*row[:3]), *row[3:6]) for row in shapes]
    losses = {ClipShape(*row[:3]): Loss(*row[6:11]) for row in shapes if row[11] > 1}
    return DatasetSurvey(
        id=dataset.id,
        files=files,
        samples={shape: samples for shape, samples, _, _ in rows},
        skipped={reason: (count, example) for reason, count, example in skipped},
        repeats=dataset.table.repeats,
        clips={shape: clips for shape, _, clips, _ in rows},
        windows={shape: windows for shape, _, _, windows in rows},
        losses=losses,
        misfits=misfits_of(misfits),
        notes=_notes(dataset, unmatched, masks),
        doubts=(*(caption_doubt(*each) for each in looks), *filter(None, (extras.key_doubt(keys, dataset),))),
        share=share,
        foreign_keys=tuple(extras.foreign_keys(keys, dataset)),
    )


Some = tuple[int, str | None]
"""How many, and one of them."""

Query = Callable[[str, Mapping[str, object]], list[tuple[Any, ...]]]
"""Asks a ledger."""


def _notes(dataset: DatasetPlan, unmatched: Some, masks: Sequence[Any] | None) -> tuple[str, ...]:
    """unmatched: captions without a clip. masks: as `_count_masks` gives it."""
    notes = list(caption_notes(unmatched))
    if dataset.masks is not None and masks is not None:
        with_mask, without, stray, useless = masks
        notes.append(f"{_many(with_mask, 'clip')} with a mask")
        if without[0]:
            are = "is" if without[0] == 1 else "are"
            notes.append(f"{_many(without, 'clip')} without a mask {are} trained on whole (such as {without[1]})")
        if stray[0]:
            notes.append(f"{_many(stray, 'mask')} without a clip (such as {stray[1]})")
        if useless[0]:
            verb = "is" if useless[0] == 1 else "are"
            notes.append(f"{_many(useless, 'file')} in {dataset.masks.folder}/ {verb} no mask (such as {useless[1]})")
    return tuple(notes)


def unmatched_captions(rows: Query, place: int, dataset: DatasetPlan) -> Some:
    """Captions without a clip: rows of a file of captions, or caption files of the sort that the dataset takes."""
    values: dict[str, object] = {"place": place, "origin": origin_of(dataset), "captions": dataset.captions}
    values["masks"] = None if dataset.masks is None else dataset.masks.folder
    if dataset.captions not in (*TOLD, *BESIDE.values()):
        return 0, None
    ((count, example),) = rows(_UNMATCHED if dataset.captions in TOLD else _UNMATCHED_FILES, values)
    return count, example


def caption_notes(unmatched: Some) -> tuple[str, ...]:
    """In words, if there are any."""
    return (f"{_many(unmatched, 'caption')} without a clip (such as {unmatched[1]})",) if unmatched[0] else ()


def caption_looks(rows: Query, decision: int, dataset: DatasetPlan) -> list[tuple[str, int, str]]:
    """(what text files look like that are probably no caption a line, how many, a clip), where nobody said what a file is."""
    said = dataset.captions != "textfile" or dataset.table.caption_per is not None
    return [] if said else rows(_LOOKS, {"decision": decision})


def caption_doubt(looks: str, count: int, example: str) -> str:
    """In words, with what to do."""
    files = f"{count} caption file{'s' if count != 1 else ''}"
    such = f"such as {stem(example)}{SUFFIX}"
    if looks == JSON:
        does = "holds" if count == 1 else "hold"
        remedy = f'rename to {SIDECAR} and set data.captions = "json", or set data.caption_per if that is meant'
        return f"{files} {does} JSON ({such}): {remedy}"
    does = "looks" if count == 1 else "look"
    return (
        f"{files} {does} like one text over several lines ({such}), and each line is a caption now: "
        'set data.caption_per = "file", or "line" if that is meant'
    )


def sidecar_keys(rows: Query, place: int, dataset: DatasetPlan) -> list[tuple[str, int, str]]:
    """Keys of the clips' JSON sidecars beside the captions, the most frequent first."""
    return rows(extras.KEYS, {"place": place}) if dataset.captions == "json" else []


def _many(some: Sequence[Any], noun: str) -> str:
    return f"{some[0]} {noun}{'s' if some[0] != 1 else ''}"


def _count(ledger: Ledger, decision: int, place: int, dataset: DatasetPlan) -> list[Any]:
    values = {"decision": decision}
    ((files,),) = ledger.rows("SELECT count(*) FROM file_decision WHERE decision = :decision", values)
    skipped = []
    for kind, count, distinct, reason, example in ledger.rows(_KINDS, values):
        if distinct > DISTINCT:
            skipped.append((f"{kind}, such as: {reason}", count, example))
        else:
            skipped += ledger.rows(_REASONS, {**values, "kind": kind})
    skipped.sort(key=lambda row: row[2])
    unmatched = unmatched_captions(ledger.rows, place, dataset)
    masks = None if dataset.masks is None else _count_masks(ledger, decision, place, dataset.masks)
    return [
        files,
        ledger.rows(_SHAPES, values),
        skipped,
        unmatched,
        masks,
        find_misfits(ledger, decision),
        caption_looks(ledger.rows, decision, dataset),
        sidecar_keys(ledger.rows, place, dataset),
    ]


def _count_masks(ledger: Ledger, decision: int, place: int, masks: MasksPlan) -> list[Some]:
    """Used clips with a mask, and without; masks without a clip; files in the folder that can be none."""
    used = "SELECT count(*), min(ref) FROM file_decision WHERE decision = :decision AND status = 'used' AND mask"
    values = {"decision": decision, "place": place, "masks": masks.folder}
    queries = (f"{used} != ''", f"{used} = ''", _STRAY_MASKS, _NO_MASKS)
    return [ledger.rows(query, values)[0] for query in queries]


def count_texts(ledger: Ledger, decisions: Sequence[int]) -> int:
    """Different captions of all used files of these decisions."""
    known = ledger.rows(
        f"SELECT number, generation FROM decision WHERE number IN ({','.join(map(str, sorted(decisions)))})", {}
    )
    key, generations = json.dumps([row[0] for row in known]), json.dumps([row[1] for row in known])
    query = "SELECT count FROM texts WHERE decisions = :key AND generations = :generations"
    kept = ledger.rows(query, {"key": key, "generations": generations})
    if kept:
        return int(kept[0][0])
    counted = f"""SELECT count(DISTINCT value) FROM file_decision, json_each(captions)
        WHERE decision IN ({",".join(str(row[0]) for row in known)}) AND status = 'used'"""
    ((count,),) = ledger.rows(counted, {})
    with ledger.transaction() as db:
        db.execute(f"INSERT OR REPLACE INTO texts VALUES ({marks(range(3))})", (key, generations, count))
    return int(count)


def problems(ledger: Ledger, decision: int, dataset: DatasetPlan, found: DatasetSurvey) -> Iterable[Problem]:
    """What of a scanned dataset stops a run."""
    place = dataset.backend.location
    if dataset.table.on_bad_file == "stop":
        query = "SELECT ref, reason FROM file_decision WHERE decision = :decision AND status = 'failed' ORDER BY ref"
        for ref, reason in ledger.rows(query, {"decision": decision}):
            remedy = 'Fix or remove the file, or set data.on_bad_file = "skip".'
            yield Problem(f"{place}/{ref}", f"{reason}.", remedy)
    for key in found.foreign_keys:
        query = """SELECT size, version FROM source JOIN decision ON number = :decision AND source.place = decision.place
            WHERE ref = :ref"""
        ((size, version),) = ledger.rows(query, {"decision": decision, "ref": key[2]})
        line = extras.line_of(key[0], SourceRef(key[2], size, version), dataset)
        yield extras.key_problem(key, place, line, dataset)
    if not found.files:
        yield Problem(dataset.where, f"dataset {dataset.id}: no file in {place}.")
    elif dataset.masks is not None and (wrong := _masks_wrong(ledger, decision, dataset, dataset.masks)):
        yield wrong
    elif not found.samples:
        reasons = "; ".join(f"{count} x {why} (such as {example})" for why, (count, example) in found.skipped.items())
        yield Problem(dataset.where, f"dataset {dataset.id}: no usable clip in {place}: {reasons}.")


def _masks_wrong(ledger: Ledger, decision: int, dataset: DatasetPlan, masks: MasksPlan) -> Problem | None:
    """That there are no masks, or only others' than these clips'."""
    values = {"decision": decision, "masks": masks.folder}
    if ledger.rows("SELECT 1 FROM file_decision WHERE decision = :decision AND mask != '' LIMIT 1", values):
        return None
    query = f"SELECT ref {_MASKS} AND kind IN ('video', 'image') ORDER BY ref LIMIT 1".replace(
        ":place", "(SELECT place FROM decision WHERE number = :decision)"
    )
    found, folder = ledger.rows(query, values), f"{dataset.backend.location}/{masks.folder}"
    ((clip,),) = ledger.rows("SELECT min(ref) FROM file_decision WHERE decision = :decision AND samples > 0", values)
    if not found:
        what = f"dataset {dataset.id}: no image and no video in {folder}, where its masks should be."
        return Problem(masks.where, what, "data.masks.folder is a folder in the dataset; remove [data.masks] for none.")
    if clip is None:
        return None
    what = f"dataset {dataset.id}: no mask in {folder} belongs to a clip (such as {found[0][0]})."
    return Problem(masks.where, what, f"The mask of {clip} is {masks.folder}/{stem(clip)} with any such suffix.")
