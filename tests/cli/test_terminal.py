"""What a terminal shows of events."""

from __future__ import annotations

import io
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from vtrain.cli.live import TrainingLines, generating, numbers
from vtrain.cli.terminal import Terminal
from vtrain.contract import Ended, Filling, Generating, Logged, Noted, Saved, Started, StepMetrics, Stepped, Validated

ROW = StepMetrics(3, 0.3, 1.25, 1.5, 1e-3, 0.5, [], [], 0.1, 0.0, 2**30)


def test_a_loss_of_several_terms_is_shown_with_each_of_them_apart() -> None:
    line = numbers(replace(ROW, terms={"crepa/loss": -0.25, "crepa/weight": 0.5}), 10, 0.1)
    assert line.startswith("loss 1.2500  flow_loss 1.5  crepa/loss -0.25  crepa/weight 0.5  lr 1.00e-03  norm 0.5")


def test_a_flow_loss_alone_is_shown_once() -> None:
    assert "flow_loss" not in numbers(ROW, 10, 0.1)
    assert numbers(ROW, 10, 0.1).endswith("left 0:00:01  memory 1.0 GiB")


def test_who_is_asked_to_stop_says_how_long_a_step_and_a_checkpoint_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=200))
    clock = iter((10.0, 13.25))
    monkeypatch.setattr("vtrain.cli.terminal.time.monotonic", lambda: next(clock))
    terminal.show(Started(1, 0, 10, None, {}))
    terminal.heard()
    for event in (Stepped(1), Stepped(2), Saved(2, tmp_path, seconds=12.4)):
        terminal.show(event)
    terminal.heard()
    said = [line for line in out.getvalue().splitlines() if line.startswith("stopping")]
    assert said == [
        "stopping; what is done will be saved",
        "stopping; what is done will be saved (a step takes 3.2 s, the last checkpoint took 12 s to write)",
    ]


def test_where_the_line_is_short_what_matters_least_goes_first() -> None:
    row = replace(ROW, terms={"crepa/loss": -0.25})
    shown = [numbers(row, 10, 0.1, width) for width in (200, 80, 50, 26, 5)]
    assert shown[0] == numbers(row, 10, 0.1)
    assert shown[1] == "loss 1.2500  flow_loss 1.5  lr 1.00e-03  norm 0.5  0.1 s/step  left 0:00:01"
    assert shown[2] == "loss 1.2500  lr 1.00e-03  0.1 s/step  left 0:00:01"
    assert shown[3:] == ["loss 1.2500  left 0:00:01", "loss 1.2500"]


