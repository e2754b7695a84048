"""`vtrain cache`, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def own(folder, tmp_path: Path, toy_clips: Path):
    """A folder with clips and a cache of its own."""
    (folder.path / "clips").unlink()
    shutil.copytree(toy_clips / "clips", folder.path / "clips")
    return type(folder)(folder.path, folder.path / "cache")


def status(within: Run, config: Path) -> dict:
    return json.loads(within("cache", "status", config, "--json").stdout)


def entries(cache: Path, kind: str = "") -> list[Path]:
    return sorted((cache / kind).rglob("*.safetensors"))


def test_fill_makes_what_a_run_needs_and_the_run_then_encodes_nothing(own, within: Run) -> None:
    config = own.write(steps=1, save=1)
    filled = within("cache", "fill", config).stdout
    assert "text: 0 of 6 cached, 6 to do" in filled
    assert "captions/s" in filled
    assert "video: 5 of 5 cached" in filled
    assert "clips/s" in filled
    before = {path: path.stat().st_mtime_ns for path in entries(own.cache)}
    run = within("run", config).stdout
    assert "text: 6 of 6 cached\nvideo: 5 of 5 cached\n" in run
    assert {path: path.stat().st_mtime_ns for path in entries(own.cache)} == before
    assert not own.output.joinpath("samples").exists()


@pytest.mark.long
def test_processes_share_the_filling_and_all_wait_for_all(own, vtrain: Run, within: Run) -> None:
    config = own.write(steps=2, save=2, batch_size=1)
    done = vtrain("cache", "fill", config, processes=2)
    assert "(the first process's share of 2)" in done.stdout
    assert "of 5 cached" not in done.stdout, "one process did it all"
    found = status(within, config)
    assert (found["text"]["missing"], found["video"]["missing"]) == (0, 0)
    shared = {path.name: path.read_bytes() for path in entries(own.cache)}
    shutil.rmtree(own.cache)
    within("cache", "fill", config)
    assert {path.name: path.read_bytes() for path in entries(own.cache)} == shared


@pytest.mark.long
def test_an_error_in_filling_is_told_once_by_two_processes(own, vtrain: Run, spoil_end: Callable[[Path], None]) -> None:
    spoil_end(own.path / "clips" / "clip_1.mp4")
    config = own.write(steps=2, save=2, batch_size=1)
    config.write_text(config.read_text().replace('path = "clips"\n', 'path = "clips"\non_bad_file = "stop"\n'))
    failed = vtrain("run", config, processes=2, check=None)
    assert failed.returncode != 0
    assert failed.stderr.count("clip_1.mp4: ") == 1, failed.stderr


def test_status_counts_what_is_there_missing_damaged_and_not_used(own, within: Run) -> None:
    config = own.write()
    before = status(within, config)
    assert before["video"] == {
        "kind": "video", "wanted": 5, "missing": 5, "present": {"count": 0, "bytes": 0},
        "damaged": {"count": 0, "bytes": 0}, "stale": {"count": 0, "bytes": 0},
        "leftovers": {"count": 0, "bytes": 0}, "foreign": {"count": 0, "bytes": 0},
    }  # fmt: skip
    within("cache", "fill", config)
    (own.path / "clips" / "clip_0.txt").write_text("new words")
    torn = entries(own.cache, "video")[0]
    torn.write_bytes(torn.read_bytes()[:-1])
    old = torn.with_name("x.part")
    old.write_bytes(b"1234")
    os.utime(old, (0, 0))
    torn.with_name("notes.txt").write_text("mine")
    after = status(within, config)
    assert (after["text"]["missing"], after["text"]["stale"]["count"]) == (1, 1)
    video = after["video"]
    assert (video["wanted"], video["present"]["count"], video["missing"]) == (5, 4, 0)
    assert video["damaged"] == {"count": 1, "bytes": torn.stat().st_size}
    assert (video["leftovers"], video["foreign"]) == ({"count": 1, "bytes": 4}, {"count": 1, "bytes": 4})
    assert video["present"]["bytes"] == sum(p.stat().st_size for p in entries(own.cache, "video") if p != torn)
    table = within("cache", "status", config).stdout
    assert "stale: not used by this configuration" in table
    assert "`vtrain cache fill` or the next run" in table


def test_prune_deletes_what_no_given_configuration_uses_and_only_when_told_to(own, within: Run) -> None:
    config = own.write()
    within("cache", "fill", config)
    other = own.path / "other.toml"
    other.write_text(config.read_text().replace('path = "clips"\n', 'path = "clips"\nresolution = "32x32"\n'))
    within("cache", "fill", other)
    ours, all_entries = 5, entries(own.cache)
    assert len(entries(own.cache, "video")) == 2 * ours

    dry = within("cache", "prune", config).stdout
    assert "5 unused entries (" in dry
    assert "nothing was deleted; --yes deletes them. Configurations that share the folder must be given too." in dry
    assert "no entry is unused" in within("cache", "prune", config, other, "--yes").stdout
    assert entries(own.cache) == all_entries

    assert "deleted 5 files" in within("cache", "prune", config, "--yes").stdout
    assert status(within, config)["video"]["present"]["count"] == ours
    assert status(within, other)["video"]["missing"] == ours
    assert len(entries(own.cache)) == len(all_entries) - 5


def test_prune_refuses_where_it_cannot_tell_what_is_used(own, within: Run) -> None:
    config = own.write()
    within("cache", "fill", config)
    for file in own.cache.glob("ledger.sqlite*"):
        file.unlink()
    before = entries(own.cache)
    refused = within("cache", "prune", config, "--yes", check=2)
    assert "5 clips were not read yet" in refused.stderr
    assert "Run `vtrain cache fill` first." in refused.stderr
    assert entries(own.cache) == before
    within("cache", "fill", config)
    assert "no entry is unused" in within("cache", "prune", config, "--yes").stdout


def test_prune_refuses_configurations_with_other_caches(own, within: Run) -> None:
    config = own.write()
    other = own.path / "other.toml"
    other.write_text(config.read_text().replace(own.cache.as_posix(), (own.path / "elsewhere").as_posix()))
    assert "they have caches of their own" in within("cache", "prune", config, other, check=2).stderr


def test_verify_finds_a_flipped_bit_moves_the_entry_aside_and_fill_makes_it_anew(own, within: Run) -> None:
    config = own.write()
    within("cache", "fill", config)
    assert "6 text, 5 video entries read, 11 sound, 0 damaged" in within("cache", "verify", config).stdout
    path = entries(own.cache, "video")[2]
    sound = path.read_bytes()
    path.write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])
    told = json.loads(within("cache", "verify", config, "--json", check=2).stdout)
    assert told["read"] == {"text": 6, "video": 5, "features": 0, "mask": 0, "condition": 0}
    aside = path.with_suffix(".damaged")
    assert told["damaged"] == [{"path": str(path), "reason": "its checksum does not hold", "moved_to": str(aside)}]
    assert aside.exists()
    assert not path.exists()
    within("cache", "fill", config)
    assert path.read_bytes() == sound
    assert "1 leftovers" in within("cache", "prune", config, "--yes").stdout
    assert not aside.exists()


def test_ctrl_c_while_filling_says_what_is_kept_and_the_next_one_goes_on(own, start, within: Run) -> None:
    clips = own.path / "clips"
    for number in range(60):
        shutil.copy(clips / "clip_0.mp4", clips / f"more_{number}.mp4")
        (clips / f"more_{number}.mp4").write_bytes((clips / "clip_0.mp4").read_bytes() + bytes(number + 1))
        (clips / f"more_{number}.txt").write_text(f"more {number}")
    config = own.write()
    process = start("cache", "fill", config)
    end = time.monotonic() + 200
    while len(entries(own.cache, "video")) < 3:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "interrupted; what is cached or saved is whole; the same command resumes" in out
    kept = {path: path.stat().st_mtime_ns for path in entries(own.cache, "video")}
    assert 3 <= len(kept) < 65
    assert list(own.cache.rglob("*.part")) == []
    within("cache", "fill", config)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(entries(own.cache, "video")) == 65
