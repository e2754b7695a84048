"""Files that ffmpeg refuses: people are told what such a file holds, with ffmpeg's own words behind it."""

from __future__ import annotations

import gzip
import io
import re
import struct
import wave
import zipfile

import pytest

from vtrain.data.decoding.probe import probe
from vtrain.data.decoding.video import FileFault, described
from vtrain.data.decoding.worker import Workers

PAGE = b"\n  <!DOCTYPE html>\n<html><body>Please sign in</body></html>\n"
INVALID = "Invalid data found when processing input"


def zipped(data: bytes) -> bytes:
    with zipfile.ZipFile(target := io.BytesIO(), "w") as archive:
        archive.writestr("clip.mp4", data)
    return target.getvalue()


def sound() -> bytes:
    with wave.open(target := io.BytesIO(), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))
    return target.getvalue()


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


@pytest.mark.parametrize(
    ("damaged", "what"),
    [
        (lambda clip: clip[: clip.index(b"moov") - 100], "the file ends before its index (moov): an unfinished download"),
        (lambda clip: clip[: clip.index(b"moov") - 4], "it has no index (moov)"),
        (lambda clip: b"", "it is empty (0 bytes)"),
        (lambda clip: bytes(5000), "it begins with zeros: an unfinished download or copy?"),
        (lambda clip: PAGE, "it is an HTML page: a download that was refused"),
        (lambda clip: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "it is an XML text"),
        (lambda clip: "Ein Fähnchen, ein Käse. ".encode() * 90, "it is a text"),
        (lambda clip: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "it is a pointer of Git LFS"),
        (zipped, "it is a zip archive"),
        (gzip.compress, "it is a gzip file"),
        (lambda clip: sound(), "it is sound (WAV)"),
        (lambda clip: box(b"ftyp", b"heic" + bytes(12)) + box(b"meta", bytes(64)), "it is a picture (HEIC)"),
        (lambda clip: box(b"styp", b"msdh" + bytes(8)) + box(b"moof", bytes(99)), "it is a part of a stream (moof)"),
    ],
)  # fmt: skip
def test_what_the_file_holds_is_told_with_ffmpegs_words_in_brackets(make_video, damaged, what) -> None:
    data = damaged(make_video(frames=30, fps=12))
    with pytest.raises(FileFault) as caught:
        probe(io.BytesIO(data))
    assert caught.value.reason.startswith(f"cannot be read as a video: {what}")
    assert re.search(r" \(ffmpeg: [A-Z][a-z][a-z ]+\)$", caught.value.reason), caught.value.reason
    assert caught.value.lasting


def test_an_index_that_is_cut_off_is_told(make_video) -> None:
    """ffmpeg opens such a file, and finds nothing in it."""
    data = make_video(frames=30, fps=12)
    with pytest.raises(FileFault, match=r"^holds no video: the file ends within its index \(moov\): an unfinished"):
        probe(io.BytesIO(data[: data.index(b"moov") + 200]))


@pytest.mark.parametrize("cut", range(1000, 1031))
def test_a_text_is_one_wherever_its_beginning_is_cut(cut: int) -> None:
    assert described(io.BytesIO(b"x" * cut + "Käse, €, 🐰".encode() * 9)) == "it is a text"


def test_of_what_is_not_known_ffmpegs_words_are_all(make_video) -> None:
    noise = bytes((197 * k * k + 31 * k + 128) % 251 for k in range(5000))
    with pytest.raises(FileFault, match=f"^cannot be read as a video: {INVALID}$"):
        probe(io.BytesIO(noise))
    assert described(io.BytesIO(make_video(frames=3))) == ""
    assert described(io.BytesIO(make_video(frames=3, form="matroska"))) == ""


def test_a_file_of_many_boxes_is_not_walked_to_its_end() -> None:
    """Each may be a request to a storage; nothing is said of an index that may come."""

    class Counting(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            self.reads += 1
            return super().read(size)

    file = Counting(box(b"ftyp", b"isom") + box(b"free", b"") * 100_000)
    assert described(file) == ""
    assert file.reads < 80


@pytest.mark.parametrize("number", range(40))
def test_boxes_that_lie_end_the_walk(number: int) -> None:
    lengths = [0, 1, 2, 7, 8, 9, 0xFFFFFFFF]
    head = struct.pack(">I4sQ", lengths[number % 7], b"ftyp", [0, 1, 15, 1 << 63, (1 << 64) - 1][number % 5])
    assert described(io.BytesIO(head + bytes(number))) in (
        "", "it has no index (moov)", "the file ends before its index (moov): an unfinished download or recording?",
    )  # fmt: skip


def test_a_storage_that_fails_then_is_not_the_files_fault() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(FileFault, match="Connection reset by peer") as caught:
        probe(Failing(b"x" * 100))
    assert not caught.value.lasting


def test_the_worker_process_tells_it_too(setup, make_video, decoding_process: Workers) -> None:
    setup.add("page.mp4", PAGE)
    backend = setup.dataset().backend
    (ref,) = (ref for ref in backend.refs() if ref.id == "page.mp4")
    with pytest.raises(FileFault, match="it is an HTML page"):
        decoding_process.probe(backend, ref)
