"""How much of their pictures clips lose in their buckets, cropped away or stretched; past a third, the buckets that would fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtrain.contract import Family, Size
from vtrain.data.scanning.ledger import Ledger
from vtrain.plan.datasets import size_near
from vtrain.plan.records import DatasetPlan

LIMIT = 1 / 3
"""Cropped away, or wider or higher by more than this: pointed out."""

_NAMED = 3
"""Clips that are named, and buckets that are proposed."""

_ALIKE = 1.3
"""A bucket of the family is proposed if its area is within this factor of that which the clip is in now."""


@dataclass(frozen=True)
class Loss:
    """Of the pictures in one bucket. cropped: the share of the area that is cropped away, at most, and on average of all clips.

    stretch: how much wider or higher a picture becomes by being squeezed, at least 1. worst: the file that loses most, "" if
    none does.
    """

    cropped: float = 0.0
    cropped_mean: float = 0.0
    stretch: float = 1.0
    stretch_mean: float = 1.0
    worst: str = ""


NO_LOSS = Loss()


def joined(losses: Sequence[tuple[Loss, int]]) -> Loss:
    """Of several datasets' clips in one bucket, each with its number of clips."""
    clips = sum(count for _, count in losses) or 1
    worst = max((loss for loss, _ in losses), key=lambda loss: loss.cropped + loss.stretch)
    return Loss(
        cropped=max(loss.cropped for loss, _ in losses),
        cropped_mean=sum(loss.cropped_mean * count for loss, count in losses) / clips,
        stretch=max(loss.stretch for loss, _ in losses),
        stretch_mean=sum(loss.stretch_mean * count for loss, count in losses) / clips,
        worst=worst.worst,
    )


@dataclass(frozen=True)
class Misfits:
    """Clips of one dataset that lose more than a third. worst: (file, loss as a share), the most first.

    aspects: (aspect of the picture as it is shown, number of clips).
    """

    clips: int = 0
    worst: tuple[tuple[str, float], ...] = ()
    aspects: tuple[tuple[float, int], ...] = ()


NO_MISFITS = Misfits()

_PAST = f"decision = :decision AND status = 'used' AND (cropped > {LIMIT} OR stretch > {1 + LIMIT})"

_ASPECTS = (
    f"SELECT round(aspect, 2), count(*) FROM file_decision WHERE {_PAST} GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 1000"
)

_WORST = f"""SELECT ref, cropped + stretch - 1 FROM file_decision WHERE {_PAST}
    ORDER BY cropped + stretch DESC, ref LIMIT {_NAMED}"""


def find_misfits(ledger: Ledger, decision: int) -> list[Any]:
    """What `misfits_of` reads, as JSON knows it."""
    values = {"decision": decision}
    if not (aspects := ledger.rows(_ASPECTS, values)):
        return []
    return [ledger.rows(_WORST, values), aspects]


def misfits_of(found: Sequence[Any]) -> Misfits:
    if not found:
        return NO_MISFITS
    worst, aspects = (tuple((name, number) for name, number in rows) for rows in found)
    return Misfits(sum(count for _, count in aspects), worst, aspects)


def pointed_out(family: Family, dataset: DatasetPlan, misfits: Misfits, clips: int) -> str:
    """In words, with what to do. clips: used of the dataset."""
    one = misfits.clips == 1
    if dataset.table.crop == "none":
        what = f"{'is' if one else 'are'} stretched by more than a third"
    else:
        what = f"{'loses' if one else 'lose'} more than a third of the picture to the crop"
    worst = ", ".join(f"{name} {100 * share:.0f}%" for name, share in misfits.worst)
    of = f"{misfits.clips} of {clips} clip{'s' if clips != 1 else ''}"
    return f"{of} {what} ({worst}); {_remedy(family, dataset, misfits)}"


def _remedy(family: Family, dataset: DatasetPlan, misfits: Misfits) -> str:
    """Sizes that would fit, the one for the most clips first; a bucket set of the family where one has them all."""
    wanted: Counter[Size] = Counter()
    for aspect, count in misfits.aspects:
        if (size := _fitting(family, dataset, aspect)) is not None:
            wanted[size] += count
    if not wanted:
        return "a smaller data.downsample_to would crop less"  # nothing else crops a picture of its bucket's aspect
    for name, sizes in family.resolutions().items():
        if {*dataset.sizes, *wanted} <= {*sizes}:
            return f'data.resolution = "{name}" has buckets that fit'
    fitting = " and ".join(f'"{size}"' for size, _ in wanted.most_common(_NAMED))
    listing = "" if isinstance(dataset.table.resolution, tuple) else ", as a list of sizes"
    return f"to fit them, add {fitting} to data.resolution{listing}"


def _fitting(family: Family, dataset: DatasetPlan, aspect: float) -> Size | None:
    """Of about the area that a clip of this aspect has now: the family's nearest in aspect, or one that is made; None if the
    bucket that it has now fits."""

    def apart(size: Size) -> float:
        return abs(math.log(size.aspect / aspect))

    most = math.log(1 + LIMIT if dataset.table.crop == "none" else 1 / (1 - LIMIT))
    now = min(dataset.sizes, key=apart)
    if apart(now) <= most:
        return None
    official = {size for sizes in family.resolutions().values() for size in sizes}
    near = sorted(size for size in official if 1 / _ALIKE < size.area / now.area < _ALIKE)
    best = min(near, key=apart, default=now)
    if apart(best) <= most:
        return best
    return size_near(round(math.sqrt(now.area)), "pixel_area", family.pixel_stride, aspect, 1)
