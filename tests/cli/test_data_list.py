"""`vtrain data list`, on a folder as people have them."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from rich.console import Console

from vtrain.cli.terminal import Terminal
from vtrain.contract import ConfigError, DataError, Filled
from vtrain.data.scanning.files import look
from vtrain.data.scanning.ledger import Ledger
from vtrain.run.prepare import planned

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
    "notes.md": ("dropped", "not a video"),
    "picture.png": ("dropped", "image"),
    "short.mp4": ("dropped", "too short"),
    "slow.mp4": ("dropped", "too slow"),
    "small.mp4": ("dropped", "too small"),
    "sound.mp4": ("failed", "bad file"),
    "two\nlines.mp4": ("used", ""),
}


def test_every_file_is_listed_with_its_fate(world: Path, listed) -> None:
    rows = listed(world / "config.toml")
    assert {row["file"]: (row["status"], row["kind"]) for row in rows} == FATES
    assert [row["file"] for row in rows] == sorted(FATES)
    assert all((row["reason"] == "") == (row["status"] == "used") for row in rows)
    row = next(row for row in rows if row["file"] == "long.mp4")
    assert (row["bucket"], row["samples"], row["windows"]) == ("96x64@9", 1, 1)
    assert row["source"] == {
        "codec": "h264", "width": 192, "height": 128, "pixel_aspect": 1.0, "turned": "", "frames": 40, "fps": 8.0,
        "variable": False, "seconds": 5.0,
    }  # fmt: skip
    assert row["captions"] == [{"text": "the caption of 'long'"}]
    gone = next(row for row in rows if row["file"] == "gone.mp4")
    assert gone["reason"] == "cannot be opened: No such file or directory"


def test_a_file_is_one_line_in_a_pipe_and_what_files_say_moves_no_cursor(world: Path, vtrain) -> None:
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


def test_a_variable_rate_is_the_same_number_in_the_row_and_in_the_reason(own: Path, vtrain) -> None:
    """10 frames at 10 a second, then 10 at 4 a second."""
    with av.open(str(own / "messy" / "wild.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base, stream.options = Fraction(1, 1000), {"bf": "0"}
        for k in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * k, dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = 100 * min(k, 10) + 250 * max(0, k - 10), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    text = vtrain("data", "list", own / "config.toml").stdout
    average = 19 / (1 + 9 * 0.25)
    assert re.search(rf"^dropped .* 20  ~{average:.4g}  wild\.mp4", text, flags=re.MULTILINE)
    assert f"{average:.6g} frames per second in the file on average, fewer than" in text
    assert "on average" not in text.replace("in the file on average", "", 1).split("wild.mp4")[0]


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
def test_files_are_chosen_by_fate_and_number(
    world: Path, options: list[str], statuses: set[str], count: int, listed
) -> None:
    rows = listed(world / "config.toml", *options)
    assert ({row["status"] for row in rows}, len(rows)) == (statuses, count)


def test_it_is_said_where_a_limit_cut_the_list(world: Path, vtrain) -> None:
    assert "\n3 of 12 are listed: --limit\n" in vtrain(
        "data", "list", world / "config.toml", "--dropped", "--failed", "--limit", "3"
    ).stdout  # fmt: skip


def test_only_the_reasons_of_what_is_listed_are_told_below_it(world: Path, vtrain) -> None:
    def told(*options: str) -> str:
        return vtrain("data", "list", world / "config.toml", *options).stdout.split("\n\n")[1]

    assert "bad file (failed)" in told("--failed")
    assert "too short" not in told("--failed")
    assert "too short" in told("--dropped")
    assert "bad file" not in told("--dropped")
    assert told("--used") == "messy: 17 files: 5 used, 8 dropped, 4 failed\n"


def test_captions_without_a_clip_are_told_below_the_reasons(own: Path, vtrain) -> None:
    assert "without a clip" not in vtrain("data", "list", own / "config.toml").stdout
    (own / "messy" / "nope.txt").write_text("words")
    assert vtrain("data", "list", own / "config.toml", "--failed").stdout.endswith(
        "\n1 caption without a clip (such as nope.txt)\n"
    )


def test_the_kind_of_what_is_no_video_is_the_documented_one_and_its_reason_has_the_suffix(world: Path, listed) -> None:
    (row,) = (row for row in listed(world / "config.toml", "--dropped") if row["file"] == "notes.md")
    assert (row["kind"], row["reason"]) == ("not a video", "not a video: .md")


def test_what_changed_since_the_last_scan_is_listed_as_it_is_now(own: Path, listed) -> None:
    (own / "messy" / "a clip.txt").write_text("new words")
    (own / "messy" / "notes.md").unlink()
    rows = {row["file"]: row for row in listed(own / "config.toml")}
    assert rows["a clip.mp4"]["captions"] == [{"text": "new words"}]
    assert "notes.md" not in rows


def test_several_datasets_are_told_apart_and_one_that_is_not_there_does_not_hide_the_other(
    own: Path, vtrain, listed, shown, more_data
) -> None:
    config = own / "config.toml"
    two = more_data("less", "messy", 'captions = "filename"')
    config.write_text(config.read_text() + two + more_data("away", "nowhere"))
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


def test_rows_are_read_from_the_ledger_as_they_are_asked_for(own: Path, kept_process) -> None:
    found = look(planned(own / "config.toml"))
    (place,) = (at for _, at in found.datasets.values())
    with Ledger(own / "cache") as ledger, ledger.transaction() as db:
        (width,) = db.execute("SELECT count(*) FROM pragma_table_info('file_decision')").fetchone()
        names = [row[1] for row in db.execute("PRAGMA table_info(file_decision)")]
        row = dict(
            zip(names, db.execute("SELECT * FROM file_decision WHERE ref = 'short.mp4'").fetchone(), strict=True)
        )
        for number in range(20_000):
            values = tuple((row | {"decision": place.decision, "ref": f"x/{number:06}.mp4"}).values())
            db.execute(f"INSERT INTO file_decision VALUES ({', '.join('?' * width)})", values)
    tracemalloc.start()
    count = sum(1 for _ in found.rows("messy"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 + len(FATES)
    assert peak < 3_000_000, "as much as two pages of rows at most"


def test_many_files_that_fail_in_filling_are_counted_by_reason() -> None:
    out = io.StringIO()
    reasons = {f"clips/{number:03}.mp4": "[b]torn[/b]" if number % 3 else "is\x1b[2J gone" for number in range(90)}
    Terminal(Console(file=out, width=400)).show(Filled(0, reasons, 0))
    lines = out.getvalue().splitlines()
    assert lines[0] == "skipped: clips/000.mp4: is\\x1b[2J gone"
    assert lines[20:] == [
        "skipped: 70 more; `vtrain data list CONFIG --failed` names them. Reasons of all:", "  60  [b]torn[/b]",
        "  30  is\\x1b[2J gone",
    ]  # fmt: skip
