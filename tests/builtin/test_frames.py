"""Folders of numbered images as clips: what is listed, what ffmpeg reads from it, what is refused."""

from __future__ import annotations

import hashlib
import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vtrain.contract import DataError, SourceRef
from vtrain_builtin.folder import LocalFolder
from vtrain_builtin.frames import FRAMES, FramesFolder, header


def picture(k: int) -> np.ndarray:
    x, y = np.meshgrid(np.arange(48), np.arange(32))
    return np.stack([(5 * x + 10 * k) % 256, 7 * y, np.full_like(x, 20 * k)], -1).astype(np.uint8)


def series(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        Image.fromarray(picture(k)).save(folder / name)


def backend(root: Path, fps: float = 24.0) -> FramesFolder:
    built = FRAMES.build(FRAMES.options(path=str(root), fps=fps))
    assert isinstance(built, FramesFolder)
    return built


def opened(found: FramesFolder, name: str) -> bytes:
    (ref,) = [ref for ref in found.refs() if ref.id == name]
    with found.open(ref) as stream:
        data = stream.read()
    assert len(data) == ref.size
    return data


@pytest.mark.parametrize("suffix", ["png", "tif", "TIFF"])
def test_a_folder_of_images_is_a_clip_of_exactly_these_pictures(tmp_path, suffix) -> None:
    series(tmp_path / "shot", [f"frame_{k:04d}.{suffix}" for k in range(7, 16)])
    data = opened(backend(tmp_path, 24000 / 1001), "shot.mov")
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.frames == 9
        assert float(stream.average_rate) == pytest.approx(24000 / 1001)
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert np.array_equal(found, [picture(k) for k in range(9)])


def test_the_header_is_always_the_same_bytes_because_caches_are_keyed_by_them() -> None:
    made = header(b"png ", [3000, 5, 70000], Fraction(24000, 1001))
    assert hashlib.sha256(made).hexdigest() == "4ddf09d7882dc9081f6a1279873f00c1813c212cf11cfeb2b8e709f8c7e60898"


def test_numbers_decide_over_the_order_and_not_names(tmp_path) -> None:
    series(tmp_path / "shot", [f"{k}.jpg" for k in range(12)])
    data = opened(backend(tmp_path), "shot.mov")
    with av.open(io.BytesIO(data)) as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    order = [
        int(np.abs(np.array([picture(k) for k in range(12)], int) - frame).mean((1, 2, 3)).argmin()) for frame in found
    ]
    assert order == list(range(12))


def test_clips_lie_among_the_other_files_in_order_of_id(tmp_path) -> None:
    for name in ("a", "a/inner", "a.x", "b-1", "b"):
        series(tmp_path / name, ["1.png", "2.png"])
    for name in ("a.txt", "a/notes.txt", "a/inner.txt", "z.txt", "cover.png"):
        (tmp_path / name).write_bytes(b"x")
    found = [ref.id for ref in backend(tmp_path).refs()]
    assert found == sorted(found)
    assert set(found) == {
        "a.mov", "a.txt", "a/inner.mov", "a/inner.txt", "a/notes.txt", "a.x.mov", "b-1.mov", "b.mov", "z.txt", "cover.png",
    }  # fmt: skip


def test_images_in_the_folder_itself_are_a_clip_of_its_name(tmp_path) -> None:
    series(tmp_path / "shot", ["1.png", "2.png"])
    assert [ref.id for ref in backend(tmp_path / "shot").refs()] == ["shot.mov"]
    assert len(opened(backend(tmp_path / "shot"), "shot.mov")) > 100


def test_a_clip_has_another_version_when_an_image_the_rate_or_their_number_changes(tmp_path) -> None:
    series(tmp_path / "shot", ["1.png", "2.png", "3.png"])

    def version(fps: float = 24.0) -> SourceRef:
        (ref,) = backend(tmp_path, fps).refs()
        return ref

    seen = [version(), version(25.0)]
    os.utime(tmp_path / "shot" / "2.png", ns=(1, 1))
    seen.append(version())
    (tmp_path / "shot" / "3.png").unlink()
    seen.append(version())
    assert len({ref.version for ref in seen}) == 4
    assert version() == seen[-1]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["1.png", "2.png", "4.png"], "images are missing between 2.png and 4.png"),
        (["1.png", "01.png"], "two images have the number 1: 01.png, 1.png"),
        (["1.png", "2.jpg"], r"more than one series of images \(1.png, 2.jpg\)"),
        (["left_1.png", "right_1.png"], r"more than one series of images \(left_1.png, right_1.png\)"),
        (["1.webp", "2.webp"], "series of .webp images are not read: save them as png, jpg or tiff"),
    ],
)
def test_images_that_are_not_one_clip_are_named_when_it_is_opened(tmp_path, names, reason) -> None:
    series(tmp_path / "shot", names)
    (ref,) = backend(tmp_path).refs()
    with pytest.raises(OSError, match=reason):
        backend(tmp_path).open(ref)


def test_an_image_that_changes_while_it_is_read_is_noticed(tmp_path) -> None:
    series(tmp_path / "shot", ["1.png", "2.png"])
    found = backend(tmp_path)
    (ref,) = found.refs()
    with found.open(ref) as stream:
        stream.read(10)
        (tmp_path / "shot" / "2.png").write_bytes(b"short")
        with pytest.raises(OSError, match=r"2\.png changed while it was read"):
            stream.read()


def test_a_link_to_nothing_among_the_images_is_listed_and_fails_when_opened(tmp_path) -> None:
    series(tmp_path / "shot", ["1.png"])
    (tmp_path / "shot" / "2.png").symlink_to("nowhere")
    found = backend(tmp_path)
    (ref,) = found.refs()
    with found.open(ref) as stream:
        data = stream.read()
    assert len(data) == ref.size


def test_a_file_beside_a_folder_of_the_same_clip_is_an_error_that_names_it(tmp_path) -> None:
    series(tmp_path / "shot", ["1.png"])
    (tmp_path / "shot.mov").write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        list(backend(tmp_path).refs())
    assert caught.value.problems[0].where == str(tmp_path / "shot.mov")


def test_a_link_to_a_folder_around_it_is_not_followed_forever(tmp_path) -> None:
    series(tmp_path / "shot", ["1.png"])
    (tmp_path / "shot" / "again").symlink_to(tmp_path)
    assert len(list(backend(tmp_path).refs())) < 5


@pytest.mark.parametrize("build", [lambda root: backend(root), lambda root: LocalFolder(str(root))])
def test_a_pipe_is_never_waited_for(tmp_path, build) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zeros.mp4").symlink_to("/dev/zero")
    found = build(tmp_path)
    for ref in found.refs():
        with pytest.raises(OSError, match="is a pipe, a socket or a device"):
            found.open(ref)
