"""Which part of a picture fills a bucket."""

from __future__ import annotations

import math

from vtrain.config.tables import DataTable
from vtrain.contract import Size
from vtrain.data.decoding.probe import Probe
from vtrain.data.sample import Box
from vtrain.data.seeds import derive
from vtrain.plan.sizes import measure


def distance(source: Probe, size: Size) -> float:
    """How far the aspect of the picture as it is shown is from that of a size: the absolute logarithm of their ratio."""
    return abs(math.log(size.aspect * source.height / (source.width * source.pixel_aspect)))


def reduction(source: Probe, table: DataTable) -> float | None:
    """The factor by which downsample_to reduces a picture above max_size; None for others."""
    if table.max_size is None or table.downsample_to is None:
        return None
    own = measure(source.width * source.pixel_aspect, source.height, table.resolution_type)
    return table.downsample_to / own if own > table.max_size else None


def box(source: Probe, size: Size, crop: str, factor: float | None) -> Box:
    """The centred part of the picture with the bucket's aspect, to the nearest stored pixel; crop "none": all of it.

    It is the largest such part; where the picture is reduced by `factor` first and then still larger than the bucket, the
    part that the bucket covers then.
    """
    if crop == "none":
        return Box(0, 0, source.width, source.height)
    shown = source.width * source.pixel_aspect
    scale = max(size.width / shown, size.height / source.height, factor or 0)
    width = min(source.width, max(1, round(size.width / scale / source.pixel_aspect)))
    height = min(source.height, max(1, round(size.height / scale)))
    return Box((source.width - width) // 2, (source.height - height) // 2, width, height)


def place(source: Probe, part: Box, seed: int, ref_id: str, number: int) -> Box:
    """The same part elsewhere in the picture: a pure function of the seed, the clip's id and the sample's number."""
    left = derive(seed, f"crop left {ref_id}", number) % (source.width - part.width + 1)
    top = derive(seed, f"crop top {ref_id}", number) % (source.height - part.height + 1)
    return Box(left, top, part.width, part.height)


def enlarged(part: Box, size: Size) -> bool:
    """Whether a part has fewer stored pixels than its bucket, either way."""
    return part.width < size.width or part.height < size.height


def stretch(source: Probe, part: Box, size: Size) -> float:
    """How much a part becomes wider or higher in its bucket, at least 1; 1.05 is 5%."""
    change = size.aspect * part.height / (part.width * source.pixel_aspect)
    return max(change, 1 / change)
