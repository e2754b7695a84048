"""Checkpoints written beside training: of their own step to the last bit, one at a time, and nothing of a failure is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from vtrain import api
from vtrain.contract import CheckpointError, Ended, Event, Failed, Noted, Problem, Saved, Stepped, Validated, Warned
from vtrain.train import checkpoint, saving
from vtrain.train.loop import Loop
from vtrain.train.piece import Copies
from vtrain.train.readback import ReloadNeeded

pytestmark = pytest.mark.usefixtures("one_decoder")


@pytest.fixture
def beside(card_in_ram: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card, however small a checkpoint is."""
    monkeypatch.setattr(saving, "LEAST", 0)


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A disk that takes half a second for a checkpoint. Gives the threads that wrote one."""
    threads: list[str] = []
    real = checkpoint.write

    def write(*args: Any, **how: Any) -> Path:
        threads.append(threading.current_thread().name)
        time.sleep(0.5)
        return real(*args, **how)

    monkeypatch.setattr(checkpoint, "write", write)
    return threads


def events_of(config: Path, taken: Callable[[Any, Event], None] = lambda session, event: None) -> list[Event]:
    found = []
    with api.run(config) as session:
        for event in session:
            found.append(event)
            taken(session, event)
    return found


def alike(one: Any, other: Any, step: int) -> bool:
    left, right = one.tensors(step), other.tensors(step)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def stop_at(step: int) -> Callable[[Any, Event], None]:
    def taken(session: Any, event: Event) -> None:
        if event == Stepped(step):
            session.ask("stop")

    return taken


@pytest.mark.parametrize("train", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_what_is_written_while_steps_go_on_is_of_its_own_step(
    folder, another, beside: None, slowly: list[str], train: str
) -> None:
    """A run that is stopped there, and waits for its checkpoint, has the same; what is resumed from it is the run. Slow: LoRA."""
    values = {"train": train, "more": "\n[ema]\ndecay = 0.5\n"}
    events = events_of(folder.write(**values))
    order = [event for event in events if isinstance(event, Stepped | Saved)]
    assert [event.step for event in order if isinstance(event, Saved)] == [3, 6]
    assert next(at for at, event in enumerate(order) if isinstance(event, Saved)) > order.index(Stepped(4))
    assert [name.partition("_")[0] for name in slowly] == ["checkpoint", "MainThread"]
    stopped = another()
    events_of(stopped.write(**values), stop_at(3))
    assert alike(folder, stopped, 3)
    resumed = another()
    shutil.copytree(folder.output / "checkpoints" / "step-000003", resumed.output / "checkpoints" / "step-000003")
    events_of(resumed.write(**values))
    assert alike(folder, resumed, 6)


@pytest.mark.slow
def test_copies_of_later_checkpoints_lie_in_the_memory_of_the_first_unless_that_is_scarce(
    folder, another, beside: None, slowly: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow: three runs."""
    real, places = Copies.of, []

    def of(copies: Copies, name: str, value: torch.Tensor) -> torch.Tensor:
        got = real(copies, name, value)
        places.append((name, got.data_ptr()))
        return got

    monkeypatch.setattr(Copies, "of", of)
    values = {"save": 2, "more": "\n[ema]\ndecay = 0.5\n"}
    events_of(folder.write(**values))
    half = len(places) // 2
    assert places[:half] == places[half:], "steps 2 and 4"
    plain = another()
    monkeypatch.setattr(saving, "host_memory", lambda: saving.SPARE)
    events_of(plain.write(**values))
    assert all(alike(folder, plain, step) for step in (2, 4, 6))
    scarce = another()
    monkeypatch.setattr(saving, "host_memory", lambda: saving.ROOMY - 1)
    kept: list[int] = []
    settle = saving.Saver.settle

    def settled(saver: saving.Saver) -> Any:
        yield from settle(saver)
        kept.append(len(saver._copies))

    monkeypatch.setattr(saving.Saver, "settle", settled)
    events_of(scarce.write(**values))
    assert len(places) > 2 * half
    assert set(kept) == {0}


