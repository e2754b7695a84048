"""What a terminal shows of events."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from vtrain.cli.terminal import Terminal, TrainingLines, numbers
from vtrain.contract import Ended, Filling, Logged, Started, StepMetrics, Stepped

ROW = StepMetrics(3, 0.3, 1.25, 1.5, 1e-3, 0.5, [], [], 0.1, 0.0, 2**30)


def test_a_loss_of_several_terms_is_shown_with_each_of_them_apart() -> None:
    line = numbers(replace(ROW, terms={"crepa/loss": -0.25, "crepa/weight": 0.5}), 10, 0.1)
    assert line.startswith("loss 1.2500  flow_loss 1.5  crepa/loss -0.25  crepa/weight 0.5  lr 1.00e-03  norm 0.5")


def test_a_flow_loss_alone_is_shown_once() -> None:
    assert "flow_loss" not in numbers(ROW, 10, 0.1)
    assert numbers(ROW, 10, 0.1).endswith("left 0:00:01  memory 1.0 GiB")


def test_where_the_line_is_short_what_matters_least_goes_first() -> None:
    row = replace(ROW, terms={"crepa/loss": -0.25})
    shown = [numbers(row, 10, 0.1, width) for width in (200, 80, 50, 26, 5)]
    assert shown[0] == numbers(row, 10, 0.1)
    assert shown[1] == "loss 1.2500  flow_loss 1.5  lr 1.00e-03  norm 0.5  0.1 s/step  left 0:00:01"
    assert shown[2] == "loss 1.2500  lr 1.00e-03  0.1 s/step  left 0:00:01"
    assert shown[3:] == ["loss 1.2500  left 0:00:01", "loss 1.2500"]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_live_line_has_its_step_and_what_is_left_at_any_width(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    training = TrainingLines(console, 300, 0)
    training.show(Stepped(67))
    training.show(Logged((replace(ROW, step=67, seconds=0.06),)))
    training.stop()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").strip().splitlines()[-1]
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
