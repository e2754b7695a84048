"""Which entries a run uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from vtrain.contract import Caption, DataError, Problem, Role
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
    video: set[bytes] = set()
    unread = 0
    for sample in samples:
        for start in sample.starts:
            key = stores.known_video_key(sample, start)
            if key is None:
                unread += 1
            else:
                video.add(bytes.fromhex(key))
    return {"text": Wanted(frozenset(text)), "video": Wanted(frozenset(video), unread)}


def union(runs: Sequence[dict[str, Wanted]]) -> dict[str, Wanted]:
    """What several runs use together."""
    return {
        kind: Wanted(frozenset().union(*(run[kind].keys for run in runs)), sum(run[kind].unread for run in runs))
        for kind in runs[0]
    }


def check_all_read(all_wanted: dict[str, Wanted], names: str) -> None:
    """Raises DataError if entries that are used have no name yet: they could be taken for others."""
    unread = sum(each.unread for each in all_wanted.values())
    if unread:
        what = f"{unread} clips were not read yet, so it is not known which entries are theirs; nothing was deleted."
        raise DataError(Problem(names, what, "Run `vtrain cache fill` first."))
