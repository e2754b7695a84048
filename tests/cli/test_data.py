"""`vtrain data`, on a folder as people have them."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from vtrain.cli import data_show
from vtrain.cli.app import app
from vtrain.cli.filling import tell_left_out
from vtrain.cli.prepare import planned
from vtrain.contract import ConfigError, DataError
from vtrain.data.caching.stores import Stores
from vtrain.data.decoding.decode import decode
from vtrain.data.decoding.worker import Workers
from vtrain.data.scanning import scan as scanning
from vtrain.data.scanning.files import look, unescaped
from vtrain.data.scanning.ledger import Ledger

CONFIG = """
[run]
output_dir = "out"

[model]
use = "toy"
train = "full"

[precision]
mixed = "no"

[cache]
dir = "cache"

[train]
steps = 1

[optimizer]
use = "adamw"
lr = 1e-3
"""
DATA = '\n[[data]]\nuse = "folder"\nid = "{name}"\npath = "{path}"\nresolution = ["64x64", "96x64"]\n{more}\n'
VIDEO = "[data.video]\nframes = 9\nfps = 8\n"

FATES = {
    "-dash.mp4": ("used", ""),
    "\U0001f430 hop.mp4": ("used", ""),
    "a clip.mp4": ("used", ""),
    "bad\\udcff.mp4": ("dropped", "bad name"),
    "cut.mp4": ("failed", "bad file"),
    "empty.mp4": ("failed", "bad file"),
    "gone.mp4": ("failed", "bad file"),
    "latin.mp4": ("dropped", "bad caption"),
    "long.mp4": ("used", ""),
    "no words.mp4": ("dropped", "no caption"),
    "notes.md": ("dropped", "not a video: .md"),
    "picture.png": ("dropped", "image"),
    "short.mp4": ("dropped", "too short"),
    "slow.mp4": ("dropped", "too slow"),
    "small.mp4": ("dropped", "too small"),
    "sound.mp4": ("failed", "bad file"),
    "two\nlines.mp4": ("used", ""),
}


def clip(path: Path, frames: int = 9, size: tuple[int, int] = (64, 64), fps: int = 8, seed: int = 1) -> Path:
    """A moving gradient, its index in front of its pictures."""
    grid = np.indices(size[::-1]).sum(0)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            ramp = (grid * (seed + 1) + number * 8) % 256
            picture = np.stack([ramp, 255 - ramp, np.full_like(ramp, seed * 30)], -1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def sound(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def fill_messy(folder: Path) -> None:
    for number, name in enumerate(("a clip", "-dash", "\U0001f430 hop", "two\nlines")):
        clip(folder / f"{name}.mp4", seed=number)
    clip(folder / "long.mp4", frames=40, size=(192, 128))
    clip(folder / "short.mp4", frames=4)
    clip(folder / "slow.mp4", frames=12, fps=5)
    clip(folder / "small.mp4", size=(48, 48))
    whole = clip(folder / "no words.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[:400])
    (folder / "latin.mp4").write_bytes(whole + bytes(1))
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.mp4")).write_bytes(whole)
    (folder / "empty.mp4").touch()
    sound(folder / "sound.mp4")
    for path in sorted(folder.glob("*.mp4")):
        if path.name not in ("no words.mp4", "bad\udcff.mp4"):
            path.with_suffix(".txt").write_text(f"the caption of {path.stem!r}", encoding="utf-8")
    (folder / "-dash.txt").write_text("[red]a fox\x1b[31m\nanother [/red]\nthird", encoding="utf-8")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "notes.md").write_text("# notes")
    Image.new("RGB", (64, 64)).save(folder / "picture.png")
    (folder / "gone.mp4").symlink_to("nowhere.mp4")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A messy folder, and its file. Tests that change it take a copy."""
    path = tmp_path_factory.mktemp("world")
    (path / "messy").mkdir()
    fill_messy(path / "messy")
    (path / "config.toml").write_text(CONFIG + DATA.format(name="messy", path="messy", more="") + VIDEO)
    return path


@pytest.fixture
def own(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world, tmp_path / "own", symlinks=True)
    return tmp_path / "own"


@pytest.fixture(scope="module")
def process() -> Iterator[Workers]:
    with Workers(1, limit_s=60) as workers:
        yield workers


