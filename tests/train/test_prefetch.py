"""Micro-batches are made ahead of the step: how many, by whom, and what becomes of them when the run ends early."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import pytest
import torch

from vtrain.contract import DataError, Device, DeviceError, Latents, NoiseLevel, PluginError, Problem, Text
from vtrain.data.batches import Batch
from vtrain.train.prefetch import AHEAD, Prefetcher
from vtrain.train.readings import Reading, _longest_wait


class Made:
    """Batches made by a function of their number, which remembers what was asked for, and where."""

    def __init__(self, make: Callable[[int], None] = lambda number: None) -> None:
        self.make, self.asked, self.threads = make, list[int](), set[str]()

    def get(self, number: int, features: object) -> Batch:
        self.asked.append(number)
        self.threads.add(threading.current_thread().name)
        self.make(number)
        text = Text.of(torch.full((1, 8, 4), float(number)), torch.ones(1, 8, dtype=torch.bool))
        return Batch(number, Latents(torch.full((1, 2, 1, 2, 2), float(number))), text, (number,), ("a",), (False,))


class Halves:
    """A sampler whose level is always a half."""

    def draw(self, n: int, generator: torch.Generator) -> NoiseLevel:
        return NoiseLevel(torch.full((n,), 0.5))


class Hundreds:
    """A family whose timesteps go from 7 to 107."""

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return 7 + 100 * sigma


def prefetcher(made: Made, sampler: Halves | None = None) -> Prefetcher:
    return Prefetcher(made, Hundreds(), sampler or Halves(), 1, Device())  # type: ignore[arg-type]


def numbers(count: int) -> Iterator[tuple[int, int]]:
    return ((n, n) for n in range(count))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetcher")]


def until(true: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_batches_are_made_in_one_other_thread_in_order_and_never_further_ahead_than_said() -> None:
    made = Made()
    stream = prefetcher(made).stream(numbers(20))
    for number in range(20):
        fed = next(stream)
        assert fed.micro_batch == number
        assert fed.given.clean.unique().item() == number
        expected = min(20, number + 1 + AHEAD)
        until(lambda expected=expected: len(made.asked) == expected)
        time.sleep(0.002)
        assert len(made.asked) == expected
    assert next(stream, None) is None
    assert made.asked == list(range(20))
    assert made.threads == {"prefetcher_0"}
    assert threads() == []


class Clock:
    """Stands still but where `now` is moved. looked: set whenever the time is asked for."""

    def __init__(self) -> None:
        self.now, self.looked = 0.0, threading.Event()

    def perf_counter(self) -> float:
        self.looked.set()
        return self.now


def test_what_a_step_waits_for_is_measured_and_what_is_ready_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch takes five seconds to make: the first while it is waited for, the next ones while nobody waits."""
    from vtrain.train import prefetch as module

    clock, go = Clock(), threading.Event()
    monkeypatch.setattr(module, "time", clock)

    def make(number: int) -> None:
        assert (go if number else clock.looked).wait(60)
        clock.now += 5

    made = Made(make)
    stream = prefetcher(made).stream(numbers(AHEAD + 1))
    assert next(stream).waited == 5
    go.set()
    until(lambda: clock.now == 5 * (AHEAD + 1))
    assert [next(stream).waited for _ in range(AHEAD)] == [0] * AHEAD


def test_an_error_in_the_background_is_raised_at_its_turn_in_its_own_words() -> None:
    def fail(number: int) -> None:
        if number == 2:
            raise DataError(Problem("cache/x", "the cache entry is damaged."))

    stream = prefetcher(Made(fail)).stream(numbers(9))
    assert [next(stream).micro_batch, next(stream).micro_batch] == [0, 1]
    with pytest.raises(DataError, match="cache/x: the cache entry is damaged"):
        next(stream)
    assert threads() == []


def test_a_card_that_cannot_be_used_in_the_background_is_that_error_and_no_broken_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch.cuda.set_device refuses "cuda" without a number; an initializer's error comes out as BrokenThreadPool."""

    def refuse(self: Device) -> None:
        raise DeviceError(Problem("cuda:0", "the card cannot be opened: it is busy."))

    monkeypatch.setattr(Device, "use", refuse)
    with pytest.raises(DeviceError, match="cuda:0: the card cannot be opened: it is busy"):
        next(prefetcher(Made()).stream(numbers(3)))
    assert threads() == []