def test_one_is_written_at_a_time_and_a_validation_waits_for_none(folder, beside: None, slowly: list[str]) -> None:
    events = events_of(folder.write(save=1, steps=3, more=folder.validation("1 steps")))
    saved = [event.step for event in events if isinstance(event, Saved)]
    assert saved == [1, 2, 3]
    validated = next(at for at, event in enumerate(events) if isinstance(event, Validated))
    assert validated < next(at for at, event in enumerate(events) if isinstance(event, Saved))


def test_what_a_thread_could_not_write_is_a_warning_at_once_and_the_run_continues(
    folder, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.write

    def write(parent: Path, step: int, *args: Any, **how: Any) -> Path:
        if step == 3:
            raise CheckpointError(Problem(str(parent), "the disk is full."))
        return real(parent, step, *args, **how)

    monkeypatch.setattr(checkpoint, "write", write)
    events = events_of(folder.write())
    (warning,) = [event for event in events if isinstance(event, Warned) and "the disk is full" in event.text]
    assert events.index(warning) < events.index(Stepped(6))
    assert [event.step for event in events if isinstance(event, Saved)] == [6]
    assert isinstance(events[-1], Ended)


def test_a_stop_after_a_checkpoint_that_failed_saves_again(
    folder, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = checkpoint.write, [True]

    def write(*args: Any, **how: Any) -> Path:
        if fails.pop() if fails else False:
            raise CheckpointError(Problem("", "the disk is full."))
        return real(*args, **how)

    def taken(session: Any, event: Event) -> None:
        if isinstance(event, Validated):
            session.ask("stop")

    monkeypatch.setattr(checkpoint, "write", write)
    events = events_of(folder.write(more=folder.validation()), taken)
    assert [event.step for event in events if isinstance(event, Saved)] == [3]
    assert (folder.output / "checkpoints" / "step-000003" / "MANIFEST.json").is_file()


def test_a_run_that_is_closed_waits_for_what_is_being_written(folder, beside: None, slowly: list[str]) -> None:
    with api.run(folder.write()) as session:
        next(event for event in session if event == Stepped(4))
    assert checkpoint.fault(folder.output / "checkpoints" / "step-000003") is None


def test_without_room_for_a_copy_training_waits_and_it_is_said_once(
    folder, beside: None, slowly: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "host_memory", lambda: saving.SPARE)
    events = events_of(folder.write(save=2))
    assert set(slowly) == {"MainThread"}
    said = [event.text for event in events if isinstance(event, Noted) and "training waits" in event.text]
    assert len(said) == 1
    assert "1.0 GiB are free" in said[0] or "1.00 GiB are free" in said[0], said


def test_a_model_is_not_loaded_beside_another_that_computes(
    folder, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that stores weights in another form: what it wrote is read back by the main thread, as are later ones."""
    real, asked = checkpoint.fault_of, []

    def fault_of(*args: Any, reload: bool = True) -> str:
        asked.append((threading.current_thread() is threading.main_thread(), reload))
        if not reload:
            raise ReloadNeeded
        return real(*args, reload=reload)

    monkeypatch.setattr(checkpoint, "fault_of", fault_of)
    events = events_of(folder.write(save=2))
    assert [event.step for event in events if isinstance(event, Saved)] == [2, 4, 6]
    assert asked[0] == (False, False)
    assert set(asked[1:]) == {(True, True)}


def test_on_a_cpu_training_waits(folder, slowly: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "LEAST", 0)
    events_of(folder.write())
    assert set(slowly) == {"MainThread"}


@pytest.mark.parametrize(
    "fails", [CheckpointError(Problem("", "the disk is full.")), ValueError("the disk is full"), None]
)
def test_what_became_of_a_save_is_said_where_the_run_ends_by_another_error(
    folder, beside: None, monkeypatch: pytest.MonkeyPatch, fails: Exception | None
) -> None:
    real, step = checkpoint.write, Loop.optimizer_step

    def write(parent: Path, *args: Any, **how: Any) -> Path:
        time.sleep(0.5)
        if fails is not None:
            raise fails
        return real(parent, *args, **how)

    def broken(self: Loop, number: int, fed: Any) -> Any:
        if number == 3:
            raise RuntimeError("something else")
        return step(self, number, fed)

    monkeypatch.setattr(checkpoint, "write", write)
    monkeypatch.setattr(Loop, "optimizer_step", broken)
    events: list[Event] = []
    with pytest.raises(RuntimeError, match="something else"), api.run(folder.write()) as session:
        events.extend(session)  # what came before the error stays in the list
    said = [event for event in events if isinstance(event, Saved | Warned) and "gradient" not in str(event)]
    assert [type(event) for event in said] == [Warned if fails else Saved]
    assert isinstance(events[-1], Failed)
    recorded = (folder.output / "events.jsonl").read_text(encoding="utf-8")
    assert ("the disk is full" in recorded) == (fails is not None)
    assert (checkpoint.latest(folder.output / "checkpoints")[0] is None) == (fails is not None)


def test_training_that_waits_for_a_slow_disk_says_so(
    folder, beside: None, slowly: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PATIENCE_S", 0.05)
    events = events_of(folder.write(save=1, steps=3))
    said = [event.text for event in events if isinstance(event, Noted) and "training waits" in event.text]
    # The last one is written while there is nothing else to do.
    assert [text.partition(" is still being written")[0] for text in said] == [
        f"training waits: the checkpoint of step {step}" for step in (1, 2)
    ]


def test_a_clock_that_jumps_changes_neither_when_is_saved_nor_which_is_the_newest(
    folder, another, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day ahead at each look, and a day back at the next; the newest checkpoint's files are the oldest."""
    straight = another()
    events_of(straight.write(save=2))
    real, looks = time.time, count()
    monkeypatch.setattr(time, "time", lambda: real() + 86400 * (next(looks) % 3 - 1))
    events_of(folder.write(save=2))
    assert folder.rows() == straight.rows()
    assert alike(folder, straight, 6)
    for step, path in checkpoint.steps_saved(folder.output / "checkpoints"):
        for each in (path, *path.rglob("*")):
            os.utime(each, (real() - 86400 * step, real() - 86400 * step))
    assert checkpoint.latest(folder.output / "checkpoints") == (folder.output / "checkpoints" / "step-000006", [])
    timed = another()
    text = timed.write(save=2).read_text(encoding="utf-8").replace('every = "2 steps"', 'every = "10 min"')
    timed.config.write_text(text, encoding="utf-8")
    assert [event.step for event in events_of(timed.config) if isinstance(event, Saved)] == [6]


HUNG = """
import os, sys, threading
from vtrain.train import saving
real, plain = os.fsync, saving.Saver.__init__
def fsync(descriptor):
    if threading.current_thread().name == "checkpoint":
        threading.Event().wait()
    real(descriptor)
os.fsync, saving.LEAST, saving.PATIENCE_S = fsync, 0, 0.2
saving.Saver.__init__ = lambda self, *given, beside: plain(self, *given, beside=True)
from vtrain.cli.app import main
main()
"""


@pytest.mark.long
def test_a_disk_that_never_answers_stops_no_step_before_the_next_save_and_no_second_ctrl_c(folder) -> None:
    """What the thread was writing is no checkpoint."""
    config = folder.write(save=3, steps=9, log_every=1)
    command = [sys.executable, "-c", HUNG, "run", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "training waits" in line:
                break
        assert any(line.startswith("step 6/9") for line in lines), lines
        assert "the checkpoint of step 3 is still being written" in lines[-1]
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None, "one Ctrl-C asks; it saves before it ends"
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=20)[0]
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    assert checkpoint.steps_saved(folder.output / "checkpoints") == []
