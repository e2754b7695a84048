"""A run as an object: its events, closing it in the middle, one after another, and listeners that misbehave."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import equal, is_grad_enabled

from vtrain import api
from vtrain.contract import (
    CheckpointError,
    ConfigError,
    Ended,
    Estimated,
    Event,
    Failed,
    Filled,
    Filling,
    Generating,
    Logged,
    Planned,
    Problem,
    Saved,
    Scanned,
    Started,
    Stepped,
    TrainingError,
    Validated,
    Validating,
    Warned,
)
from vtrain.contract.events import as_json, from_json
from vtrain.run import listeners
from vtrain.train import checkpoint
from vtrain.train.loop import Loop
from vtrain.validate import generate

pytestmark = pytest.mark.usefixtures("one_decoder")

DIVERGES = "1e-3\nweight_decay = 1e38"
TRACKERS = """
    import sys
    import time
    from vtrain.contract import Logged, Options, Stepped, TrackerSpec, hookimpl


    class Tracker:
        events = (Stepped, Logged)

        def __init__(self, do):
            self.do = do

        def start(self, run, saved):
            self.seen = saved.get("seen", 0)

        def show(self, event):
            self.seen += 1
            self.do()

        def state(self):
            return {"seen": self.seen}

        def finish(self):
            pass


    def fails():
        raise ConnectionError("no route")


    def hangs():
        time.sleep(3600)


    def prints():
        print("a line between others", flush=True)


    def counts():
        pass


    @hookimpl
    def vtrain_trackers():
        return [
            TrackerSpec(do.__name__, "for tests", Options, lambda options, do=do: Tracker(do))
            for do in (fails, hangs, prints, counts)
        ]
"""


def events_of(config: Path) -> list[Event]:
    with api.run(config) as session:
        return list(session)


def end(events: list[Event]) -> Ended:
    """How the run ended, but for its memory, which is the processor's and torch's."""
    assert isinstance(events[-1], Ended)
    return replace(events[-1], estimated_memory=None, peak_memory=None)


def warnings_of(events: list[Event]) -> list[str]:
    """All but that of a torch for cards on a machine without any."""
    texts = [event.text for event in events if isinstance(event, Warned)]
    return [text for text in texts if "running on the CPU" not in text]


def same(one: Any, other: Any, step: int) -> None:
    """Two runs ended with the same numbers and the same weights."""
    assert one.rows() == other.rows()
    tensors, others = one.tensors(step), other.tensors(step)
    assert tensors.keys() == others.keys()
    assert all(equal(value, others[name]) for name, value in tensors.items())


def test_a_run_is_an_iterator_of_events_in_the_order_of_its_chapters(folder) -> None:
    events = events_of(folder.write(more=folder.validation()))
    told = [type(event) for event in events]
    once = [Planned, Scanned, Estimated, Filled, Started, Ended]
    assert [kind for kind in told if kind in once] == once
    assert [event.step for event in events if isinstance(event, Stepped)] == [1, 2, 3, 4, 5, 6]
    assert [each.step for event in events if isinstance(event, Logged) for each in event.steps] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events if isinstance(event, Saved)] == [3, 6]
    assert [event.step for event in events if isinstance(event, Validating | Validated)] == [3, 3, 6, 6]
    assert end(events) == Ended(6, 6, "finished")
    shares = [(e.step, e.stage, e.video, e.videos, e.solved) for e in events if isinstance(e, Generating)]
    assert shares == [
        (step, *how)
        for step in (3, 6)
        for how in (("solving", 1, 1, 0), ("solving", 1, 1, 1), ("solving", 1, 1, 2), ("decoding", 1, 1, 2))
    ]
    lines = [json.loads(line) for line in (folder.output / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    read = [from_json(line) for line in lines]
    kept = [event for event in events if type(event).__name__ not in ("Stepped", "Logged", "Filling", "Generating")]
    assert [type(event) for event in read] == [type(event) for event in kept]
    assert read[-1] == kept[-1]


def test_from_python_and_from_the_command_line_are_the_same_run(folder, another, within) -> None:
    events_of(folder.write())
    other = another()
    within("run", other.write())
    same(folder, other, 6)


def test_two_runs_in_one_process_do_not_meet(folder, another) -> None:
    """accelerate keeps the first precision of a process unless it is told to let it go."""
    fast, plain = another(), another()
    fast.write()
    fast.config.write_text(fast.config.read_text().replace('mixed = "no"', 'mixed = "bf16"'))
    events_of(fast.config)
    events_of(plain.write())
    events_of(folder.write())
    same(folder, plain, 6)
    assert fast.rows() != plain.rows()


def test_one_that_was_refused_on_entering_leaves_the_next_its_choice_of_precision(
    folder, another, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate keeps what it is given first for a whole process."""

    def refuse(*_: Any) -> None:
        raise ConfigError(Problem("", "nothing fits.", "Use less."))

    config = folder.write()
    config.write_text(config.read_text().replace('mixed = "no"', 'mixed = "bf16"'))
    with monkeypatch.context() as patch:
        patch.setattr("vtrain.run.session.agreed", refuse)
        with pytest.raises(ConfigError), api.run(config):
            pass
    with api.run(another().write(steps=2)) as session:
        assert any(isinstance(event, Ended) for event in session)
        assert session.processes.accelerator.mixed_precision == "no"


