"""Whether a file ends before its container says it does: an unfinished download, copy or recording.

Only what the container itself states counts: an index of its frames, its own size, a number of frames, a length. Where the size is
what falls short, the frames must too, since only an index or a list of chapters may be missing. A stream that states
nothing (a raw MPEG video, a live recording) cannot be told from a shorter one.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from vtrain.data.decoding.video import FileFault, faults

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream


@dataclass(frozen=True)
class Walked:
    """What the packets of a file amount to. frames: of the video. end: seconds from the file's zero to the video's end; all_end: to
    that of the longest stream. half: whether the last packets are marked as damaged or cut.
    """

    frames: int
    end: float
    all_end: float
    half: bool


def check_index(container: InputContainer, video: VideoStream, size: int) -> None:
    """Raises FileFault if an index at the file's start, of MP4, MOV or Matroska, names bytes behind its end. size: in bytes."""
    if not container.format.name.startswith(("mov", "matroska")):
        return
    ends = [entry.pos + entry.size for entry in video.index_entries if not entry.is_discard]
    if not ends or max(ends) <= size:
        return
    if len(ends) == video.frames:
        raise _cut_off(f", {sum(end <= size for end in ends)} of {len(ends)} frames are there")
    raise _cut_off(f", {size} of at least {max(ends)} bytes are there")


def check_walked(stream: BinaryIO, container: InputContainer, video: VideoStream, walked: Walked) -> None:
    """Raises FileFault if a file whose packets were all read has fewer than it states. The stream is left anywhere."""
    with faults("cannot be read"):
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        lack = _lack(stream, size, container, video, walked)
    if not lack and walked.half:
        lack = f" within the last of its {walked.frames} frames"
    if lack:
        raise _cut_off(lack)


def _lack(stream: BinaryIO, size: int, container: InputContainer, video: VideoStream, walked: Walked) -> str:
    """In words, to stand behind "is cut off"; "" for a file that has what it states."""
    match container.format.name:
        case "gif":
            return "" if size > _MOST_GIF or _gif_is_whole(stream.read()) else " within a picture"
        case "mpegts":
            return " within a packet" if _ts_rest(stream, size) else ""
        case "ogg":
            return "" if _ogg_is_whole(stream, size) else " within a page"
        case "apng":
            stated = _apng_frames(stream)
            return f", {walked.frames} of {stated} frames are there" if walked.frames < stated else ""
        case "avi" if video.time_base:
            # Its header counts a frame that is only shown longer each time.
            length = float(video.frames * video.time_base)
            return _shorter(walked.end, length, walked) if _riff_end(stream, size) > size else ""
        case "mpeg":
            return "" if _ps_is_whole(stream, size) else " within a packet"
        case "asf":
            stated, length = _asf_stated(stream)
            return _shorter(walked.all_end, length, walked) if stated > size else ""
        case "flv":
            return _shorter(walked.all_end, _length(container), walked, frames=2)
        case name if name.startswith("matroska"):
            return _matroska_lack(stream, size, container, video, walked)
        case name if name.startswith("mov") and not video.frames and video.duration and video.time_base:
            length = float(video.duration * video.time_base)  # of all fragments, where an index at the start has them
            return _shorter(walked.end, length, walked, frames=2)
    return ""


def _matroska_lack(stream: BinaryIO, size: int, container: InputContainer, video: VideoStream, walked: Walked) -> str:
    """By the length of the track, or of all where it has none; either only if bytes are missing."""
    stated = _segment_end(stream)
    if stated <= size:
        return ""
    if own := _tagged_length(video):
        return _shorter(walked.end, own, walked)
    if length := _length(container):
        return _shorter(walked.all_end, length, walked)
    return f", {size} of {stated} bytes are there"


def _length(container: InputContainer) -> float:
    """Of the longest stream, in seconds; 0 if it is not stated."""
    return (container.duration or 0) / 1e6


def _shorter(end: float, stated: float, walked: Walked, frames: float = 0.5) -> str:
    """end, stated: seconds. frames: by which a stated length may be off; bytes that are missing too allow less."""
    slack = max(frames * walked.end / walked.frames, 0.02 * stated if frames > 1 else 0)
    return f", {end:.3f} of {stated:.3f} s are there" if end < stated - slack else ""


def _cut_off(what: str) -> FileFault:
    return FileFault(f"is cut off{what}: an unfinished download, copy or recording?")


# -- what containers state -----------------------------------------------------------------------------------------------

_MOST_GIF = 1 << 28
"""Bytes: it is read whole."""


def _gif_is_whole(data: bytes) -> bool:
    """Its blocks (GIF89a, appendix B) up to the end mark, which may lack, or to what is none."""

    def table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    try:
        at = 13 + table(data[10])
        while at < len(data):
            if data[at] == 0x21:
                at += 2
            elif data[at] == 0x2C:
                at += 11 + table(data[at + 9])
            else:
                return True
            while data[at]:
                at += data[at] + 1
            at += 1
    except IndexError:
        return False
    return True


