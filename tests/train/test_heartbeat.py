"""Processes that wait for each other: as long as the others are slow, and no longer than they are there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from torch import distributed as dist

from vtrain.contract import TrainingError
from vtrain.train.heartbeat import LOOK, SILENCE, Heartbeat

PROGRAM = """
import os, signal, sys, time
from vtrain.train import heartbeat
heartbeat.BEAT, heartbeat.LOOK, heartbeat.SILENCE = 0.1, 0.2, 2.0
from vtrain.contract import TrainingError
from vtrain.train.processes import Processes
processes = Processes("no")
began = time.monotonic()
print(processes.from_first(lambda: time.sleep(5) or "slow"), flush=True)
if not processes.first:
    os.kill(os.getpid(), signal.{end})
try:
    processes.gathered([1])
except TrainingError as error:
    print(error.problems[0], flush=True)
except RuntimeError as error:
    print(processes.lost(error).problems[0], flush=True)
os._exit(3)
"""


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Heartbeat]]:
    """Two processes' heartbeats in this one, the second of which gives no signs by itself."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    both = [Heartbeat(store, rank, 2) for rank in range(2)]
    both[1].stop()
    yield both
    both[0].stop()


def test_one_that_gives_signs_is_waited_for_and_one_that_gives_none_is_gone(two: list[Heartbeat]) -> None:
    waiting, other = two
    waiting.begin()
    turns = int(SILENCE / LOOK)
    for turn in range(10 * turns):
        other.sign(turn)
        waiting.look(1000 + turn * LOOK)
    for turn in range(10 * turns, 11 * turns - 1):
        waiting.look(1000 + turn * LOOK)
    with pytest.raises(TrainingError, match=r"process 2 \(.+\) has given no sign of life for 120 s"):
        waiting.look(1000 + (11 * turns - 1) * LOOK)


def test_one_that_was_stopped_itself_gives_the_others_their_time_again(two: list[Heartbeat]) -> None:
    """As Ctrl-Z stops all processes of a terminal."""
    waiting, _ = two
    waiting.begin()
    waiting.look(1000)
    waiting.look(1000 + 50 * SILENCE)
    waiting.look(1000 + 50 * SILENCE + LOOK)


def test_the_end_of_who_keeps_the_list_of_all_is_told(two: list[Heartbeat], monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, _ = two

    def broken(keys: list[str]) -> Any:
        raise dist.DistNetworkError("failed to recv, got 0 bytes\nC++ CapturedTraceback:")

    monkeypatch.setattr(
        waiting, "_look", type("Store", (), {"set_timeout": lambda *_: None, "multi_get": staticmethod(broken)})
    )
    with pytest.raises(TrainingError, match=r"cannot be reached any more \(failed to recv, got 0 bytes\)"):
        waiting.look(1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "said"),
    [
        (
            "SIGSTOP",
            "process 2 (",
        ),
        ("SIGKILL", "another process of this run has ended"),
    ],
)
def test_a_slow_process_is_waited_for_and_a_stopped_one_and_a_killed_one_are_not(end: str, said: str) -> None:
    """The first takes longer than the silence that ends a wait; then the second ends, or stops as a machine without power does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.replace("{end}", end)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        printed, _ = children[0].communicate(timeout=120)
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert children[0].returncode == 3
    assert printed.startswith("slow\n")
    assert said in printed
    assert "Start the command again: it resumes from the newest checkpoint." in printed