@pytest.fixture(autouse=True)
def _kept_process(monkeypatch: pytest.MonkeyPatch, process: Workers) -> None:
    """Each would import torch anew."""
    for module in (scanning, data_show):
        monkeypatch.setattr(module, "Workers", lambda count, limit_s: nullcontext(process))


def vtrain(*arguments: str | Path, error: type[Exception] | None = None) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if error is None:
        assert done.exception is None, done.output
    else:
        assert isinstance(done.exception, error), done.output
    return done


def listed(*arguments: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in vtrain("data", "list", *arguments, "--json").stdout.split("\n") if line]


def shown(*arguments: str | Path) -> dict[str, Any]:
    return json.loads(vtrain("data", "show", *arguments, "--json").stdout)


def test_every_file_is_listed_with_its_fate(world: Path) -> None:
    rows = listed(world / "config.toml")
    assert {row["file"]: (row["status"], row["kind"]) for row in rows} == FATES
    assert [row["file"] for row in rows] == sorted(FATES)
    assert all((row["reason"] == "") == (row["status"] == "used") for row in rows)
    row = next(row for row in rows if row["file"] == "long.mp4")
    assert (row["bucket"], row["samples"], row["windows"]) == ("96x64@9", 1, 1)
    assert row["source"] == {
        "codec": "h264", "width": 192, "height": 128, "pixel_aspect": 1.0, "turned": "", "frames": 40, "fps": 8.0,
        "seconds": 5.0,
    }  # fmt: skip
    assert row["captions"] == [{"text": "the caption of 'long'"}]
    gone = next(row for row in rows if row["file"] == "gone.mp4")
    assert gone["reason"] == "cannot be opened: No such file or directory"


def test_a_file_is_one_line_in_a_pipe_and_what_files_say_moves_no_cursor(world: Path) -> None:
    text = vtrain("data", "list", world / "config.toml").stdout
    table, counts = text.split("\n\n")
    lines = table.split("\n")
    assert len(lines) == 1 + len(FATES)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert re.fullmatch(r'used +64x64@9 +1 +64x64 +9 +8  two\\nlines\.mp4 +"the caption of \'two\\nlines\'"', lines[-2])
    assert any("-dash.mp4 " in line and line.endswith('"[red]a fox\\x1b[31m" and 2 more') for line in lines)
    assert counts.startswith("messy: 17 files: 5 used, 8 dropped, 4 failed\n")
    assert re.search(r"^1 +bad file \(failed\) +cut\.mp4: ", counts, flags=re.MULTILINE)
    assert re.search(r"^1 +too short +short\.mp4: 4 frames at 8 fps .*min_frames = 1$", counts, flags=re.MULTILINE)
    of_reasons = re.findall(r"^(\d+) +\w", counts, flags=re.MULTILINE)
    assert sum(map(int, of_reasons)) == 12


@pytest.mark.parametrize(
    ("options", "statuses", "count"),
    [
        (["--used"], {"used"}, 5),
        (["--dropped"], {"dropped"}, 8),
        (["--failed"], {"failed"}, 4),
        (["--dropped", "--failed"], {"dropped", "failed"}, 12),
        (["--dropped", "--limit", "3"], {"dropped"}, 3),
        (["--limit", "0"], set(), 0),
    ],
)
def test_files_are_chosen_by_fate_and_number(world: Path, options: list[str], statuses: set[str], count: int) -> None:
    rows = listed(world / "config.toml", *options)
    assert ({row["status"] for row in rows}, len(rows)) == (statuses, count)


def test_it_is_said_where_a_limit_cut_the_list(world: Path) -> None:
    assert "\n3 of 12 are listed: --limit\n" in vtrain(
        "data", "list", world / "config.toml", "--dropped", "--failed", "--limit", "3"
    ).stdout  # fmt: skip


def test_what_changed_since_the_last_scan_is_listed_as_it_is_now(own: Path) -> None:
    (own / "messy" / "a clip.txt").write_text("new words")
    (own / "messy" / "notes.md").unlink()
    rows = {row["file"]: row for row in listed(own / "config.toml")}
    assert rows["a clip.mp4"]["captions"] == [{"text": "new words"}]
    assert "notes.md" not in rows