_TS_PACKETS = ((188, 0), (192, 4), (204, 0))
"""(length of a packet, where its mark is)."""


def _ts_rest(stream: BinaryIO, size: int) -> bool:
    """Whether an MPEG transport stream ends in the middle of a packet."""
    head = stream.read(8 * 204)
    for length, mark in _TS_PACKETS:
        for first in range(length):
            if all(head[at : at + 1] in (b"G", b"") for at in range(first + mark, len(head), length)):
                rest = (size - first) % length
                stream.seek(size - rest + mark)
                return rest > mark and stream.read(1) == b"G"  # else what follows is no packet
    return False


_TAIL = 1 << 17
"""Bytes: more than a packet or a page may have."""


def _ps_is_whole(stream: BinaryIO, size: int) -> bool:
    """Whether the packets of the last pack of an MPEG program stream (ISO/IEC 13818-1, 2.5.3) end where the file does."""
    tail = _tail(stream, size)
    at = tail.rfind(b"\0\0\1\xba")
    if at < 0 or at + 14 > len(tail):
        return at < 0
    at += 14 + (tail[at + 13] & 7) if tail[at + 4] >> 6 == 1 else 12  # of MPEG-2, else of MPEG-1
    while at < len(tail):
        if not tail[at : at + 4].startswith(b"\0\0\1") or tail[at + 3 : at + 4] <= b"\xba":
            return len(tail) - at >= 4  # what follows is no packet
        at += 6 + int.from_bytes(tail[at + 4 : at + 6], "big")
    return at == len(tail)


def _tail(stream: BinaryIO, size: int) -> bytes:
    stream.seek(max(0, size - _TAIL))
    return stream.read(_TAIL)


def _riff_end(stream: BinaryIO, size: int) -> int:
    """Where the last RIFF chunk of an AVI file ends as it says; one of more than 1 GiB has several."""
    at = 0
    while at + 12 <= size:
        stream.seek(at)
        kind, length = struct.unpack("<4sI", stream.read(8))
        if kind != b"RIFF" or not length or length == 0xFFFFFFFF:  # a recording that was never ended
            break
        at += 8 + length + length % 2
    return at - 16 if at > size else at  # some count the chunk's own head


def _apng_frames(stream: BinaryIO) -> int:
    """Of the chunk acTL, which stands before the first picture."""
    head = stream.read(1 << 16)
    at = head.find(b"acTL")
    return int.from_bytes(head[at + 4 : at + 8], "big") if 0 <= at <= len(head) - 8 else 0


_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def _asf_stated(stream: BinaryIO) -> tuple[int, float]:
    """Bytes and seconds, of the file properties object (ASF specification, 3.2); 0 for a broadcast, which has none."""
    head = stream.read(1 << 16)
    at = head.find(_ASF_FILE)
    if not 0 <= at <= len(head) - 92 or head[at + 88] & 1:
        return 0, 0.0
    (size,) = struct.unpack("<Q", head[at + 40 : at + 48])
    play, _, preroll = struct.unpack("<QQQ", head[at + 64 : at + 88])  # in 100 ns, and in ms
    return size, play / 1e7 - preroll / 1e3


def _ogg_is_whole(stream: BinaryIO, size: int) -> bool:
    """Whether the last page (RFC 3533, 6) has as many bytes as its table says."""
    tail = _tail(stream, size)
    at = tail.rfind(b"OggS\0")
    if at < 0:
        return True
    if len(tail) < at + 27 or len(tail) < at + 27 + tail[at + 26]:
        return False
    return at + 27 + tail[at + 26] + sum(tail[at + 27 : at + 27 + tail[at + 26]]) <= len(tail)


def _segment_end(stream: BinaryIO) -> int:
    """Where Matroska's segment (RFC 8794, RFC 9559) ends as it says; 0 if its length was left open."""
    stream.seek(0)
    head = stream.read(4096)
    length, at = _ebml_length(head, 4)
    if head[:4] != b"\x1a\x45\xdf\xa3" or length is None or head[at + length : at + length + 4] != b"\x18\x53\x80\x67":
        return 0
    length, at = _ebml_length(head, at + length + 4)
    return 0 if length is None else at + length


def _ebml_length(data: bytes, at: int) -> tuple[int | None, int]:
    """(a length, where it ends); None for one that is open."""
    first = data[at] if at < len(data) else 0
    if not first:
        return None, at
    count = 9 - first.bit_length()
    bits = 7 * count
    value = int.from_bytes(data[at : at + count], "big") & ((1 << bits) - 1)
    return (None if value == (1 << bits) - 1 else value), at + count


def _tagged_length(video: VideoStream) -> float:
    """Seconds to the video's end by Matroska's tag of the track, "00:00:05.000000000"; 0 if it has none."""
    for name, text in video.metadata.items():
        if name.partition("-")[0] == "DURATION":
            try:
                hours, minutes, seconds = text.split(":")
                return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
            except ValueError:
                return 0.0
    return 0.0
