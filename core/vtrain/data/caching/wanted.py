"""Which entries a run uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from vtrain.contract import Caption, DataError, Problem, Role
from vtrain.data.caching.columns import MaskColumn, known_key, layout_of
from vtrain.data.caching.entries import KINDS
from vtrain.data.caching.inventory import Wanted
from vtrain.data.caching.stores import Stores
from vtrain.data.sample import Sample
from vtrain.plan.records import Plan

DROPPED = Caption("")
"""What a dropped caption is replaced by, with the role "dropped"."""


def texts(
    plan: Plan, samples: Iterable[Sample], extra: Sequence[tuple[Caption, Role]]
) -> Iterator[tuple[Caption, Role]]:
    """All that a run encodes as text: captions, the dropped caption if any is dropped, and what it needs beside them."""
    for sample in samples:
        for caption in sample.captions:
            yield caption, "prompt"
    if plan.config.train.caption_dropout > 0:
        yield DROPPED, "dropped"
    yield from extra


def wanted(stores: Stores, samples: Iterable[Sample], extra: Sequence[tuple[Caption, Role]]) -> dict[str, Wanted]:
    """By kind. Raises DataError."""
    text = {bytes.fromhex(stores.text_key(caption, role)) for caption, role in texts(stores.plan, samples, extra)}
    found = {"text": _Names(text)} | {kind: _Names() for kind in KINDS if kind != "text"}
    for sample in samples:
        for start in sample.starts:
            for column in stores.columns:
                if not column.covers(sample):
                    continue
                key = known_key(column, sample, start)
                found[column.entries.kind].add(key)
                if isinstance(column, MaskColumn) and key is not None and _is_empty(column, sample, key):
                    break  # nothing else is made of this window
    return {kind: Wanted(frozenset(names.keys), names.unread) for kind, names in found.items()}


def _is_empty(column: MaskColumn, sample: Sample, key: str) -> bool:
    layout = layout_of(column, sample, key)
    return layout is not None and column.is_empty(sample, layout)


@dataclass
class _Names:
    """Keys of one kind while they are found. unread: windows whose file was never read."""

    keys: set[bytes] = field(default_factory=set)
    unread: int = 0

    def add(self, key: str | None) -> None:
        if key is None:
            self.unread += 1
        else:
            self.keys.add(bytes.fromhex(key))


def union(runs: Sequence[dict[str, Wanted]]) -> dict[str, Wanted]:
    """What several runs use together."""
    return {
        kind: Wanted(frozenset().union(*(run[kind].keys for run in runs)), sum(run[kind].unread for run in runs))
        for kind in runs[0]
    }


def check_all_read(all_wanted: dict[str, Wanted], names: str) -> None:
    """Raises DataError if entries that are used have no name yet: they could be taken for others."""
    unread = max(each.unread for each in all_wanted.values())  # a clip that was not read is so in each kind
    if unread:
        what = f"{unread} clips were not read yet, so it is not known which entries are theirs; nothing was deleted."
        raise DataError(Problem(names, what, "Run `vtrain cache fill` first."))
