"""File decisions: whether a source file is used, dropped by a setting, or failed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vtrain.contract import Caption, ClipShape, Family, FrameRule, Words
from vtrain.data.decoding.probe import Probe
from vtrain.data.decoding.video import SLACK
from vtrain.data.sample import MASK_VERSION, TRANSFORM_VERSION, Skipped, mask_grid
from vtrain.data.scanning import captions
from vtrain.data.scanning.extras import own_extras
from vtrain.data.scanning.fitting import Fit, decides, fit
from vtrain.data.scanning.ledger import CLIPS, IMAGE, PAGE, Ledger, marks, probe_of, useless, words_of
from vtrain.data.scanning.sources import origin_of
from vtrain.plan.records import DatasetPlan

# old: what only filling can find of a file. It stands, for the same settings, until the file or its mask changes.
_UNDECIDED = """
    SELECT source.ref, source.kind, source.size, source.version, source.fault, source.probe, {words}, old.status,
        old.kind, old.reason, {mask}
    FROM source
    {joined}
    LEFT JOIN file_decision old ON old.decision = :decision AND old.ref = source.ref AND old.size = source.size
        AND old.version = source.version AND old.kind IN ('decoding', 'bad mask', 'empty mask') {same}
    WHERE source.place = :place AND source.ref > :after AND {changed}
        AND source.kind IN ('video', 'image', 'other', 'misnamed')
    ORDER BY source.ref LIMIT :limit
"""

# Two caption files of one clip differ in the case of their suffix, or of nothing at all in a place that allows that.
_BESIDE = (
    "beside.words, beside.fault, beside.ref, "
    "(SELECT max(ref) FROM source other WHERE other.place = source.place AND other.stem = source.stem "
    "AND other.kind = :captions)",
    "LEFT JOIN source beside ON beside.place = source.place AND beside.ref = (SELECT min(ref) FROM source other "
    "WHERE other.place = source.place AND other.stem = source.stem AND other.kind = :captions)",
)
_OF_DATASET = (
    "dataset_caption.words, NULL, NULL, NULL",
    "LEFT JOIN dataset_caption ON dataset_caption.place = source.place AND dataset_caption.origin = :origin "
    "AND dataset_caption.name = source.ref",
)
_NOTHING = ("NULL, NULL, NULL, NULL", "")


@dataclass(frozen=True)
class _Masks:
    """What a dataset with masks, or without, asks of the ledger.

    columns: the first of a clip's masks, what is known of it, and the last; joined: where they are found; changed: which
    clips are to be decided again; same: that what was found in filling was found with the same mask.
    """

    columns: str = "NULL, NULL, NULL, NULL"
    joined: str = ""
    changed: str = "source.generation > :generation"
    same: str = ""


_OF_A_CLIP = """FROM source m WHERE m.place = source.place AND m.stem = :masks || '/' || source.stem
    AND m.kind IN ('video', 'image')"""

# Masks are no clips. A clip is decided again when a mask of it came, changed or went.
_MASKED = _Masks(
    columns=f"mask.ref, mask.fault, mask.probe, (SELECT max(ref) {_OF_A_CLIP})",
    joined=f"""LEFT JOIN source mask ON mask.place = source.place AND mask.ref = (SELECT min(ref) {_OF_A_CLIP})
    LEFT JOIN file_decision masked ON masked.decision = :decision AND masked.ref = source.ref""",
    # IS NOT: the mask of a clip may be gone, and is NULL then.
    changed=f"""(source.generation > :generation OR (SELECT max(generation) {_OF_A_CLIP}) > :generation
        OR (masked.mask != '' AND masked.mask IS NOT mask.ref) OR masked.kind = 'two masks')
        AND NOT (source.ref > :masks || '/' AND source.ref < :masks || '0')""",
    same="AND old.mask = coalesce(mask.ref, '') AND coalesce(mask.generation, -1) <= :generation",
)

TOLD = ("csv", "parquet", "backend")
"""Settings of data.captions whose captions stand in the table of that name."""

_ASPECT = 0.02
"""A mask may be this much wider or higher than its clip: sizes are whole."""

_COLUMNS = 19


def settings_key(dataset: DatasetPlan, family: Family) -> str:
    """Names everything of a dataset's settings, and of the model's, that decides over its files."""
    decisive = decides(dataset, family.frame_rule)
    return hashlib.sha256(
        json.dumps([TRANSFORM_VERSION, decisive, dataset.table.images, _masks(dataset, family)]).encode()
    ).hexdigest()


def _masks(dataset: DatasetPlan, family: Family) -> list[object] | None:
    """What of [data.masks] decides over files. invert and the latents' grid do: over masks that train nothing."""
    masks = dataset.masks
    if masks is None:
        return None
    longest = (ClipShape(dataset.frames, size.height, size.width) for size in dataset.sizes)
    grids = [[[[s.start, s.stop] for s in g.spans], g.height, g.width] for g in (mask_grid(family, s) for s in longest)]
    return [masks.folder, masks.invert, masks.missing, MASK_VERSION, grids]


