"""The buckets of a dataset: the family's own, sizes as the file lists them, or sizes made from a number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Literal

from vtrain.config.record import Config, Part
from vtrain.config.tables import DataTable
from vtrain.contract import Family, Problem, Size
from vtrain.contract.lookup import did_you_mean

ASPECTS = ((2, 1), (16, 9), (3, 2), (4, 3), (5, 4), (1, 1), (4, 5), (3, 4), (2, 3), (9, 16), (1, 2))
"""Width to height of the buckets made from a number, the widest first."""

Unit = Literal["pixel_area", "pixel"]

_NEARLY = 1.1
"""Areas within this factor are not told apart in a warning."""


def measure(width: float, height: float, unit: Unit) -> float:
    """A picture's size in a unit: the edge of a square of its area, or its shorter edge. In pixels."""
    return math.sqrt(width * height) if unit == "pixel_area" else min(width, height)


def buckets(number: int, unit: Unit, stride: int) -> tuple[Size, ...]:
    """A size of about `number` for each of ASPECTS, edges in multiples of `stride`, none twice.

    pixel_area: the multiples around the exact size that come nearest in area and aspect. pixel: the shorter edge is the
    multiple nearest to `number`.
    """
    found = []
    for width, height in ASPECTS:
        long, short = _bucket(number, unit, stride, max(width, height) / min(width, height))
        found.append(Size(long, short) if width >= height else Size(short, long))
    return tuple(dict.fromkeys(found))


def _bucket(number: int, unit: Unit, stride: int, aspect: float) -> Size:
    """For an aspect of at least 1."""
    if unit == "pixel":
        short = _nearest(number, stride)
        return Size(_nearest(short * aspect, stride), short)
    width, height = number * math.sqrt(aspect), number / math.sqrt(aspect)

    def error(size: Size) -> tuple[float, int]:
        return abs(math.log(size.area / number**2)) + abs(math.log(size.aspect / aspect)), size.area

    return min((Size(*edges) for edges in product(_around(width, stride), _around(height, stride))), key=error)


def _nearest(length: float, stride: int) -> int:
    return max(stride, math.floor(length / stride + 0.5) * stride)


def _around(length: float, stride: int) -> set[int]:
    """The multiples below and above."""
    return {max(stride, math.floor(length / stride) * stride), max(stride, math.ceil(length / stride) * stride)}


def dataset_sizes(
    config: Config, family: Family, number: int, part: Part[DataTable], problems: list[Problem]
) -> tuple[Size, ...]:
    """The buckets of [[data]] number `number`; none where resolution is wrong, which is added to `problems`."""
    wanted, named = part.table.resolution, family.resolutions()
    where = config.where("data", number, "resolution")
    if wanted is None:
        return next(iter(named.values()))
    if isinstance(wanted, int):
        return buckets(wanted, part.table.resolution_type, family.pixel_stride)
    if isinstance(wanted, str):
        if wanted in named:
            return named[wanted]
        try:
            sizes: tuple[Size, ...] = (Size.parse(wanted),)
        except ValueError:
            problems.append(_unknown(where, wanted, named))
            return ()
    else:
        sizes = wanted
    wrong = [found for size in sizes for found in check_size(where, size, family.pixel_stride)]
    problems += wrong
    return () if wrong else sizes


def _unknown(where: str, wanted: str, named: Mapping[str, tuple[Size, ...]]) -> Problem:
    sets = ", ".join(f'"{name}"' for name in named)
    what = f'resolution = "{wanted}" is neither a bucket set of this family ({sets}) nor a size such as "832x480".'
    if wanted.strip().isdigit():
        near = f'Did you mean "{int(wanted)}p"? ' if f"{int(wanted)}p" in named else ""
        return Problem(where, what, f"{near}A number stands without quotes: resolution = {int(wanted)}")
    return Problem(where, what, did_you_mean(wanted, list(named)))


def check_size(where: str, size: Size, stride: int) -> list[Problem]:
    """Both edges are multiples of the family's stride."""
    if size.width % stride == 0 and size.height % stride == 0:
        return []
    near = Size(*(max(stride, round(length / stride) * stride) for length in size))
    return [Problem(where, f"{size}: width and height must be multiples of {stride}.", f'The nearest is "{near}".')]


def pointed_out(family: Family, table: DataTable) -> tuple[str, ...]:
    """What of a number in `resolution` is probably not meant."""
    number, named = table.resolution, family.resolutions()
    if not isinstance(number, int) or table.resolution_type != "pixel_area":
        return ()
    name = f"{number}p" if f"{number}p" in named else next(iter(named))
    official = named[name][0]
    if number > 1 and 1 / _NEARLY < official.area / number**2 < _NEARLY:
        return ()
    return (
        f'resolution = {number} with resolution_type = "pixel_area" is the area of {number}x{number}, {_mega(number**2)}; '
        f'the family\'s "{name}" is {official}, {_mega(official.area)}: write resolution = "{name}" if that is meant',
    )


def _mega(area: int) -> str:
    return f"{area / 1e6:.2f} megapixels" if area >= 5000 else f"{area} pixels"
