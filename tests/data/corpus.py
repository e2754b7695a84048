"""A folder of damaged files, made from small clips by a seeded mutator: the same files at every run.

python tests/data/corpus.py FOLDER    makes it, to look at
"""

from __future__ import annotations

import io
import os
import random
import socket
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import av
import numpy as np
from PIL import Image

SEED = 20250401
FRAMES, SIZE = 20, (64, 48)

Mutation = Callable[[bytes, random.Random], bytes]


def picture(k: int) -> np.ndarray:
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    noise = np.random.default_rng(k).integers(0, 40, (*x.shape, 3))
    return (np.stack([4 * x + 5 * k, 5 * y, 0 * x + 9 * k], -1) % 216 + noise).astype(np.uint8)


def clip(form: str, codec: str, pix_fmt: str = "yuv420p", **options: str) -> bytes:
    """20 frames of 64x48 at 20 a second."""
    os.environ.setdefault("SVT_LOG", "1")
    movflags = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    with (
        tempfile.NamedTemporaryFile() as target,
        av.open(target.name, "w", format=form, options=movflags) as container,
    ):
        stream = container.add_stream(codec, rate=20)
        stream.width, stream.height = SIZE
        stream.pix_fmt = pix_fmt
        stream.options = options
        for k in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(k), format="rgb24")))
        container.mux(stream.encode())
        container.close()
        return Path(target.name).read_bytes()


def image(form: str) -> bytes:
    target = io.BytesIO()
    Image.fromarray(picture(0)).save(target, form)
    return target.getvalue()


def originals() -> dict[str, bytes]:
    """Suffix, with what tells two of one suffix apart -> a sound file."""
    return {
        "end.mp4": clip("mp4", "libx264", g="10"),
        "front.mp4": clip("mp4", "libx264", movflags="faststart", g="10"),
        "parts.mp4": clip("mp4", "libx264", movflags="frag_keyframe+empty_moov", g="5"),
        "av1.mp4": clip("mp4", "libsvtav1", preset="12"),
        "part4.mov": clip("mov", "mpeg4"),
        "h264.mkv": clip("matroska", "libx264", g="10"),
        "vp9.webm": clip("webm", "libvpx-vp9", deadline="realtime"),
        "mpeg4.avi": clip("avi", "mpeg4"),
        "jpeg.avi": clip("avi", "mjpeg", "yuvj420p"),
        "h264.ts": clip("mpegts", "libx264", g="10"),
        "flash.flv": clip("flv", "libx264", g="10"),
        "some.gif": clip("gif", "gif", "rgb8"),
        "one.png": image("PNG"),
        "one.jpg": image("JPEG"),
        "one.webp": image("WEBP"),
        "one.tif": image("TIFF"),
        "one.bmp": image("BMP"),
    }


# --- any file -------------------------------------------------------------------------------------------------------


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(1, len(data))]


def cut_head(data: bytes, chance: random.Random) -> bytes:
    return data[chance.randrange(1, len(data)) :]


def flip_few(data: bytes, chance: random.Random) -> bytes:
    return _flipped(data, chance, chance.randrange(1, 6), len(data))


