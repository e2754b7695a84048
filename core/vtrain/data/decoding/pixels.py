"""A decoded frame as 8-bit RGB, upright, by ffmpeg's own conversion.

Matrix (BT.601, BT.709, ...), range (full, limited) and the place of the chroma samples are those that the file states;
ffmpeg takes an unstated matrix for BT.601 and an unstated range of YUV for limited, whatever the size. 10 and more bits
are brought to 8 with ffmpeg's dither. Transparency is dropped, interlaced frames stay as they are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vtrain.data.decoding.video import FileFault, faults

if TYPE_CHECKING:
    from enum import Enum

    from av.buffer import Buffer
    from av.filter import Graph
    from av.video.frame import VideoFrame

_SIDE_DATA_TYPES = 48
"""More than ffmpeg has types of frame side data (35 in its version 8.1)."""

Picture = np.ndarray[Any, np.dtype[np.uint8]]
"""(h, w, 3)."""


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a stored picture is turned upright: first transposed, then mirrored left-right and upside-down."""

    transpose: bool = False
    mirror: bool = False
    flip: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> Orientation:
        """From the display matrix of the frame, if it has one. Raises FileFault for other than quarter turns.

        The matrix (ISO/IEC 14496-12, 8.2.2) is ((a, b, u), (c, d, v), (x, y, w)): (x', y') = (a x + c y, b x + d y).
        """
        matrix = _display_matrix(frame)
        if matrix is None:
            return cls()
        a, b, _, c, d = struct.unpack("=5i", bytes(memoryview(matrix))[:20])
        if a and d and not b and not c:
            return cls(False, a < 0, d < 0)
        if b and c and not a and not d:
            return cls(True, c < 0, b < 0)
        raise FileFault("is to be shown turned by an angle that is not a quarter turn")

    def __str__(self) -> str:
        """In words; "" for a picture that is stored upright."""
        return {
            (False, True, True): "turned by 180 degrees",
            (True, True, False): "turned by 90 degrees clockwise",
            (True, False, True): "turned by 90 degrees counterclockwise",
            (False, True, False): "mirrored",
            (False, False, True): "mirrored, and turned by 180 degrees",
            (True, False, False): "mirrored, and turned by 90 degrees counterclockwise",
            (True, True, True): "mirrored, and turned by 90 degrees clockwise",
        }.get((self.transpose, self.mirror, self.flip), "")

    def upright(self, picture: Picture) -> Picture:
        """(h, w, 3) as stored -> (h, w, 3) as shown; a view."""
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.flip else 1, :: -1 if self.mirror else 1]


class Conversion:
    """The frames of one clip to RGB; ffmpeg's scaler is set up once, and anew if the frames' format changes."""

    def __init__(self) -> None:
        self._format: tuple[object, ...] | None = None
        self._graph: Graph | None = None
        self._rotation: float | None = None
        self._orientation = Orientation()

    def upright(self, frame: VideoFrame) -> Picture:
        """The picture as it is shown. Raises FileFault.

        The orientation is that of the first frame until the rotation changes: PyAV keeps a frame whose side data were
        asked for until Python's cyclic garbage collection, and a clip's frames would pile up.
        """
        # Read of each frame: PyAV computes it without keeping side data.
        if frame.rotation != self._rotation:
            self._rotation, self._orientation = frame.rotation, Orientation.of(frame)
        return self._orientation.upright(self.rgb(frame))

    def rgb(self, frame: VideoFrame) -> Picture:
        """The picture as it is stored. Raises FileFault for colours that ffmpeg cannot convert."""
        found = (frame.format.name, frame.width, frame.height, int(frame.colorspace), int(frame.color_range))
        with faults(f"its pixels ({frame.format.name}, matrix {found[3]} of H.273) cannot be converted to RGB"):
            if self._graph is None or found != self._format:
                self._graph, self._format = _graph(*found), found  # each frame's own matrix and range count
            self._graph.vpush(frame)
            converted = self._graph.vpull()
        return cast("Picture", converted.to_ndarray())


def _display_matrix(frame: VideoFrame) -> Buffer | None:
    from av.buffer import Buffer

    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV gives no side data at all if one has a type that it cannot name, such as EXIF
        matrix = _only_named(frame).side_data.get("DISPLAYMATRIX")
    return matrix if isinstance(matrix, Buffer) else None


def _only_named(frame: VideoFrame) -> VideoFrame:
    """The frame without side data of types that PyAV cannot name."""
    from av.filter import Graph
    from av.sidedata.sidedata import Type

    named = {int(cast("Enum", kind).value) for kind in Type}
    graph = Graph()
    chain = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))]
    chain += [graph.add("sidedata", f"mode=delete:type={n}") for n in range(_SIDE_DATA_TYPES) if n not in named]
    graph.link_nodes(*chain, graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()


def _graph(form: str, width: int, height: int, matrix: int, span: int) -> Graph:
    from av.filter import Graph

    graph = Graph()
    graph.threads = 1
    source = graph.add(
        "buffer", video_size=f"{width}x{height}", pix_fmt=form, time_base="1/1000", pixel_aspect="1/1",
        colorspace=str(matrix), range=str(span),
    )  # fmt: skip
    scale = graph.add("scale", "flags=bicubic")  # the default of ffmpeg's command line
    graph.link_nodes(source, scale, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
    return graph