def test_several_datasets_are_told_apart_and_one_that_is_not_there_does_not_hide_the_other(own: Path) -> None:
    config = own / "config.toml"
    two = DATA.format(name="less", path="messy", more='captions = "filename"') + VIDEO
    config.write_text(config.read_text() + two + DATA.format(name="away", path="nowhere", more="") + VIDEO)
    done = vtrain("data", "list", config, error=DataError)
    assert "  messy/long.mp4  " in done.stdout
    assert "  less/no words.mp4  " in done.stdout
    assert "nowhere: the dataset folder does not exist." in str(done.exception)
    assert {row["dataset"] for row in listed(config, "--dataset", "less")} == {"less"}
    done = vtrain("data", "list", config, "--dataset", "lest", error=ConfigError)
    assert 'Did you mean "less"?' in str(done.exception)
    found = shown(config, "less/no words.mp4", "--no-sheet")["file"]
    assert (found["dataset"], found["captions"]) == ("less", [{"text": "no words"}])
    done = vtrain("data", "show", config, "long.mp4", error=DataError)
    assert "Give one of: messy/long.mp4, less/long.mp4." in str(done.exception)


def test_a_terminal_of_80_columns_wraps_nothing_but_names(own: Path) -> None:
    lines = on_terminal("data", "list", own / "config.toml")
    assert max(map(len, lines)) <= 80
    at = next(number for number, line in enumerate(lines) if line.startswith("dropped") and "short.mp4" in line)
    assert lines[at + 1].startswith("    4 frames at 8 fps")
    assert any(line.startswith("messy: 17 files") for line in lines)


def on_terminal(*arguments: str | Path) -> list[str]:
    """What a command leaves on a terminal of 80 columns, colours and the moving sign of progress removed."""
    parent, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vtrain.cli", *map(str, arguments)]
    with subprocess.Popen(command, stdout=child, stderr=subprocess.PIPE, env=environment) as process:
        os.close(child)
        text = b""
        while chunk := _read(parent):
            text += chunk
        assert process.wait(60) == 0
    os.close(parent)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.decode()).replace("\r", "").splitlines()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux: the other end is closed
        return b""


