"""Deciding: what becomes of every file of a place under one dataset's settings, written down as one row each.

Rows that did not change since the last decision under the same settings are not looked at again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from vtrain.contract import Caption, FrameRule, Words
from vtrain.data import captions
from vtrain.data.fitting import Fit, decides, fit
from vtrain.data.ledger import PAGE, Ledger, marks, probe_of, words_of
from vtrain.data.listing import CLIPS, IMAGE, useless
from vtrain.data.sample import Left
from vtrain.data.sources import origin_of
from vtrain.plan.records import DatasetPlan

_UNDECIDED = """
    SELECT source.ref, source.kind, source.size, source.version, source.fault, source.probe, {words}, old.reason
    FROM source
    LEFT JOIN fate old ON old.decision = :decision AND old.ref = source.ref AND old.size = source.size
        AND old.version = source.version AND old.kind = 'decoding'
    {joined}
    WHERE source.place = :place AND source.ref > :after AND source.generation > :generation
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
_TOLD = (
    "told.words, NULL, NULL, NULL",
    "LEFT JOIN told ON told.place = source.place AND told.origin = :origin AND told.name = source.ref",
)
_NOTHING = ("NULL, NULL, NULL, NULL", "")

TOLD = ("csv", "parquet", "backend")
"""Settings of data.captions whose captions stand in the table of that name."""

_COLUMNS = 17


def settings_key(dataset: DatasetPlan, rule: FrameRule) -> str:
    """Names everything of a dataset's settings that decides over its files."""
    return hashlib.sha256(json.dumps([decides(dataset, rule), dataset.table.images]).encode()).hexdigest()


def decide(ledger: Ledger, place: int, dataset: DatasetPlan, rule: FrameRule) -> int:
    """The number of the decision, whose fates are then those of the place as the ledger knows it."""
    settings = settings_key(dataset, rule)
    now = ledger.generation(place)
    with ledger.transaction() as db:
        db.execute("INSERT OR IGNORE INTO decision (settings, place, generation) VALUES (?, ?, -1)", (settings, place))
    number, before = ledger.rows(
        "SELECT number, generation FROM decision WHERE settings = :settings", {"settings": settings}
    )[0]
    if before != now:
        _decide_rows(ledger, number, place, before, dataset, rule)
        with ledger.transaction() as db:
            db.execute("UPDATE decision SET generation = ?, survey = NULL WHERE number = ?", (now, number))
    return int(number)


def _decide_rows(
    ledger: Ledger, decision: int, place: int, generation: int, dataset: DatasetPlan, rule: FrameRule
) -> None:
    """generation: up to which all is decided."""
    beside = captions.BESIDE.values()
    words, joined = _BESIDE if dataset.captions in beside else _TOLD if dataset.captions in TOLD else _NOTHING
    values = {
        "decision": decision, "place": place, "generation": generation, "captions": dataset.captions,
        "origin": origin_of(dataset),
    }  # fmt: skip
    rows: list[tuple[object, ...]] = []
    insert = f"INSERT OR REPLACE INTO fate VALUES ({marks(range(_COLUMNS))})"
    for row in ledger.pages(_UNDECIDED.format(words=words, joined=joined), values):
        ref, kind, size, version = row[:4]
        outcome = _outcome(ref, kind, row[4:], dataset, rule)
        rows.append((decision, ref, size, version, *_row(outcome)))
        if len(rows) >= PAGE:
            _insert(ledger, insert, rows)
    _insert(ledger, insert, rows)


def _insert(ledger: Ledger, query: str, rows: list[tuple[object, ...]]) -> None:
    with ledger.transaction() as db:
        db.executemany(query, rows)
    rows.clear()


def _outcome(
    ref: str, kind: str, row: Sequence[Any], dataset: DatasetPlan, rule: FrameRule
) -> tuple[Fit, tuple[Caption, ...]] | Left:
    fault, probe, words, bad_words, first, last, undecodable = row
    if kind not in CLIPS or (kind == IMAGE and not dataset.table.images):
        return useless(ref, kind)
    if undecodable is not None:
        return Left("failed", "decoding", undecodable)
    if probe is None:
        return Left("failed", "bad file", fault or "was not looked at")
    fitted = fit(probe_of(probe), dataset, rule, ref)  # type: ignore[arg-type]
    if isinstance(fitted, Left):
        return fitted
    chosen = captions.choose(ref, _found(words, bad_words, first, last), dataset)
    return chosen if isinstance(chosen, Left) else (fitted, chosen)


def _found(words: str | None, fault: str | None, first: str | None, last: str | None) -> Words | Left | None:
    """What the place of captions says of a clip. first, last: its caption files, by name."""
    if first != last:
        return Left("dropped", "two captions", f"it has two caption files, {first} and {last}: keep one")
    if fault is not None:
        return Left("dropped", "bad caption", fault)
    if words is not None and words.startswith('"'):
        return Left("dropped", "bad caption", json.loads(words))
    return words_of(words)


def _row(outcome: tuple[Fit, tuple[Caption, ...]] | Left) -> tuple[object, ...]:
    if isinstance(outcome, Left):
        return (outcome.status, outcome.kind, outcome.reason, None, None, None, 0, 0, 1.0, None, None, "", 0)
    fitted, chosen = outcome
    made = [fitted.fps, [[cut.starts, cut.box] for cut in fitted.cuts]]
    texts = [[caption.text, dict(caption.extras)] for caption in chosen]
    return (
        "used", "", "", *fitted.shape, len(fitted.cuts), sum(len(cut.starts) for cut in fitted.cuts), fitted.stretch,
        json.dumps(made, separators=(",", ":")),
        json.dumps(texts, ensure_ascii=False, separators=(",", ":")), "", 0,
    )  # fmt: skip
