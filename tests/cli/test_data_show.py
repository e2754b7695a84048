"""`vtrain data show`, on a folder as people have them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vtrain.contract import DataError
from vtrain.data.caching.inventory import Stores
from vtrain.data.decoding.decode import decode
from vtrain.data.scanning import files
from vtrain.data.scanning.files import look, unescaped
from vtrain.data.scanning.ledger import Ledger
from vtrain.data.scanning.scan import NotLoadable, find_torchcodec
from vtrain.run.prepare import planned


def test_a_file_is_shown_with_its_windows_its_part_of_the_picture_and_its_entries(own: Path, vtrain, shown) -> None:
    config = own / "config.toml"
    config.write_text(config.read_text().replace("fps = 8\n", 'fps = 8\nwindow = "all"\n'))
    before = shown(config, "long.mp4", "--no-sheet")
    assert [window["sample"] for window in before["video"]] == [f"messy/long.mp4#{n}" for n in (1, 2, 3, 4)]
    assert before["video"][1]["times"] == pytest.approx([(9 + k) / 8 for k in range(9)])
    assert before["video"][0]["box"] == [0, 0, 192, 128]
    assert before["video"][0]["scale"] == [0.5, 0.5]
    assert {window["state"] for window in before["video"]} == {"unknown: the file was not read yet"}
    assert [(text["role"], text["text"], text["state"]) for text in before["text"]] == [
        ("prompt", "the caption of 'long'", "missing"), ("dropped", "", "missing"),
    ]  # fmt: skip
    assert before["sheet"] is None

    run = subprocess.run([sys.executable, "-m", "vtrain.cli", "cache", "fill", str(config)], capture_output=True)
    assert run.returncode == 0, run.stderr
    after = shown(config, "long.mp4", "--no-sheet")
    assert {entry["state"] for entry in after["video"] + after["text"]} == {"sound"}
    stores = Stores(planned(config))
    for entry in after["video"]:
        assert stores.video.path(entry["key"]).exists()
    broken = stores.video.path(after["video"][2]["key"])
    broken.write_bytes(broken.read_bytes()[:-9] + b"x" * 9)
    assert shown(config, "long.mp4", "--no-sheet")["video"][2]["state"] == "damaged: its checksum does not hold"
    assert broken.exists(), "looking moves nothing"

    sheet = own / "sheet.png"
    text = vtrain("data", "show", config, "long.mp4", "--decode", "--sheet", sheet).stdout
    assert "  used    as 96x64@9 at 8 fps, 4 samples, 4 windows\n" in text
    assert f"contact sheet: {sheet}\n" in text
    rows = strips(sheet, 96, 64)
    assert len(rows) == 7, "four windows, and what the codec makes of the three whose entry is sound"
    # The toy codec gives each cell of 4 x 4 pixels its average, and so the first frame of a window.
    seen, made = rows[0][0].astype(float), rows[1][0]
    cells = seen.reshape(16, 4, 24, 4, 3).mean((1, 3)).repeat(4, 0).repeat(4, 1)
    assert np.abs(cells - made).max() <= 1


def strips(sheet: Path, width: int, height: int, label: int = 16, title: int = 3) -> list[np.ndarray]:
    """The frames on a contact sheet, a row for each strip."""
    picture = np.asarray(Image.open(sheet).convert("RGB"))
    found, top = [], 2 + title * label
    while top + label + height <= picture.shape[0]:
        line = picture[top + label : top + label + height]
        found.append(np.stack([line[:, k * (width + 2) :][:, :width] for k in range(9)]))
        top += label + height + label + 2
    return found


def test_the_contact_sheet_shows_every_pixel_that_is_cached(own: Path, shown) -> None:
    config = own / "config.toml"
    found = shown(config, own / "messy" / "long.mp4")
    sheet = Path(found["sheet"])
    assert sheet.parent == own / "cache" / "sheets"
    plan = planned(config)
    files = look(plan)
    (sample,) = files.samples(files.named("long.mp4")[0])
    with (own / "messy" / "long.mp4").open("rb") as stream:
        pixels = decode(stream, sample, sample.starts[0])
    (row,) = strips(sheet, 96, 64)
    assert torch.equal(torch.from_numpy(row), pixels.permute(1, 2, 3, 0))
    assert len(found["file"]["sha256"]) == 64, "its bytes were read for the sheet"
    assert found["video"][0]["state"] == "missing"
    assert list(sheet.parent.iterdir()) == [sheet]


def test_large_and_long_clips_are_reduced_and_that_is_said_unless_all_is_asked_for(
    own: Path, vtrain, make_clip
) -> None:
    for path in (own / "messy").iterdir():
        path.unlink()
    make_clip(own / "messy" / "big.mp4", frames=33, size=(640, 512))
    (own / "messy" / "big.txt").write_text("big")
    config = own / "config.toml"
    text = config.read_text().replace('["64x64", "96x64"]', '"640x512"').replace("frames = 9", "frames = 33")
    config.write_text(text)
    vtrain("data", "show", config, "big.mp4", "--sheet", own / "few.png")
    few = Image.open(own / "few.png")
    assert few.size == (16 * (214 + 2), 4 * 16 + 8 + 171 + 18)
    vtrain("data", "show", config, "big.mp4", "--sheet", own / "all.png", "--full-size")
    whole = Image.open(own / "all.png")
    assert whole.size == (8 * 642, 4 * 16 + 8 + 5 * (512 + 18))


def test_a_file_is_found_by_its_name_as_it_was_shown_by_its_dataset_and_by_its_path(
    own: Path, monkeypatch: pytest.MonkeyPatch, kept_process
) -> None:
    config = own / "config.toml"
    monkeypatch.chdir(own / "messy")
    (own / "elsewhere").symlink_to(own / "messy")
    names = {
        "two\nlines.mp4": ("two\nlines.mp4", "two\\nlines.mp4", "messy/two\\nlines.mp4", "./two\nlines.mp4"),
        "bad\\udcff.mp4": ("bad\\udcff.mp4", "bad\udcff.mp4"),
        "long.mp4": (str(own / "messy/long.mp4"), "../messy/long.mp4", str(own / "elsewhere" / "long.mp4")),
    }
    found = look(planned(config))
    for name, ways in names.items():
        for way in ways:
            assert [file.ref.id for file in found.named(way)] == [name], way
    assert unescaped("a\\nb\\x1b\\U0001f430\\q") == "a\nb\x1b\U0001f430\\q"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lnog.mp4", '"messy/long.mp4"'),
        ("long.txt", '"messy/long.mp4"'),
        ("Mshort.mp4", '"messy/short.mp4"'),
        ("zzz", "names all files"),
    ],
)
def test_a_name_that_no_file_has_is_an_error_with_what_was_meant(world: Path, name: str, meant: str, vtrain) -> None:
    done = vtrain("data", "show", world / "config.toml", name, error=DataError)
    assert f"{name}: no dataset has such a file." in str(done.exception)
    assert meant in str(done.exception)


def test_a_name_far_from_the_meant_one_in_order_is_compared_with_it(own: Path, kept_process, monkeypatch) -> None:
    """Among 30,000 files of which 6,000 are between the two, and few of which are compared letter by letter."""
    found = look(planned(own / "config.toml"))
    (place,) = (at for _, at in found.datasets.values())
    with Ledger(own / "cache") as ledger, ledger.transaction() as db:
        names = [row[1] for row in db.execute("PRAGMA table_info(file_decision)")]
        row = dict(
            zip(names, db.execute("SELECT * FROM file_decision WHERE ref = 'short.mp4'").fetchone(), strict=True)
        )
        refs = [f"{letter}/{number:06}.mp4" for letter in "adknz" for number in range(6_000)]
        values = [
            tuple((row | {"decision": place.decision, "ref": ref}).values()) for ref in (*refs, "b/beach walk.mp4")
        ]
        db.executemany(f"INSERT INTO file_decision VALUES ({', '.join('?' * len(names))})", values)
    assert found.like("m/beach walk.mp4")[0] == "messy/b/beach walk.mp4"
    assert found.like("beech walk.mp4") == ["messy/b/beach walk.mp4"]
    compared: list[int] = []

    def close(name: str, names: Collection[str], n: int, cutoff: float) -> list[str]:
        compared.append(len(names))
        return get_close_matches(name, names, n, cutoff)

    monkeypatch.setattr(files, "get_close_matches", close)
    assert found.like("kd/004711.mp4")[0] == "messy/k/004711.mp4"
    assert 0 < sum(compared) < 10_000, "all of them take seconds"


def test_a_name_without_its_folder_is_an_error_with_the_folder(own: Path, vtrain) -> None:
    (own / "messy" / "b" / "c").mkdir(parents=True)
    (own / "messy" / "b" / "c" / "other.mp4").write_bytes((own / "messy" / "long.mp4").read_bytes())
    done = vtrain("data", "show", own / "config.toml", "c/other.mp4", error=DataError)
    assert 'Did you mean "messy/b/c/other.mp4"' in str(done.exception)


def test_a_file_that_is_left_out_has_its_reason_and_no_sheet(world: Path, vtrain) -> None:
    text = vtrain("data", "show", world / "config.toml", "short.mp4").stdout
    assert "  dropped  too short: 4 frames at 8 fps (4 at the file's 8); needs 9: set data.video.min_frames = 1" in text
    assert "contact sheet" not in text
    assert "  length   4 frames, 8 frames per second, 0.500 s\n" in text


def test_a_clip_whose_frames_are_damaged_is_an_error_and_after_filling_a_failed_file(
    own: Path, python: Any, vtrain, listed, make_clip
) -> None:
    config = own / "config.toml"
    path = own / "messy" / "two\nlines.mp4"
    data = make_clip(path, frames=40).read_bytes()
    with av.open(str(path)) as container:
        at = [packet.pos for packet in container.demux(video=0) if packet.size][7]
    path.write_bytes(data[:at] + bytes(len(data) - at))
    done = vtrain("data", "show", config, path, error=DataError)
    assert "messy/two\nlines.mp4: " in str(done.exception)
    assert "  used    as 64x64@9 at 8 fps, 1 window\n" in done.stdout
    filled = python("-m", "vtrain.cli", "cache", "fill", str(config))
    (line,) = [line for line in filled.stdout.splitlines() if line.startswith("skipped: ")]
    assert line.startswith("skipped: messy/two\\nlines.mp4: ")
    row = next(row for row in listed(config, "--failed") if row["file"] == "two\nlines.mp4")
    assert row["kind"] == "decoding"
    assert line.endswith(row["reason"])


def test_what_decoded_a_file_is_told_where_torchcodec_is_asked_for(own: Path, vtrain, shown, make_clip) -> None:
    if isinstance(found := find_torchcodec(), NotLoadable):
        pytest.skip(found.what)
    clip = make_clip(own / "messy" / "long.mp4", frames=40, size=(192, 128))
    with av.open(str(clip)) as source, av.open(str(own / "messy" / "flash.flv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    (own / "messy" / "flash.txt").write_text("the same in another container")
    config = own / "config.toml"
    config.write_text(config.read_text().replace('id = "messy"', 'id = "messy"\ndecoder = "torchcodec"'))
    text = vtrain("data", "show", config, "long.mp4").stdout
    assert f"  decoder  {found}\n" in text
    text = vtrain("data", "show", config, "flash.flv").stdout
    assert "  decoder  PyAV, since its container (flv) is neither MP4, MOV, Matroska nor WebM\n" in text
    text = vtrain("data", "show", config, "flash.flv", "--no-sheet").stdout
    assert f"  decoder  {found}, or PyAV: a contact sheet shows which\n" in text
    assert shown(config, "long.mp4")["video"][0]["decoder"] == found
    assert re.search(rf"decoder +{found}; PyAV for files", vtrain("plan", config).stdout)


def test_captions_are_shown_whole_on_one_line_each(own: Path, vtrain) -> None:
    text = vtrain("data", "show", own / "config.toml", "--no-sheet", "--", "-dash.mp4").stdout
    for row in ("caption 1  [red]a fox\\x1b[31m", "caption 2  another [/red]", "caption 3  third"):
        assert f"  {row}\n  tokens     " in text


def test_a_sheet_that_cannot_be_written_is_an_error_with_its_place(own: Path, vtrain) -> None:
    (own / "file").touch()
    done = vtrain("data", "show", own / "config.toml", "long.mp4", "--sheet", own / "file" / "s.png", error=DataError)
    assert f"{own / 'file' / 's.png'}: the contact sheet cannot be written" in str(done.exception)


def test_an_error_is_exit_code_2_without_a_traceback(world: Path, python: Callable[..., Any]) -> None:
    done = python("-m", "vtrain.cli", "data", "show", str(world / "config.toml"), "lnog.mp4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error:\n  lnog.mp4: no dataset has such a file.\n")