def decide(ledger: Ledger, place: int, dataset: DatasetPlan, family: Family) -> int:
    """The number of the decision, whose file_decisions are then those of the place as the ledger knows it."""
    settings = settings_key(dataset, family)
    # Read before the rows: what changes after this has a later number, and is decided next time.
    now = ledger.generation(place)
    with ledger.transaction() as db:
        # -1 is before every generation: all is decided.
        db.execute("INSERT OR IGNORE INTO decision (settings, place, generation) VALUES (?, ?, -1)", (settings, place))
    number, before = ledger.rows(
        "SELECT number, generation FROM decision WHERE settings = :settings", {"settings": settings}
    )[0]
    if before != now:
        _decide_rows(ledger, number, place, before, dataset, family.frame_rule)
        with ledger.transaction() as db:
            db.execute("UPDATE decision SET generation = ?, statistics = NULL WHERE number = ?", (now, number))
    return int(number)


def _decide_rows(
    ledger: Ledger, decision: int, place: int, generation: int, dataset: DatasetPlan, rule: FrameRule
) -> None:
    """generation: up to which all is decided."""
    beside = captions.BESIDE.values()
    words, joined = _BESIDE if dataset.captions in beside else _OF_DATASET if dataset.captions in TOLD else _NOTHING
    values = {
        "decision": decision, "place": place, "generation": generation, "captions": dataset.captions,
        "origin": origin_of(dataset), "masks": None if dataset.masks is None else dataset.masks.folder,
    }  # fmt: skip
    rows: list[tuple[object, ...]] = []
    insert = f"INSERT OR REPLACE INTO file_decision VALUES ({marks(range(_COLUMNS))})"
    masks = _Masks() if dataset.masks is None else _MASKED
    query = _UNDECIDED.format(
        words=words, joined=f"{joined} {masks.joined}", mask=masks.columns, changed=masks.changed, same=masks.same
    )
    for row in ledger.pages(query, values):
        ref, kind, size, version = row[:4]
        outcome = _outcome(ref, kind, row[4:], dataset, rule)
        rows.append((decision, ref, size, version, *_row(outcome, row[-4] or "")))
        if len(rows) >= PAGE:
            _insert(ledger, insert, rows)
    _insert(ledger, insert, rows)


class _Used(NamedTuple):
    """A clip's place, its captions, and what its caption file looks like (captions.looks_like)."""

    fit: Fit
    captions: tuple[Caption, ...]
    looks: str


def _insert(ledger: Ledger, query: str, rows: list[tuple[object, ...]]) -> None:
    with ledger.transaction() as db:
        db.executemany(query, rows)
    rows.clear()


