"""The ledger's file: damaged, foreign, and where none can be."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
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


def test_several_runs_may_begin_in_one_new_folder(tmp_path: Path) -> None:
    for number in range(20):
        folder, ready = tmp_path / str(number), threading.Barrier(4)

        def begin(folder: Path = folder, ready: threading.Barrier = ready) -> None:
            ready.wait()
            with Ledger(folder) as ledger:
                assert ledger.rows("SELECT count(*) FROM place", {}) == [(0,)]

        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(begin) for _ in range(4)]:
                future.result()
        assert [path.name for path in folder.glob("*damaged*")] == []