def test_a_reader_that_goes_away_and_an_encoding_that_lacks_letters_are_no_errors(own: Path, python: Any) -> None:
    done = python("-m", "vtrain.cli", "data", "list", str(own / "config.toml"), env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\U0001f430 hop.mp4" in done.stdout
    piped = f'"{sys.executable}" -m vtrain.cli data list "{own / "config.toml"}" | head -n 1'
    done = subprocess.run(["sh", "-c", piped], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout[:6], done.stderr) == ("status", "")


def test_rows_are_read_from_the_ledger_as_they_are_asked_for(own: Path) -> None:
    found = look(planned(own / "config.toml"))
    (place,) = (at for _, at in found.datasets.values())
    with Ledger(own / "cache") as ledger, ledger.transaction() as db:
        (width,) = db.execute("SELECT count(*) FROM pragma_table_info('fate')").fetchone()
        names = [row[1] for row in db.execute("PRAGMA table_info(fate)")]
        row = dict(zip(names, db.execute("SELECT * FROM fate WHERE ref = 'short.mp4'").fetchone(), strict=True))
        for number in range(20_000):
            values = tuple((row | {"decision": place.decision, "ref": f"x/{number:06}.mp4"}).values())
            db.execute(f"INSERT INTO fate VALUES ({', '.join('?' * width)})", values)
    tracemalloc.start()
    count = sum(1 for _ in found.rows("messy"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 + len(FATES)
    assert peak < 3_000_000, "as much as two pages of rows at most"


def test_a_file_is_shown_with_its_windows_its_part_of_the_picture_and_its_entries(own: Path) -> None:
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


def test_the_contact_sheet_shows_every_pixel_that_is_cached(own: Path) -> None:
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


def test_large_and_long_clips_are_reduced_and_that_is_said_unless_all_is_asked_for(own: Path) -> None:
    for path in (own / "messy").iterdir():
        path.unlink()
    clip(own / "messy" / "big.mp4", frames=33, size=(640, 512))
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
    own: Path, monkeypatch: pytest.MonkeyPatch
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
    ("name", "meant"), [("lnog.mp4", '"messy/long.mp4"'), ("long.txt", '"messy/long.mp4"'), ("zzz", "names all files")]
)
def test_a_name_that_no_file_has_is_an_error_with_what_was_meant(world: Path, name: str, meant: str) -> None:
    done = vtrain("data", "show", world / "config.toml", name, error=DataError)
    assert f"{name}: no dataset has such a file." in str(done.exception)
    assert meant in str(done.exception)


def test_a_name_without_its_folder_is_an_error_with_the_folder(own: Path) -> None:
    (own / "messy" / "b" / "c").mkdir(parents=True)
    (own / "messy" / "b" / "c" / "other.mp4").write_bytes((own / "messy" / "long.mp4").read_bytes())
    done = vtrain("data", "show", own / "config.toml", "c/other.mp4", error=DataError)
    assert 'Did you mean "messy/b/c/other.mp4"' in str(done.exception)


def test_a_file_that_is_left_out_has_its_reason_and_no_sheet(world: Path) -> None:
    text = vtrain("data", "show", world / "config.toml", "short.mp4").stdout
    assert "  dropped  too short: 4 frames at 8 fps (4 at the file's 8); needs 9: set data.video.min_frames = 1" in text
    assert "contact sheet" not in text
    assert "  length   4 frames, 8 frames per second, 0.500 s\n" in text


def test_a_clip_whose_frames_are_damaged_is_an_error_and_after_filling_a_failed_file(own: Path, python: Any) -> None:
    config = own / "config.toml"
    path = own / "messy" / "two\nlines.mp4"
    data = clip(path, frames=40).read_bytes()
    with av.open(str(path)) as container:
        at = [packet.pos for packet in container.demux(video=0) if packet.size][7]
    path.write_bytes(data[:at] + bytes(len(data) - at))
    done = vtrain("data", "show", config, path, error=DataError)
    assert "messy/two\nlines.mp4: " in str(done.exception)
    assert "  used    as 64x64@9 at 8 fps, 1 window\n" in done.stdout
    filled = python("-m", "vtrain.cli", "cache", "fill", str(config))
    (line,) = [line for line in filled.stdout.splitlines() if line.startswith("left out: ")]
    assert line.startswith("left out: messy/two\\nlines.mp4: ")
    row = next(row for row in listed(config, "--failed") if row["file"] == "two\nlines.mp4")
    assert row["kind"] == "decoding"
    assert line.endswith(row["reason"])


def test_many_files_that_fail_in_filling_are_counted_by_reason() -> None:
    out = io.StringIO()
    reasons = {f"clips/{number:03}.mp4": "[b]torn[/b]" if number % 3 else "is\x1b[2J gone" for number in range(90)}
    tell_left_out(reasons, Console(file=out, width=400))
    lines = out.getvalue().splitlines()
    assert lines[0] == "left out: clips/000.mp4: is\\x1b[2J gone"
    assert lines[20:] == [
        "left out: 70 more; `vtrain data list CONFIG --failed` names them. Of all:", "  60  [b]torn[/b]",
        "  30  is\\x1b[2J gone",
    ]  # fmt: skip


def test_captions_are_shown_whole_on_one_line_each(own: Path) -> None:
    text = vtrain("data", "show", own / "config.toml", "--no-sheet", "--", "-dash.mp4").stdout
    assert "  caption 1  [red]a fox\\x1b[31m\n  caption 2  another [/red]\n  caption 3  third\n" in text


def test_a_sheet_that_cannot_be_written_is_an_error_with_its_place(own: Path) -> None:
    (own / "file").touch()
    done = vtrain("data", "show", own / "config.toml", "long.mp4", "--sheet", own / "file" / "s.png", error=DataError)
    assert f"{own / 'file' / 's.png'}: the contact sheet cannot be written" in str(done.exception)


def test_an_error_is_exit_code_2_without_a_traceback(world: Path, python: Callable[..., Any]) -> None:
    done = python("-m", "vtrain.cli", "data", "show", str(world / "config.toml"), "lnog.mp4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error:\n  lnog.mp4: no dataset has such a file.\n")
