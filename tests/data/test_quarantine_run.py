"""What a scan or filling found bad is what is moved, and the next scan knows nothing of it."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from vtrain.cli.terminal import Terminal
from vtrain.contract import DataError, Event, Noted, Quarantined
from vtrain.data.caching.caches import fill_caches
from vtrain.data.scanning.ledger import Ledger
from vtrain.data.scanning.quarantine import move_bad
from vtrain.data.scanning.scan import scan
from vtrain.run import session
from vtrain.run.session import Session
from vtrain.train.processes import Processes


@pytest.fixture
def bad(setup, make_video):
    """A folder with two good clips, one that is no video, one whose frames are damaged, and one that is too short."""
    setup.add("good.mp4", make_video())
    setup.add("other.mp4", make_video())
    setup.add("sub/text.mp4", b"these are words\n" * 100)
    video = bytearray(make_video(frames=60, gop=1, b_frames=0))
    start = video.index(b"mdat") + len(video) // 4
    video[start : start + len(video) // 3] = bytes(len(video) // 3)
    setup.add("damaged.mp4", bytes(video))
    setup.add("short.mp4", make_video(frames=3))
    return setup


@pytest.fixture
def processes() -> Processes:
    """This one alone."""
    return Processes("no")


def session_of(plan, processes: Processes) -> Session:
    """A session that has planned already."""
    session = Session(plan.config.path)
    session.plan, session.processes = plan, processes
    return session


def shown(events: Iterable[Event]) -> list[str]:
    out = io.StringIO()
    terminal = Terminal(Console(file=out, soft_wrap=True, width=500))
    for event in events:
        terminal.show(event)
    terminal.show(Noted("that is all"))
    return out.getvalue().splitlines()[:-1]


def test_bad_files_of_scan_and_filling_are_moved_and_shown_and_the_dropped_stay(bad, processes, tmp_path: Path) -> None:
    away = tmp_path / "away"
    dataset = bad.dataset(on_bad_file="move", quarantine=away)
    plan = bad.plan(dataset)
    found = scan(plan)
    before = sorted(path.name for path in bad.folder.rglob("*.mp4"))
    assert len(before) == 5  # a scan moves nothing
    filled = fill_caches(plan, list(found.samples), [], "cpu", lambda *_: None)
    assert list(filled.skipped) == ["clips/damaged.mp4"]
    lines = shown(session_of(plan, processes)._quarantined())
    assert len(lines) == 3, lines
    assert lines[0].startswith(f"moved: clips/damaged.mp4 -> {away}/damaged.mp4 (")
    assert lines[1].startswith(f"moved: clips/sub/text.mp4 -> {away}/sub/text.mp4 (cannot be read as a video")
    assert lines[2] == "2 bad files moved"
    assert sorted(path.name for path in bad.folder.rglob("*.mp4")) == ["good.mp4", "other.mp4", "short.mp4"]
    assert sorted(path.name for path in away.rglob("*.mp4")) == ["damaged.mp4", "text.mp4"]


def test_where_every_clip_fails_in_filling_they_are_moved_before_the_error(
    bad, processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through what `vtrain run` and `vtrain cache fill` call."""
    monkeypatch.setattr(session, "explained", lambda *_: nullcontext())  # an estimate needs a real family and optimizer
    for name in ("good.mp4", "other.mp4"):
        (bad.folder / name).unlink()
    plan = bad.plan(bad.dataset(on_bad_file="move", quarantine=tmp_path / "away"))
    found = scan(plan)
    events: list[Event] = []
    with pytest.raises(DataError, match="frames could be decoded"):
        events.extend(session_of(plan, processes)._caches(found))
    assert [event.file for event in events if isinstance(event, Quarantined)] == [
        "clips/damaged.mp4", "clips/sub/text.mp4",
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "away").rglob("*.mp4")) == ["damaged.mp4", "text.mp4"]


def test_a_second_time_there_is_nothing_to_move(bad, tmp_path: Path) -> None:
    plan = bad.plan(bad.dataset(on_bad_file="move", quarantine=tmp_path / "away"))
    scan(plan)
    assert [moved.ref_id for moved in move_bad(plan)] == ["sub/text.mp4"]
    survey = scan(plan).survey.datasets[0]
    assert not any("cannot be read" in reason for reason in survey.skipped)
    assert list(move_bad(plan)) == []


def test_a_file_of_two_datasets_is_moved_once(bad, tmp_path: Path) -> None:
    one = bad.dataset(on_bad_file="move", quarantine=tmp_path / "away")
    two = bad.dataset(name="again", frames=9, on_bad_file="move", quarantine=tmp_path / "away")
    plan = bad.plan(one, two)
    scan(plan)
    assert [(moved.dataset, moved.ref_id, moved.stays) for moved in move_bad(plan)] == [("clips", "sub/text.mp4", "")]


def test_without_on_bad_file_move_nothing_moves(bad, processes) -> None:
    plan = bad.plan()
    scan(plan)
    assert shown(session_of(plan, processes)._quarantined()) == []
    assert len(list(bad.folder.rglob("*.mp4"))) == 5


def test_a_fault_that_may_pass_moves_nothing(bad, tmp_path: Path) -> None:
    plan = bad.plan(bad.dataset(on_bad_file="move", quarantine=tmp_path / "away"))
    scan(plan)
    with Ledger(bad.cache) as ledger, ledger.transaction() as db:
        # As a scan writes it down when a storage does not answer: the file is to be looked at again.
        db.execute("UPDATE source SET unseen = 1 WHERE ref = 'sub/text.mp4'")
    assert list(move_bad(plan)) == []
    assert (bad.folder / "sub" / "text.mp4").exists()
