"""metrics.jsonl and events.jsonl: what stands in them after interruptions, and when."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vtrain.contract import Event, Filling, Logged, Noted, Saved, StepMetrics, Stepped, Validated, Validating, Warned
from vtrain.contract.events import VERSION, from_json
from vtrain.run import output as chapter
from vtrain.run.output import EVENTS, METRICS, Recorder, hold, validation_owed


def logged(*steps: int) -> Logged:
    return Logged(tuple(StepMetrics(n, n / 10, 1 / n, 1 / n, 1e-3, None, [0.5], ["a"], 0.1, 0.0, 100) for n in steps))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(recorder: Recorder, *events: Event) -> list[Warned]:
    return [warning for event in events for warning in recorder.record(event)]


def run(folder: Path, step: int, *events: Event) -> int:
    """A session from `step`; how many later steps were cut off."""
    recorder = Recorder(folder)
    dropped = recorder.begin(step)
    assert record(recorder, *events) == []
    return dropped


def test_both_files_are_cut_back_to_the_checkpoint_and_torn_lines_go(tmp_path: Path) -> None:
    run(tmp_path, 0, logged(1, 2), Saved(2, tmp_path / "2"), logged(3, 4), Saved(4, tmp_path / "4"))
    for name in (METRICS, EVENTS):
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 5, "lo')
    before = lines_of(tmp_path / METRICS)
    assert run(tmp_path, 2, logged(3), Saved(3, tmp_path / "3")) == 2
    assert lines_of(tmp_path / METRICS)[:2] == before[:2]
    assert [line["step"] for line in lines(tmp_path / METRICS)] == [1, 2, 3]
    assert [(line["session"], line["step"]) for line in lines(tmp_path / EVENTS)] == [(1, 2), (2, 3)]


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_a_run_that_never_starts_leaves_nothing_and_one_that_does_what_came_before(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    assert record(recorder, Noted("read"), Warned("odd")) == []
    assert list(tmp_path.iterdir()) == []
    recorder.begin(0)
    assert record(recorder, Noted("begun")) == []
    assert [line["text"] for line in lines(tmp_path / EVENTS)] == ["read", "odd", "begun"]


def test_every_line_says_its_version_session_and_time_and_reads_back_as_the_event(tmp_path: Path) -> None:
    saved = Saved(2, tmp_path / "step-000002", (tmp_path / "step-000001",))
    run(tmp_path, 0, saved, Stepped(3), Filling("text", 1, 2))
    (line,) = lines(tmp_path / EVENTS)
    assert (line["version"], line["session"]) == (VERSION, 1)
    assert isinstance(line["time"], float)
    assert from_json(line) == saved


def test_what_cannot_be_written_is_warned_of_and_written_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path)
    recorder.begin(0)
    record(recorder, logged(1))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(chapter, "append", full)
        (first,) = record(recorder, logged(2))
        (second,) = record(recorder, Noted("still here"))
    assert "metrics could not be written and are kept for the next time" in first.text
    assert "events could not be written" in second.text
    assert record(recorder, logged(3)) == []
    assert [line["step"] for line in lines(tmp_path / METRICS)] == [1, 2, 3]
    assert [line["text"] for line in lines(tmp_path / EVENTS)] == ["still here"]


def test_a_write_that_fails_half_way_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path)
    recorder.begin(0)
    record(recorder, logged(1))
    before = (tmp_path / METRICS).read_bytes()

    def lost(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", lost)
    assert len(record(recorder, logged(2))) == 1
    assert (tmp_path / METRICS).read_bytes() == before


def test_a_disk_that_fills_up_within_a_line_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A limit on file size makes the kernel refuse the rest of a write, as a full disk does."""
    script = """
    import resource, signal, sys
    from pathlib import Path
    from vtrain.run.output import append
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    file = Path(sys.argv[1])
    append(file, [{"step": 1}], durable=False)
    for room in (30, 5000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            append(file, [{"step": 2, "text": "x" * 9000}], durable=True)
        except OSError:
            print("failed")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    append(file, [{"step": 2}], durable=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / METRICS)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "failed\nfailed\n"
    assert lines(tmp_path / METRICS) == [{"step": 1}, {"step": 2}]


def test_metrics_that_could_not_be_written_are_with_the_next_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path)
    recorder.begin(0)
    with monkeypatch.context() as full:
        full.setattr(chapter, "append", _refuse)
        assert len(record(recorder, logged(1, 2))) == 1
    assert record(recorder, Noted("the last event")) == []
    assert [line["step"] for line in lines(tmp_path / METRICS)] == [1, 2]


def _refuse(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_another_folder_of_that_name_is_not_the_runs_own(tmp_path: Path) -> None:
    folder, restored = tmp_path / "out", list[Path]()
    with hold(folder):
        recorder = Recorder(folder, lambda: restored.append(folder))
        recorder.begin(0)
        assert record(recorder, Noted("before")) == []
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        (warned,) = record(recorder, Noted("after"))
        assert "went away" in warned.text
        assert restored == [folder]
        assert record(recorder, Noted("later")) == []


@pytest.mark.parametrize(
    ("told", "due", "owed"),
    [
        ([], True, True),
        ([], False, False),
        ([Validating(2, 1)], False, True),
        ([Validating(2, 1), Validated(2, {}, None, (), interrupted=True)], False, True),
        ([Validating(2, 1), Validated(2, {}, None, ("no room",))], False, True),
        ([Validating(2, 1), Validated(2, {}, None), Validating(4, 1)], True, False),
    ],
)
def test_a_validation_is_owed_until_it_was_made(tmp_path: Path, told: list[Event], due: bool, owed: bool) -> None:
    assert not validation_owed(tmp_path, 2, due), "of a run that recorded nothing, nothing is known"
    run(tmp_path, 0, Noted("begun"), *told)
    assert validation_owed(tmp_path, 2, due) is owed