def _outcome(ref: str, kind: str, row: Sequence[Any], dataset: DatasetPlan, rule: FrameRule) -> _Used | Skipped:
    fault, probe, words, bad_words, first, last, status, found, why, *mask = row
    if kind not in CLIPS or (kind == IMAGE and not dataset.table.images):
        return useless(ref, kind)
    if why is not None:
        return Skipped(status, found, why)  # found in filling
    if probe is None:
        return Skipped("failed", "bad file", fault or "was not read")
    fitted = fit(probe_of(probe), dataset, rule, ref)  # type: ignore[arg-type]
    if isinstance(fitted, Skipped):
        return fitted
    if (left := _masked(ref, probe_of(probe), mask, dataset)) is not None:
        return left
    chosen = captions.choose(ref, _found(words, bad_words, first, last, dataset), dataset)
    if isinstance(chosen, Skipped):
        return chosen
    lines = words_of(words) if dataset.captions == "textfile" else None
    return _Used(fitted, chosen, "" if lines is None else captions.looks_like(lines.texts, dataset))


def _masked(ref: str, clip: Probe | None, row: Sequence[Any], dataset: DatasetPlan) -> Skipped | None:
    """Why a clip is skipped for its mask, if so. row: as _Masks.columns."""
    first, fault, probe, last = row
    if dataset.masks is None or clip is None:
        return None
    if first is None:
        if dataset.masks.missing == "whole":
            return None
        name = f"{dataset.masks.folder}/{captions.stem(ref)}"
        return Skipped("dropped", "no mask", f"it has no mask: {name} with any suffix of an image or a video")
    if first != last:
        return Skipped("dropped", "two masks", f"it has two masks, {first} and {last}: keep one")
    wrong = _bad_mask(clip, first, fault, probe_of(probe))
    return None if wrong is None else Skipped("failed", "bad mask", wrong)


def _bad_mask(clip: Probe, ref: str, fault: str | None, mask: Probe | None) -> str | None:
    """Why the mask of a clip cannot be used, if so: it is a picture, or a video as long as the clip, of the same aspect."""
    if mask is None:
        return f"its mask {ref}: {fault or 'was not read'}"
    apart = mask.duration - clip.duration
    most = max(1 / mask.rate, 1 / clip.rate if apart > 0 else 0)
    if mask.frames > 1 and abs(apart) > most + SLACK:
        than = "longer" if apart > 0 else "shorter"
        lengths = f"{mask.duration:.3f} s of {clip.duration:.3f} s"
        return f"its mask {ref} is {than}: {lengths}; make it as long as the clip, or a single image"
    aspect, own = (p.width * p.pixel_aspect / p.height for p in (mask, clip))
    if abs(aspect / own - 1) > _ASPECT:
        sizes = f"{mask.width}x{mask.height} for {clip.width}x{clip.height}"
        return f"its mask {ref} has another aspect: {sizes}; a mask shows the whole picture of its clip, at any size"
    return None


def _found(
    words: str | None, fault: str | None, first: str | None, last: str | None, dataset: DatasetPlan
) -> Words | Skipped | None:
    """What the place of captions says of a clip. first, last: its caption files, by name."""
    if first != last:
        return Skipped("dropped", "two captions", f"it has two caption files, {first} and {last}: keep one")
    if fault is not None:
        return Skipped("dropped", "bad caption", fault)
    if words is not None and words.startswith('"'):  # a reason, as sources.caption_text writes it
        return Skipped("dropped", "bad caption", json.loads(words))
    if (found := words_of(words)) is None:
        return None
    read = own_extras(found, dataset)
    return read if isinstance(read, Words) else Skipped("dropped", "bad caption", read.reason)


def _row(outcome: _Used | Skipped, mask: str) -> tuple[object, ...]:
    if isinstance(outcome, Skipped):
        return (
            outcome.status,
            outcome.kind,
            outcome.reason,
            None,
            None,
            None,
            0,
            0,
            1.0,
            0.0,
            None,
            None,
            None,
            mask,
            "",
        )
    fitted, chosen, looks = outcome
    made = [fitted.fps, [[cut.starts, cut.box] for cut in fitted.cuts]]
    texts = [[caption.text, dict(caption.extras)] for caption in chosen]
    return (
        "used", "", "", *fitted.shape, len(fitted.cuts), sum(len(cut.starts) for cut in fitted.cuts), fitted.stretch,
        fitted.cropped, fitted.aspect, json.dumps(made, separators=(",", ":")),
        json.dumps(texts, ensure_ascii=False, separators=(",", ":")), mask, looks,
    )  # fmt: skip
