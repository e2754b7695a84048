"""The ledger's file: damaged, foreign, and where none can be."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vtrain.contract import DataError
from vtrain.data.scanning.ledger import FILE, Ledger
from vtrain.data.scanning.scan import scan


@pytest.fixture
def scanned(setup, make_video):
    for k in range(30):
        setup.add(f"{k:02}.mp4", make_video(frames=18, fps=16), f"caption {k} " * 20)
    scan(setup.plan())
    return setup


def rebuilt(setup) -> str:
    """Scan again; the ledger must be whole, and all files looked at anew. Returns the message."""
    dataset = setup.dataset()
    found = scan(setup.plan(dataset))
    assert len(found.samples) == 30
    assert len(dataset.backend.opened) == 60
    (message,) = found.messages
    with Ledger(setup.cache) as ledger:
        assert ledger.message is None
    return message


def test_a_file_of_garbage_is_named_moved_aside_and_made_anew(scanned) -> None:
    path = scanned.cache / FILE
    path.write_bytes(b"this is no database" * 100)
    message = rebuilt(scanned)
    assert str(path) in message
    assert (scanned.cache / f"{FILE}.damaged-1").read_bytes().startswith(b"this is no database")


def test_a_second_damage_keeps_the_first_file(scanned) -> None:
    for n in (1, 2):
        (scanned.cache / FILE).write_bytes(b"garbage %d" % n * 100)
        rebuilt(scanned)
    assert (scanned.cache / f"{FILE}.damaged-1").read_bytes().startswith(b"garbage 1")
    assert (scanned.cache / f"{FILE}.damaged-2").read_bytes().startswith(b"garbage 2")


def test_overwritten_pages_are_found(scanned) -> None:
    path = scanned.cache / FILE
    data = bytearray(path.read_bytes())
    assert len(data) > 3 * 4096
    data[4096:-4096] = b"\xa5" * (len(data) - 8192)
    path.write_bytes(data)
    assert "damaged-1" in rebuilt(scanned)


def test_a_cut_file_is_found(scanned) -> None:
    path = scanned.cache / FILE
    path.write_bytes(path.read_bytes()[: -3 * 4096])
    assert "damaged-1" in rebuilt(scanned)


def test_someone_elses_database_is_moved_aside_untouched(scanned) -> None:
    path = scanned.cache / FILE
    path.unlink()
    with sqlite3.connect(path) as theirs:
        theirs.execute("CREATE TABLE source (mine TEXT)")
        theirs.execute("INSERT INTO source VALUES ('precious')")
    theirs.close()
    rebuilt(scanned)
    moved = sqlite3.connect(scanned.cache / f"{FILE}.damaged-1")
    assert moved.execute("SELECT mine FROM source").fetchall() == [("precious",)]
    moved.close()


def test_a_cache_folder_that_cannot_be_is_an_error_that_names_it(setup, make_video) -> None:
    setup.add("a.mp4", make_video())
    setup.cache.write_text("a file is in the way")
    with pytest.raises(DataError, match="the cache folder cannot be written") as caught:
        scan(setup.plan())
    assert caught.value.problems[0].where == str(setup.cache)
    assert "cache.dir" in caught.value.problems[0].remedy


def test_a_ledger_that_cannot_be_opened_is_an_error_and_is_left_alone(setup, make_video) -> None:
    setup.add("a.mp4", make_video())
    (setup.cache / FILE).mkdir(parents=True)
    with pytest.raises(DataError, match="cannot be read or written"):
        scan(setup.plan())
    assert (setup.cache / FILE).is_dir()


BEGIN = """
import sys, time
from pathlib import Path
from vtrain.data.scanning.database import FileHashes, HASHES
from vtrain.data.scanning.ledger import Ledger

folders = [Path(each) for each in sys.argv[1:]]
print("ready", flush=True)
start = float(sys.stdin.readline())
for number, folder in enumerate(folders):
    time.sleep(max(0, start + 0.02 * number - time.time()))
    with Ledger(folder) as ledger:
        assert ledger.rows("SELECT count(*) FROM place", {}) == [(0,)]
        if ledger.message:
            print(ledger.message, flush=True)
    assert len(FileHashes(folder / HASHES)(Path(__file__ if "__file__" in globals() else sys.executable))) == 64
"""


def test_eight_processes_begin_in_new_folders_at_once(tmp_path: Path) -> None:
    """In every second folder lies a ledger that is none: one of them moves it aside, once."""
    folders = [tmp_path / f"{number:02}" for number in range(20)]
    for folder in folders[::2]:
        folder.mkdir()
        (folder / FILE).write_bytes(b"not a database, " * 500)
    command = [sys.executable, "-c", BEGIN, *map(str, folders)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(8)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    start = time.time() + 0.2
    done = []
    for process in processes:
        process.stdin.write(f"{start}\n")
        process.stdin.flush()
    for process in processes:
        done.append(process.communicate(timeout=100))
    assert [error for _, error in done if error] == []
    for number, folder in enumerate(folders):
        aside = [path.name for path in folder.glob(f"{FILE}.damaged-?")]
        assert aside == ([f"{FILE}.damaged-1"] if number % 2 == 0 else []), folder
    told = [line for out, _ in done for line in out.splitlines() if "moved to" in line]
    assert len(told) == 10