def test_a_bug_in_the_background_keeps_its_traceback_and_names_the_micro_batch_and_its_samples() -> None:
    class Broken(Halves):
        def draw(self, n: int, generator: torch.Generator) -> NoiseLevel:
            raise ZeroDivisionError("a plugin's")

    stream = prefetcher(Made(), Broken()).stream(numbers(3))
    with pytest.raises(ZeroDivisionError, match="a plugin's") as raised:
        next(stream)
    assert raised.value.__notes__ == ["in the prefetcher, micro-batch 0 of a"]
    assert any(frame.name == "draw" for frame in traceback.extract_tb(raised.value.__traceback__))
    assert threads() == []


def test_a_plugin_that_wants_to_end_the_process_from_the_background_does_not_end_it_without_a_word() -> None:
    def leave(number: int) -> None:
        sys.exit(0)

    with pytest.raises(RuntimeError, match=r"SystemExit \(0\) was raised in the prefetcher, reading micro-batch 0"):
        next(prefetcher(Made(leave)).stream(numbers(3)))
    assert threads() == []


def test_timesteps_are_the_familys_where_the_sampler_gives_none_and_else_the_samplers() -> None:
    class Own(Halves):
        def draw(self, n: int, generator: torch.Generator) -> NoiseLevel:
            return NoiseLevel(torch.full((n,), 0.5), torch.full((n,), 3.0))

    assert prefetcher(Made()).prepare(0, 0).given.level.timestep.tolist() == [57]
    own = Prefetcher(Made(), Hundreds(), Own(), 1, Device(), timesteps_of="hundreds")  # type: ignore[arg-type]
    assert own.prepare(0, 0).given.level.timestep.tolist() == [3]
    with pytest.raises(PluginError, match="its draw gave timesteps, and its spec names no family"):
        prefetcher(Made(), Own()).prepare(0, 0)


def test_masks_features_and_frames_reach_the_step_and_only_what_it_needs_is_read() -> None:
    asked = []

    class Columns(Made):
        def get(self, number: int, features: Collection[str]) -> Batch:
            asked.append((number, list(features)))
            plain = super().get(number, features)
            frames = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 1, 2).expand(1, 3, 1, 1, 2)
            return replace(plain, mask=torch.ones(1, 1, 2, 2) / 2, features={"a": torch.ones(1, 2)}, frames=frames)

    steps = Prefetcher(Columns(), Hundreds(), Halves(), 1, Device(), lambda step: ["a"] if step < 5 else [])  # type: ignore[arg-type]
    fed = steps.prepare(0, 4).given
    assert fed.mask is not None
    assert fed.mask.unique().tolist() == [0.5]
    assert fed.features["a"].shape == (1, 2)
    assert fed.frames is not None
    assert fed.frames.dtype == torch.uint8  # while they wait, a quarter of what they are as floats
    assert fed.frames[0, 0, 0, 0].tolist() == [0, 255]
    steps.prepare(1, 5)
    assert asked == [(0, ["a"]), (1, [])]


def test_closing_leaves_no_thread_and_begins_nothing_new() -> None:
    go = threading.Event()

    def block(number: int) -> None:
        if number == 2:
            assert go.wait(60)

    made = Made(block)
    stream = prefetcher(made).stream(numbers(100))
    next(stream)
    until(lambda: made.asked == [0, 1, 2])
    threading.Timer(0.1, go.set).start()
    stream.close()
    assert made.asked == [0, 1, 2]
    assert threads() == []


def test_a_keyboard_interrupt_while_waiting_leaves_no_thread(monkeypatch) -> None:
    from vtrain.train import prefetch as module

    def interrupted(future: object) -> None:
        raise KeyboardInterrupt

    stream = prefetcher(Made()).stream(numbers(100))
    next(stream)
    monkeypatch.setattr(module, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert threads() == []


def test_the_wait_of_a_step_is_that_of_its_slowest_process() -> None:
    parts = [
        Reading(1, micro_batch, 0.0, [0.0], {}, [0.5], ("a",), waited)
        for micro_batch, waited in [(0, 0.1), (1, 0.4), (2, 0.2), (3, 0.05)]
    ]
    assert _longest_wait(parts, 1) == pytest.approx(0.75)
    assert _longest_wait(parts, 2) == pytest.approx(0.45)
