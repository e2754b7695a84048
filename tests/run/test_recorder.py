"""metrics.jsonl and events.jsonl: what stands in them after interruptions, and when."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vtrain.contract import (
    CheckpointError,
    Event,
    Filling,
    Logged,
    Noted,
    Saved,
    StepMetrics,
    Stepped,
    Validated,
    Validating,
    Warned,
)
from vtrain.contract.events import VERSION, from_json
from vtrain.plan.places import EVENTS, METRICS
from vtrain.run import output as chapter
from vtrain.run.lines import RECORDS, Records, append
from vtrain.run.output import Recorder, hold, validation_owed


def logged(*steps: int) -> Logged:
    return Logged(tuple(StepMetrics(n, n / 10, 1 / n, 1 / n, 1e-3, None, [0.5], ["a"], 0.1, 0.0, 100) for n in steps))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(recorder: Recorder, *events: Event) -> list[Warned]:
    return [warning for event in events for warning in recorder.record(event)]


def run(folder: Path, step: int, *events: Event) -> int:
    """A session from `step`; how many later steps were cut off."""
    recorder = Recorder(folder)
    dropped, _ = recorder.begin(step)
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


def checkpoint(folder: Path, *steps: int) -> Records:
    """What a checkpoint says after a session of these steps."""
    recorder = Recorder(folder)
    recorder.begin(0)
    assert record(recorder, Noted("begun"), *(logged(step) for step in steps)) == []
    return recorder.records()


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text, encoding="utf-8")


def test_records_that_nobody_touched_are_as_they_were_and_those_of_a_resumed_run_say_the_same(tmp_path: Path) -> None:
    """Seconds and memory apart: they are measured."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for folder in (straight, resumed):
        folder.mkdir()
    expected = checkpoint(straight, 1, 2, 3)
    before = checkpoint(resumed, 1, 2)
    run(resumed, 2, logged(3))  # not saved: done again below
    recorder = Recorder(resumed)
    assert recorder.begin(2, before) == (1, [])
    record(recorder, Logged(tuple(replace(row, seconds=9.0) for row in logged(3).steps)))
    assert recorder.records().files[METRICS] == expected.files[METRICS]


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: (folder / METRICS).unlink(), ["metrics.jsonl lacks steps 1 to 4"]),
        (lambda folder: (folder / METRICS).write_text(""), ["metrics.jsonl lacks steps 1 to 4"]),
        (lambda folder: cut_line(folder / METRICS, 1), ["metrics.jsonl lacks step 2"]),
        (lambda folder: edit(folder / METRICS, ('"step": 1,', '"step": 9,')), ["metrics.jsonl lacks step 1"]),
        (
            lambda folder: edit(folder / METRICS, ('"loss": 0.5', '"loss": 0.1')),
            ["metrics.jsonl does not say what it said"],
        ),
        (
            lambda folder: edit(folder / METRICS, ('"step": 3', '"step": 2')),
            ["metrics.jsonl lacks step 3", "1 line not of"],
        ),
        (
            lambda folder: edit(folder / METRICS, ('"step": 3', '"step": -3')),
            ["metrics.jsonl lacks step 3", "1 line not of"],
        ),
        (
            lambda folder: edit(folder / METRICS, ('"step": 3', '"step": true')),
            ["metrics.jsonl lacks step 3", "1 line not"],
        ),
        (
            lambda folder: edit(folder / METRICS, ('{"step": 3', "\x00")),
            ["metrics.jsonl lacks step 3", "1 line not of"],
        ),
        (lambda folder: (folder / EVENTS).unlink(), ["events.jsonl lacks 1 line that it had"]),
        (lambda folder: edit(folder / EVENTS, ("begun", "ended")), ["events.jsonl does not say what it said"]),
        (
            lambda folder: edit(folder / EVENTS, ('"session": 1', '"session": 0')),
            ["events.jsonl: 1 line not of", "lacks 1"],
        ),
    ],
)
def test_what_became_of_the_records_since_the_checkpoint_is_said_once(
    tmp_path: Path, harm: Callable[[Path], object], told: list[str]
) -> None:
    before = checkpoint(tmp_path, 1, 2, 3, 4)
    harm(tmp_path)
    recorder = Recorder(tmp_path)
    _, faults = recorder.begin(4, before)
    assert len(faults) == len(told), faults
    assert all(words in fault for words, fault in zip(told, faults, strict=True)), faults
    assert recorder.session == 2
    steps = [line["step"] for line in lines(tmp_path / METRICS)] if (tmp_path / METRICS).exists() else []
    assert steps == sorted(set(steps)), "in order, each once"
    assert Recorder(tmp_path).begin(4, recorder.records()) == (0, []), "a gap is said once"


