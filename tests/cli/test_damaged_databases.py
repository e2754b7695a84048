"""SQLite files of the cache folder that are damaged: told, made again, counted and deleted."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

GARBAGE = b"garbage" * 500


@pytest.mark.parametrize("name", ["hashes.sqlite", "ledger.sqlite"])
def test_a_damaged_database_is_told_counted_as_a_leftover_and_pruned(own: Path, vtrain, name: str) -> None:
    config, cache = own / "config.toml", own / "cache"
    cache.mkdir(exist_ok=True)
    (cache / name).write_bytes(GARBAGE)
    message = f"{name} was damaged or not ours (file is not a database): moved to"
    done = vtrain("cache", "status", config, "--json")
    assert done.stderr.count(message) == 1
    found = json.loads(done.stdout)
    assert found["sqlite"]["leftovers"] == {"count": 1, "bytes": len(GARBAGE)}
    again = vtrain("cache", "status", config)
    assert message not in again.stderr
    assert [line.split()[0] for line in again.stdout.splitlines()].count("sqlite") == 1
    with closing(sqlite3.connect(cache / "ledger.sqlite")) as ledger, ledger:  # as if every file had been read
        ledger.execute("UPDATE source SET sha256 = lower(hex(zeroblob(32)))")
    assert "1 leftovers of damage" in vtrain("cache", "prune", config, "--yes").stdout
    assert not list(cache.glob("*.damaged-*"))
    assert json.loads(vtrain("cache", "status", config, "--json").stdout)["sqlite"]["leftovers"]["count"] == 0


def test_a_damaged_database_is_told_where_files_are_listed(own: Path, vtrain) -> None:
    (own / "cache").mkdir(exist_ok=True)
    (own / "cache" / "hashes.sqlite").write_bytes(GARBAGE)
    done = vtrain("data", "list", own / "config.toml", "--failed")
    assert "hashes.sqlite was damaged or not ours" in done.stderr