def last_line(out: io.StringIO) -> str:
    """What stands on the live line at the end."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").strip().splitlines()[-1]


def console_of(width: int) -> tuple[io.StringIO, Console]:
    out = io.StringIO()
    return out, Console(file=out, width=width, force_terminal=True, color_system=None, legacy_windows=False)


def test_80_columns_have_loss_rate_and_time_left_of_a_long_run_with_a_term() -> None:
    out, console = console_of(80)
    training = TrainingLines(console, 400_000, 0)
    terms = {"crepa/loss": -0.25, "crepa/similarity": 0.5, "crepa/weight": 0.5}
    training.show(Logged((replace(ROW, step=12_345, seconds=6.5, terms=terms),)))
    training.stop()
    assert last_line(out) == "step  12345/400000 loss 1.2500  lr 1.00e-03  6.5 s/step  left 29 days, 3:55:58"


def test_a_validation_shows_which_video_and_which_solver_step_and_then_the_numbers_again() -> None:
    out, console = console_of(80)
    terminal = Terminal(console)
    terminal.show(Started(1, 60, 300, None, {}))
    terminal.show(Stepped(67))
    terminal.show(Logged((replace(ROW, step=67),)))
    terminal.show(Generating(67, "solving", 1, 3, 0, 50))
    terminal.show(Generating(67, "solving", 2, 3, 12, 50))
    assert terminal._training is not None
    bar = terminal._training._bar
    assert bar is not None
    bar.refresh()
    assert last_line(out).startswith("step  67/300 validating  video 2 of 3  solver step 12 of 50  decoding in ")
    terminal.show(Validated(67, {}, None))
    bar.refresh()
    assert "67/300 loss 1.2500" in last_line(out)
    bar.stop()


def test_what_a_validation_shows_fits() -> None:
    now = Generating(67, "solving", 2, 3, 10, 50)
    whole = "validating  video 2 of 3  solver step 10 of 50  decoding in 0:01:30"
    assert generating(now, 60) == whole
    assert generating(now, 60, 50) == "video 2 of 3  solver step 10 of 50"
    assert generating(now, 60, 20) == "video 2 of 3"
    assert generating(replace(now, stage="decoding", solved=50), 60) == "validating  decoding video 2 of 3"
    assert "decoding in" not in generating(Generating(67, "solving", 1, 3, 0, 50), 0)


def test_into_a_file_a_validation_says_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    training = TrainingLines(Console(file=out, width=200), 300, 0)
    for solved in range(3):
        training.show(Generating(67, "solving", 1, 1, solved, 50))
    assert out.getvalue() == ""
    monkeypatch.setattr(TrainingLines, "LINE_EVERY", -1.0)
    training.show(Generating(67, "solving", 1, 1, 3, 50))
    assert out.getvalue().startswith("step 67/300  validating  video 1 of 1  solver step 3 of 50")


def ending(event: Ended) -> list[str]:
    out = io.StringIO()
    Terminal(Console(file=out, width=200)).show(event)
    return out.getvalue().splitlines()[2:]


def test_failed_validations_are_told_again_at_the_end() -> None:
    failed = dict.fromkeys((100, 200, 300, 400, 500), ("no room",)) | {500: ("no codec", "no room")}
    assert ending(Ended(500, 500, "finished", None, failed, last_validation_failed=True)) == [
        "WARNING: validation at step 500 failed: no codec",
        "WARNING: validation at steps 500, 400, 300 and 2 before failed: no room",
        "WARNING: the same command makes the videos of step 500 again",
    ]
    each_its_own = {step: (f"no {step}",) for step in range(1, 31)}
    shown = ending(Ended(500, 500, "finished", None, each_its_own))
    assert shown[0] == "WARNING: validation at step 30 failed: no 30"
    assert shown[10:] == ["WARNING: 20 more of them: events.jsonl in the output folder has all"]
    assert ending(Ended(500, 500, "finished", None, {100: ("no room",)})) == [
        "WARNING: validation at step 100 failed: no room"
    ]
    assert ending(Ended(500, 500, "finished")) == []


def test_a_terminal_breaks_a_text_between_words_and_a_pipe_not_at_all() -> None:
    text = "a text " * 30 + "/a/path/" + "folder/" * 20
    out, console = console_of(40)
    Terminal(console).show(Noted(text))
    lines = out.getvalue().splitlines()
    assert " ".join(out.getvalue().split()) == " ".join(text.split())
    assert all(len(line) < 40 or "/" in line for line in lines)
    assert len(lines) > 5
    piped = io.StringIO()
    Terminal(Console(file=piped, width=40, soft_wrap=True)).show(Noted(text))
    assert piped.getvalue() == f"{text}\n"


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_live_line_has_its_step_and_what_is_left_at_any_width(width: int) -> None:
    out, console = console_of(width)
    training = TrainingLines(console, 300, 0)
    training.show(Stepped(67))
    training.show(Logged((replace(ROW, step=67, seconds=0.06),)))
    training.stop()
    last = last_line(out)
    assert "67/300" in last
    assert "left 0:00:14" in last
    assert "…" not in last
    assert len(last) <= width


@pytest.mark.parametrize(
    ("resume", "told"),
    [
        ("latest", "stopped as asked; the same command resumes\n"),
        ("never", 'stopped as asked; to resume, set run.resume = "latest"\n'),
        (
            "step-000003",
            'stopped as asked; to resume, set run.resume = "latest" (the same command starts again from step-000003)\n',
        ),
    ],
)
def test_how_a_run_that_was_stopped_is_resumed_goes_by_where_it_started(resume: str, told: str) -> None:
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=200))
    terminal.show(Started(1, 3, 9, None, {"run.resume": resume}))
    terminal.show(Ended(5, 9, "stopped"))
    assert f"step 5 of 9: {told}" in out.getvalue()


def lines(*standings: Filling) -> list[str]:
    """What is said of a stage, its pace left out."""
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=200))
    for each in standings:
        terminal.show(each)
    return [line.split("  ")[0].rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_filling_shows_its_counter_at_any_width_and_what_is_left_at_80(width: int) -> None:
    out, console = console_of(width)
    terminal = Terminal(console)
    terminal.show(Filling("features (crepa)", 0, 123_456, unread=500))
    filling = terminal._filling
    filling.paces["features (crepa)"] = replace(filling.paces["features (crepa)"], began=time.monotonic() - 5000)
    terminal.show(Filling("features (crepa)", 9000, 123_456))
    filling.bar.refresh()
    filling.stop()
    assert re.search(r"encoding features \(crepa\) +9000/123456 ", last_line(out))
    assert "left 17:" in last_line(out)
    assert ("1.8 clips/s" in last_line(out)) is (width > 60)


def test_clips_that_cannot_be_used_are_not_told_as_cached() -> None:
    ended = Filling("video", 14, 16, unusable=2, made=14)
    assert lines(Filling("video", 0, 16), ended)[-1] == "video: 14 of 16 cached, 2 cannot be used"
    ended = Filling("video", 0, 5, unusable=5)
    assert lines(Filling("video", 0, 5, unread=5), ended)[-1] == "video: 0 of 5 cached, 5 cannot be used"


def test_clips_that_were_only_to_be_read_are_not_told_as_to_be_encoded() -> None:
    began = Filling("video", 2, 5, unread=3)
    assert lines(began, Filling("video", 5, 5, made=1)) == [
        "video: 2 of 5 cached, 3 to read or encode", "video: 5 of 5 cached, 1 of them encoded now",
    ]  # fmt: skip
    assert lines(began, Filling("video", 5, 5, made=3))[-1] == "video: 5 of 5 cached"
    assert lines(Filling("video", 2, 5, unread=1)) == ["video: 2 of 5 cached, 2 to do, 1 to read or encode"]