def test_a_file_with_odd_lines_is_kept_as_it_was(tmp_path: Path) -> None:
    before = checkpoint(tmp_path, 1, 2)
    edit(tmp_path / METRICS, ('{"step": 1', 'my notes\n{"step": 1'))
    text = (tmp_path / METRICS).read_text(encoding="utf-8")
    _, (fault,) = Recorder(tmp_path).begin(2, before)
    assert fault.endswith("removed; as it was: " + str(tmp_path / "metrics.jsonl.as-found-1"))
    assert (tmp_path / "metrics.jsonl.as-found-1").read_text(encoding="utf-8") == text
    assert [line["step"] for line in lines(tmp_path / METRICS)] == [1, 2]


def test_without_a_word_of_the_checkpoint_a_gap_is_said_all_the_same(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, 2, 3, 4, 5, 6, 7)
    cut_line(tmp_path / METRICS, 3)
    cut_line(tmp_path / METRICS, 0)
    assert Recorder(tmp_path).begin(7)[1] == ["metrics.jsonl lacks steps 1 and 4"]
    assert Recorder(tmp_path).begin(7, whole_file=False)[1] == []


def cut_line(path: Path, number: int) -> None:
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(kept[:number] + kept[number + 1 :]), encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"session": -1, "files": {}}', "session is -1: "),
        (
            '{"session": 1, "files": {"metrics.jsonl": {"lines": true, "sha256": "a"}}}',
            "files.metrics.jsonl.lines is true: ",
        ),
        ("{", "cannot be read"),
    ],
)
def test_what_a_checkpoint_says_of_the_records_is_checked(tmp_path: Path, text: str, told: str) -> None:
    assert Records.read(tmp_path) is None
    (tmp_path / RECORDS).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"records\.json: {told}"):
        Records.read(tmp_path)


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

    with monkeypatch.context() as patch:
        patch.setattr(chapter, "append", _refuse)
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
    from vtrain.run.lines import append
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


def test_metrics_that_were_never_written_are_an_error_at_the_end_and_missed_at_the_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is of a step whose numbers stood in no file when it was saved."""
    recorder = Recorder(tmp_path)
    recorder.begin(0)
    record(recorder, logged(1))
    recorder.check_written()
    monkeypatch.setattr(chapter, "append", _refuse)
    record(recorder, logged(2, 3))
    with pytest.raises(CheckpointError, match=r"2 lines of metrics\.jsonl could not be written"):
        recorder.check_written()
    before = recorder.records()
    assert (before.files[METRICS].lines, before.unwritten) == (1, 2)
    monkeypatch.undo()
    assert Recorder(tmp_path).begin(3, before)[1] == ["metrics.jsonl lacks steps 2 to 3"]


def test_a_file_with_odd_lines_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is copied, not renamed, before what is kept of it takes its place."""
    append(tmp_path / METRICS, [{"step": 1}, {"odd": 1}], durable=False)
    kept = (tmp_path / METRICS).read_bytes()
    monkeypatch.setattr(Path, "replace", _refuse)
    with pytest.raises(OSError, match="No space"):
        Recorder(tmp_path).begin(1)
    assert (tmp_path / METRICS).read_bytes() == kept


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