def test_nothing_happens_while_nobody_takes_an_event(folder) -> None:
    """Whoever is slower than the run makes it wait; nothing piles up."""
    with api.run(folder.write()) as session:
        for event in session:
            if isinstance(event, Stepped) and event.step == 2:
                time.sleep(0.3)
                assert not (folder.output / "metrics.jsonl").exists()
                break
        assert isinstance(next(session), Logged)
        assert len(folder.rows()) == 2


@pytest.mark.parametrize("how", ["closed", "Ctrl-C", "error"])
def test_one_that_is_left_in_the_middle_is_whole_and_resumes_to_the_same_bits(folder, another, how: str) -> None:
    class Left(Exception):
        pass

    raised = {"closed": None, "Ctrl-C": KeyboardInterrupt, "error": Left}[how]
    config = folder.write(log_every=1)
    try:
        with api.run(config) as session:
            for event in session:
                if isinstance(event, Stepped) and event.step == 5:
                    if raised is not None:
                        raise raised
                    break
    except (KeyboardInterrupt, Left):
        assert raised is not None
    assert [path.name for path in (folder.output / "checkpoints").iterdir()] == ["step-000003"]
    events_of(config)  # the folder is free
    straight = another()
    events_of(straight.write(log_every=1))
    same(folder, straight, 6)
    sessions = [json.loads(line)["session"] for line in (folder.output / "events.jsonl").read_text().splitlines()]
    assert set(sessions) == {1, 2}