def flip_many(data: bytes, chance: random.Random) -> bytes:
    return _flipped(data, chance, max(20, len(data) // 100), len(data))


def flip_header(data: bytes, chance: random.Random) -> bytes:
    return _flipped(data, chance, chance.randrange(1, 10), min(len(data), 1000))


def flip_tail(data: bytes, chance: random.Random) -> bytes:
    return _flipped(data[::-1], chance, chance.randrange(1, 10), min(len(data), 1000))[::-1]


def _flipped(data: bytes, chance: random.Random, count: int, within: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[chance.randrange(within)] ^= chance.randrange(1, 256)
    return bytes(changed)


def hole(data: bytes, chance: random.Random) -> bytes:
    start, length = chance.randrange(len(data)), chance.randrange(1, 1 + len(data) // 4)
    return data[:start] + bytes(len(data[start : start + length])) + data[start + length :]


def lose_part(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.randrange(1, 1 + len(data) // 4) :]


def gain_part(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + chance.randbytes(chance.randrange(1, 500)) + data[start:]


def twice(data: bytes, chance: random.Random) -> bytes:
    return data + data[chance.randrange(len(data)) :]


ANY: tuple[Mutation, ...] = (
    cut,
    cut_head,
    flip_few,
    flip_many,
    flip_header,
    flip_tail,
    hole,
    lose_part,
    gain_part,
    twice,
)

# --- boxes of MP4 and QuickTime -------------------------------------------------------------------------------------

_NESTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf", b"dinf", b"mvex")


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of every box, also of nested ones."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        length, name = struct.unpack(">I4s", data[start : start + 8])
        stop = start + length if length >= 8 else end
        yield name, start, min(stop, end)
        if name in _NESTS:
            yield from boxes(data, start + 8, min(stop, end))
        start = stop


def swap_boxes(data: bytes, chance: random.Random) -> bytes:
    """Two boxes that do not hold each other change places."""
    found = list(boxes(data))
    for _ in range(100):
        (_, a, b), (_, c, d) = sorted(chance.sample(found, 2), key=lambda box: box[1])
        if b <= c:
            return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]
    return data[::-1]


def lose_box(data: bytes, chance: random.Random) -> bytes:
    _, start, end = chance.choice(list(boxes(data)))
    return data[:start] + data[end:]


def lie_about_length(data: bytes, chance: random.Random) -> bytes:
    """A box that says it is empty, endless, negative, or longer than the file."""
    _, start, _ = chance.choice(list(boxes(data)))
    return data[:start] + struct.pack(">I", chance.choice([0, 1, 7, 9, 0x7FFFFFFF, 0xFFFFFFFF])) + data[start + 4 :]


def lie_in_table(data: bytes, chance: random.Random) -> bytes:
    """Another number of entries, another duration, another sample size: a field of a table of the track."""
    tables = [box for box in boxes(data) if box[0] in (b"stts", b"ctts", b"stsc", b"stsz", b"stco", b"elst", b"trun")]
    times = [box for box in boxes(data) if box[0] in (b"mvhd", b"tkhd", b"mdhd")]
    _, start, end = chance.choice((tables or times) + times)
    at = start + 12 + 4 * chance.randrange(max(1, (end - start - 12) // 4))
    value = chance.choice([0, 1, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, chance.getrandbits(32)])
    return data[:at] + struct.pack(">I", value) + data[at + 4 :]


MP4: tuple[Mutation, ...] = (swap_boxes, lose_box, lie_about_length, lie_in_table)

# --- claims ---------------------------------------------------------------------------------------------------------


def claims(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Small files that claim to be large, long, or full."""
    made: dict[str, bytes] = {}
    for width, height in ((0, 0), (1, 1), (9000, 9000), (30000, 30000), (65535, 65535), (2**31 - 1, 2**31 - 1)):
        made[f"{width}x{height}.png"] = _png(width, height)
        made[f"{width}x{height}.bmp"] = b"BM" + struct.pack("<IIIIii", 1000, 0, 54, 40, width % 2**31, height % 2**31) + (
            struct.pack("<HHIIIIII", 1, 24, 0, 0, 0, 0, 0, 0) + bytes(900)
        )  # fmt: skip
        small = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
        gif = files["some.gif"]
        made[f"screen {width}x{height}.gif"] = gif[:6] + small + gif[10:]
        jpg = files["one.jpg"]
        at = jpg.index(b"\xff\xc0") + 5
        made[f"{width}x{height}.jpg"] = jpg[:at] + struct.pack(">HH", height & 0xFFFF, width & 0xFFFF) + jpg[at + 4 :]
        mp4 = files["front.mp4"]
        at = mp4.index(b"avc1", mp4.index(b"stsd")) + 28
        made[f"entry {width}x{height}.mp4"] = (
            mp4[:at] + struct.pack(">HH", width & 0xFFFF, height & 0xFFFF) + mp4[at + 4 :]
        )
        part4 = files["part4.mov"]
        at = part4.index(b"mp4v", part4.index(b"stsd")) + 28
        made[f"entry {width}x{height}.mov"] = (
            part4[:at] + struct.pack(">HH", width & 0xFFFF, height & 0xFFFF) + part4[at + 4 :]
        )
    for count in (0, 1, 21, 10**6, 2**31 - 1, 2**32 - 1):
        made[f"sizes {count}.mp4"] = _counted(files["front.mp4"], b"stsz", 16, count)
        made[f"times {count}.mp4"] = _counted(files["front.mp4"], b"stts", 16, count)
        made[f"length {count}.mp4"] = _counted(files["front.mp4"], b"mdhd", 24, count)
        made[f"shown {count}.mp4"] = _counted(files["front.mp4"], b"elst", 16, count)
        avi = files["mpeg4.avi"]
        at = avi.index(b"strh") + 8 + 32
        made[f"length {count}.avi"] = avi[:at] + struct.pack("<I", count) + avi[at + 4 :]
    made["compressed.png"] = _png(8000, 8000, zlib.compress(bytes(8000 * 24001), 9))
    return made


def _png(width: int, height: int, data: bytes | None = None) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _counted(data: bytes, box: bytes, field: int, value: int) -> bytes:
    """With the 32-bit number at `field` bytes after the box's name minus 4 replaced."""
    at = data.index(box) - 4 + field
    return data[:at] + struct.pack(">I", value) + data[at + 4 :]


# --- the folder -----------------------------------------------------------------------------------------------------

NAMES = (
    b"line\nbreak.mp4", b"tab\tand\rreturn.mp4", "emoji 🎬🧨.mp4".encode(), "right-to-left \u202e gpj.mp4".encode(),
    b"-rf.mp4", b"--help.mp4", b"-.mp4", b"$(touch gone).mp4", b"`id`.mp4", b"%s%n%d.mp4", b"a;b&c|d.mp4",
    b"'quoted' \"twice\".mp4", b"back\\slash.mp4", b" space first.mp4", b"space last .mp4", b"dots...mp4", b"CON.mp4",
    b"x" * 251 + b".mp4", ("é" * 125 + ".mp4").encode(), b"latin \xe9\xff.mp4", b"\xf0\x28\x8c\x28.mp4",
    b"*?[a].mp4", b"#1.mp4", b"concat:a|b.mp4", b"http:x.mp4", b"file:etc.mp4", b"UPPER.MP4", "e\u0301 and é.mp4".encode(),
    b"no suffix", b"two.mp4.mp4", b"name.mp4.txt.mp4", b"bell\x07.mp4", b"del\x7f.mp4",
)  # fmt: skip


def make(folder: Path) -> int:
    """Fill an empty folder, and put what its links lead to beside it. Returns the number of files in it."""
    files = originals()
    chance = random.Random(SEED)
    for name, data in files.items():
        (folder / f"sound {name}").write_bytes(data)
        mutations = ANY + (MP4 if name.endswith((".mp4", ".mov")) else ())
        for mutation in mutations:
            for k in range(2 if mutation in MP4 else 1 + name.endswith((".mp4", ".mkv", ".avi", ".gif"))):
                (folder / f"{mutation.__name__} {k} {name}").write_bytes(mutation(data, chance))
    for name, data in claims(files).items():
        (folder / f"claim {name}").write_bytes(data)
    for k, other in enumerate(
        [b"", b"\0", bytes(5000), chance.randbytes(5000), b"<html>not found</html>", files["one.png"]]
    ):
        for suffix in (".mp4", ".webm", ".gif", ".jpg"):
            (folder / f"other {k}{suffix}").write_bytes(other)
    for raw in NAMES:
        with open(os.fsencode(folder) + b"/" + raw, "wb") as file:  # noqa: PTH123 (bytes that are no text)
            file.write(files["front.mp4"])
    _links(folder, files["front.mp4"])
    return sum(len(names) for _, _, names in os.walk(folder))


def _links(folder: Path, data: bytes) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "clip.mp4").write_bytes(data)
    (outside / "secret.txt").write_text("root:x:0:0")
    (folder / "link to a clip.mp4").symlink_to(outside / "clip.mp4")
    (folder / "link to a text.mp4").symlink_to(outside / "secret.txt")
    (folder / "link to nothing.mp4").symlink_to(outside / "gone.mp4")
    (folder / "link to itself.mp4").symlink_to(folder / "link to itself.mp4")
    (folder / "link to zeros.mp4").symlink_to("/dev/zero")
    (folder / "link to noise.mp4").symlink_to("/dev/urandom")
    (folder / "link to a folder.mp4").symlink_to(outside)
    (folder / "link around").symlink_to(folder.parent)
    os.mkfifo(folder / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as unix:
        here = Path.cwd()
        os.chdir(folder)  # a socket's path may have 107 bytes
        try:
            unix.bind("socket.mp4")
        finally:
            os.chdir(here)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    print(make(target))
