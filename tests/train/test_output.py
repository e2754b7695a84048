"""Two runs in one output folder: the second is refused while the first lives, and only then."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vtrain.run import output as output_lock

Run = Callable[..., subprocess.CompletedProcess[str]]

HOLD = """
import sys, time
from pathlib import Path
from typing import Any
from vtrain.run.output import hold

with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(folder) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the output folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.output)], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_in_one_output_folder_is_refused_and_told_whose_it_is(folder, within: Run, holder) -> None:
    done = within("run", folder.write(steps=3), check=2)
    assert f"another run has this output folder: process {holder.pid} on {socket.gethostname()}, since 2" in done.stderr
    assert "choose another run.output_dir" in done.stderr
    assert [path.name for path in folder.output.iterdir()] == [output_lock.FILE]


def test_after_kill_9_the_folder_is_free_at_once(folder, within: Run, holder) -> None:
    folder.write(steps=3)
    holder.kill()
    holder.wait()
    within("run", folder.config)
    assert len(folder.rows()) == 3


def test_two_processes_of_one_run_share_the_lock_and_a_second_run_ends_on_both(folder, vtrain: Run, holder) -> None:
    done = vtrain("run", folder.write(steps=3), processes=2, check=None)
    assert done.returncode != 0
    assert done.stderr.count("another run has this output folder") == 1


def test_on_a_file_system_without_locks_a_run_warns_and_goes_on(
    folder, within: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_lock, "lock", lambda file, place: "no locks")
    printed = within("run", folder.write(steps=3)).stdout
    assert "WARNING" in printed
    assert "without locks" in printed
    assert len(folder.rows()) == 3


def test_a_disk_that_takes_nothing_is_told_before_anything_is_done(
    folder, within: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    within("cache", "fill", folder.write(steps=3))
    monkeypatch.setattr(output_lock.os, "fsync", full)
    done = within("run", folder.config, check=2)
    assert f"{folder.path}: nothing can be written there: No space left on device." in done.stderr
    assert f"{folder.cache}: nothing can be written there: No space left on device." in done.stderr
    assert "Set run.output_dir to another folder, or free space." in done.stderr
    assert not folder.output.exists()
    assert not list(folder.path.glob(".vtrain*"))


def test_metrics_that_could_not_be_written_to_the_end_are_an_error_of_a_run_that_is_saved(
    folder, within: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = output_lock.append

    def full(path: Path, *lines: Any, **how: Any) -> None:
        if path.name == "metrics.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, *lines, **how)

    monkeypatch.setattr(output_lock, "append", full)
    done = within("run", folder.write(), check=2)
    assert "WARNING: metrics could not be written and are kept for the next time: [Errno 28]" in done.stdout
    assert "6 lines of metrics.jsonl could not be written." in done.stderr
    assert (folder.output / "checkpoints" / "step-000006").is_dir()
    assert '"event": "failed"' in (folder.output / "events.jsonl").read_text(encoding="utf-8")
    monkeypatch.undo()
    folder.write(steps=7)
    assert "metrics.jsonl lacks steps 1 to 6" in within("run", folder.config).stdout


def test_what_a_killed_run_left_is_gone_after_the_next_start(folder, within: Run) -> None:
    """Also where nothing is left to do."""
    within("run", folder.write(steps=3))
    files = set(folder.output.rglob("*"))
    for name in ("checkpoints/step-000009.partial", "checkpoints/step-000001.old.partial", "checkpoints/spool.partial"):
        (folder.output / name).mkdir()
    (folder.output / ".seen-0").touch()
    within("run", folder.config)
    assert set(folder.output.rglob("*")) == files


def test_who_holds_it_is_written_anew_by_each(tmp_path: Path) -> None:
    (tmp_path / output_lock.FILE).write_text("something longer than what a process writes of itself" * 3)
    with output_lock.hold(tmp_path) as warning:
        assert warning == ""
        assert (tmp_path / output_lock.FILE).read_bytes().count(b"\n") == 1