def test_a_torn_line_of_events_is_no_obstacle(folder) -> None:
    config = folder.write()
    with api.run(config) as session:
        next(event for event in session if isinstance(event, Saved))
    with (folder.output / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"version": 1, "sess')
    events = events_of(config)
    assert next(event for event in events if isinstance(event, Started)).session == 2
    lines = (folder.output / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["session"] for line in lines} == {1, 2}


def test_a_run_inside_a_running_event_loop_is_a_run(folder) -> None:
    async def notebook() -> list[Event]:
        return events_of(folder.write())

    assert end(asyncio.run(notebook())) == Ended(6, 6, "finished")


def test_a_second_run_of_the_output_folder_is_refused_and_the_first_goes_on(folder) -> None:
    config = folder.write()
    with api.run(config) as first:
        next(event for event in first if isinstance(event, Stepped))
        with pytest.raises(CheckpointError, match="another run has this output folder"):
            events_of(config)
        assert end(list(first)) == Ended(6, 6, "finished")


def test_an_output_folder_that_goes_away_is_made_anew_and_nothing_is_lost(folder) -> None:
    events = []
    with api.run(folder.write()) as session:
        for event in session:
            events.append(event)
            if isinstance(event, Stepped) and event.step == 4:
                shutil.rmtree(folder.output)
    warned = [event.text for event in events if isinstance(event, Warned)]
    assert any("the output folder went away" in text for text in warned)
    assert [row["step"] for row in folder.rows()] == [3, 4, 5, 6] or [row["step"] for row in folder.rows()] == [4, 5, 6]
    assert (folder.output / "checkpoints" / "step-000006" / "MANIFEST.json").exists()
    assert (folder.output / "config.toml").exists()
    assert end(events_of(folder.config)) == Ended(6, 6, "nothing to do")


def test_a_request_from_the_program_or_the_control_file_is_done_at_the_end_of_the_step(folder) -> None:
    events = []
    with api.run(folder.write(save=100, more=folder.validation("100 steps"))) as session:
        for event in session:
            events.append(event)
            if isinstance(event, Stepped) and event.step == 1:
                session.ask("save")
            if isinstance(event, Stepped) and event.step == 2:
                (folder.output / "control").write_text("validate and\n")
            if isinstance(event, Stepped) and event.step == 4:
                session.ask("stop")
    assert [event.step for event in events if isinstance(event, Saved)] == [1, 4]
    assert [event.step for event in events if isinstance(event, Validated)] == [2]
    assert warnings_of(events) == ['the control file asked for "and"; its words are stop, save, validate']
    assert end(events) == Ended(4, 6, "stopped")
    assert session.signal is None


def test_a_validation_that_is_asked_for_where_there_is_none_is_told(folder) -> None:
    events = []
    with api.run(folder.write()) as session:
        for event in session:
            events.append(event)
            if isinstance(event, Stepped) and event.step == 2:
                session.ask("validate")
    assert warnings_of(events) == ["a validation was asked for, and the configuration has no [validation]"]


def test_an_error_is_the_last_event_and_then_raised(folder) -> None:
    events: list[Event] = []

    def run() -> None:
        with api.run(folder.write(lr=DIVERGES)) as session:
            for event in session:
                events.append(event)

    with pytest.raises(TrainingError):
        run()
    assert isinstance(events[-1], Failed)
    assert events[-1].error == "TrainingError"
    assert "not finite" in events[-1].problems[0]
    assert ": " in events[-1].problems[0], "the place, as the terminal has it"
    last = json.loads((folder.output / "events.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["event"] == "failed"


@pytest.mark.parametrize("kind", ["fails", "hangs", "prints"])
def test_a_tracker_that_misbehaves_changes_no_bit_and_no_exit_code(
    folder, another, within, install_plugin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(listeners, "PATIENCE_S", 0.3)
    install_plugin("odd", TRACKERS)
    within("run", folder.write(more=f'\n[[tracker]]\nuse = "{kind}"\n'))
    other = another()
    within("run", other.write())
    same(folder, other, 6)


def test_json_prints_events_and_nothing_else_on_standard_output(
    folder, within, install_plugin: Callable[..., Path]
) -> None:
    install_plugin("odd", TRACKERS)
    done = within("run", "--json", folder.write(more='\n[[tracker]]\nuse = "prints"\n'))
    read = [from_json(json.loads(line)) for line in done.stdout.splitlines()]
    assert isinstance(read[0], Planned)
    assert end(read) == Ended(6, 6, "finished")
    assert sum(isinstance(event, Stepped) for event in read) == 6
    assert "a line between others" in done.stderr


def test_what_a_tracker_keeps_goes_with_the_checkpoint(folder, within, install_plugin: Callable[..., Path]) -> None:
    install_plugin("odd", TRACKERS)
    tracker = '\n[[tracker]]\nuse = "counts"\n'
    within("run", folder.write(steps=3, log_every=1, more=tracker))
    within("run", folder.write(steps=6, log_every=1, more=tracker))
    state = json.loads((folder.output / "checkpoints" / "step-000006" / "trackers.json").read_text(encoding="utf-8"))
    assert state["counts"]["seen"] > 6, "it went on counting"


def test_a_validation_that_was_interrupted_is_made_when_the_run_resumes(folder, another) -> None:
    """Also the last one, of a run that has nothing else to do."""
    config = folder.write(more=folder.validation())
    for step in (3, 6):
        with api.run(config) as session:
            events = []
            for event in session:
                events.append(event)
                if isinstance(event, Validating) and event.step == step:
                    session.ask("stop")
        assert end(events) == Ended(step, 6, "stopped")
        assert [event.interrupted for event in events if isinstance(event, Validated)][-1]
        assert not (folder.output / "samples" / f"step-{step:06d}").exists()
    events = events_of(config)
    assert [event.step for event in events if isinstance(event, Validated)] == [6]
    assert end(events) == Ended(6, 6, "finished")
    lines = [json.loads(line) for line in (folder.output / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    third = [line["event"] for line in lines if line["session"] == 3]
    assert {"started", "validating", "validated", "ended"} <= set(third)
    straight = another()
    events_of(straight.write(more=folder.validation()))
    same(folder, straight, 6)
    for step in (3, 6):
        one, other = (each.output / "samples" / f"step-{step:06d}" / "one.mp4" for each in (folder, straight))
        assert one.read_bytes() == other.read_bytes()


def test_a_stop_between_micro_batches_leaves_the_step_and_the_resumed_run_makes_it_again(
    folder, another, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "batch_size": 1,
        "accumulate": 3,
        "more": '\n[[regularizer]]\nuse = "toy-smooth"\nblock = 1\n',
        "log_every": 1,
    }
    config, made, own = folder.write(**settings), list[int](), Loop.micro_batch_of
    for stops, done in ((2, 0), (8, 2)):
        with api.run(config) as session:

            def counted(self: Loop, *given: Any, session: Any = session, stops: int = stops) -> Any:
                made.append(1)
                if len(made) == stops:
                    session.ask("stop")
                return own(self, *given)

            made.clear()
            monkeypatch.setattr(Loop, "micro_batch_of", counted)
            events = list(session)
        assert end(events) == Ended(done, 6, "stopped")
        assert len(made) == stops, "the third micro-batch was not begun"
        saved = [event.step for event in events if isinstance(event, Saved)]
        assert saved == ([done] if done else [])
    monkeypatch.undo()
    events_of(config)
    straight = another()
    events_of(straight.write(**settings))
    same(folder, straight, 6)


def test_a_stop_while_videos_are_decoded_makes_no_more_of_them_and_the_resumed_run_makes_all(folder) -> None:
    config = folder.write(more=folder.validation(one="gradient", two="another"))
    with api.run(config) as session:
        events = []
        for event in session:
            events.append(event)
            if isinstance(event, Generating) and (event.step, event.stage, event.video) == (3, "decoding", 1):
                session.ask("stop")
    assert end(events) == Ended(3, 6, "stopped")
    (validated,) = (event for event in events if isinstance(event, Validated))
    assert validated.interrupted
    assert not (folder.output / "samples" / "step-000003" / "two.mp4").exists()
    assert [event.step for event in events_of(config) if isinstance(event, Validated)] == [3, 6]
    assert (folder.output / "samples" / "step-000003" / "two.mp4").exists()


def test_a_run_that_has_nothing_to_do_encodes_and_loads_nothing(folder) -> None:
    config = folder.write(more=folder.validation())
    events_of(config)
    config.write_text(config.read_text().replace(str(folder.cache), str(folder.output.parent / "empty")))
    events = events_of(config)
    assert end(events) == Ended(6, 6, "nothing to do")
    assert not any(isinstance(event, Filling | Filled | Started) for event in events)


def test_a_stop_during_a_validation_saves_again_where_the_save_before_it_failed(
    folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = checkpoint.write, [True]

    def write(parent: Path, step: int, pieces: Any, *states: Any, **how: Any) -> Path:
        if fails and fails.pop():
            for piece in pieces:
                piece.gather(keep=False)
            raise CheckpointError(Problem(str(parent), "no room."))
        return real(parent, step, pieces, *states, **how)

    monkeypatch.setattr(checkpoint, "write", write)
    with api.run(folder.write(more=folder.validation())) as session:
        events = []
        for event in session:
            events.append(event)
            if isinstance(event, Validating):
                session.ask("stop")
    assert any("no room" in text for text in warnings_of(events))
    assert [event.step for event in events if isinstance(event, Saved)] == [3]
    assert end(events) == Ended(3, 6, "stopped")


def test_a_stop_while_an_owed_validation_is_made_trains_no_step(folder) -> None:
    config = folder.write(more=folder.validation())
    for _ in range(2):
        with api.run(config) as session:
            events = []
            for event in session:
                events.append(event)
                if isinstance(event, Validating):
                    session.ask("stop")
        assert end(events) == Ended(3, 6, "stopped")
    assert not any(isinstance(event, Stepped) for event in events)
    assert [event.step for event in events_of(config) if isinstance(event, Validated)] == [3, 6]


def fail(*_: object, **__: object) -> None:
    raise ValueError("no codec")


def test_a_last_validation_that_fails_is_told_at_the_end_and_made_again_by_the_same_command(
    folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, why = folder.write(more=folder.validation()), ("ValueError: no codec",)
    with monkeypatch.context() as broken:
        broken.setattr(generate.Validator, "solving", fail)
        for steps in ((3, 6), (6,)):
            events = events_of(config)
            assert [event.failures for event in events if isinstance(event, Validated)] == [why] * len(steps)
            failed = dict.fromkeys(steps, why)
            assert end(events) == Ended(6, 6, "finished", None, failed, last_validation_failed=True)
    assert end(events_of(config)) == Ended(6, 6, "finished")
    assert (folder.output / "samples" / "step-000006" / "one.mp4").exists()
    assert end(events_of(config)) == Ended(6, 6, "nothing to do")


def test_a_validation_that_failed_before_others_is_told_at_the_end_and_the_last_did_not_fail(
    folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    with api.run(folder.write(more=folder.validation())) as session, monkeypatch.context() as broken:
        broken.setattr(generate.Validator, "solving", fail)
        for event in session:
            events.append(event)
            if isinstance(event, Validated):
                broken.undo()
    assert end(events) == Ended(6, 6, "finished", None, {3: ("ValueError: no codec",)})
    assert from_json(json.loads(json.dumps(as_json(events[-1])))) == events[-1]


def test_whoever_takes_events_while_videos_are_generated_is_not_without_gradients(folder) -> None:
    with api.run(folder.write(more=folder.validation())) as session:
        assert all(is_grad_enabled() for event in session if isinstance(event, Generating))


@pytest.mark.parametrize("way", ["call", "control file"])
def test_a_stop_that_is_asked_for_while_the_caches_fill_ends_before_anything_is_loaded(folder, way: str) -> None:
    events = []
    with api.run(folder.write()) as session:
        for event in session:
            events.append(event)
            if isinstance(event, Filled):
                if way == "call":
                    session.ask("stop")
                else:
                    (folder.output / "control").write_text("stop")
    assert end(events) == Ended(0, 6, "stopped")
    assert not any(isinstance(event, Started) for event in events)


def test_signals_are_for_the_main_thread(folder) -> None:
    config = folder.write()
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="main thread only"):
        pool.submit(lambda: api.run(config, signals=True).__enter__()).result()
