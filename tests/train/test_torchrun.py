"""Runs under torchrun, started by the file that `vtrain launch torchrun` writes: signals, a process that dies, two nodes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import psutil
import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]
STEPS = 120
SETTINGS = {"steps": STEPS, "save": 10, "batch_size": 1, "accumulate": 2, "log_every": 1}
TOLERANCE = 1e-6
"""As tests/train/test_processes.py has it: gradients are summed in another order."""

pytestmark = pytest.mark.slow


@pytest.fixture
def launched(within: Run) -> Iterator[Start]:
    """Write the file, start it by `before`, and return; what still runs at the end of the test is killed."""
    running: list[subprocess.Popen[str]] = []

    def begin(
        config: Path, *options: str, before: tuple[str, ...] = (), leave: str = "", **variables: str
    ) -> subprocess.Popen[str]:
        """leave: a line of the script that is not run."""
        script = config.with_suffix(".sh")
        text = within("launch", "torchrun", config, *options).stdout
        assert f"{leave}\n" in text
        script.write_text(text.replace(f"{leave}\n", "\n"), encoding="utf-8")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        process = subprocess.Popen(
            [*before, "sh", str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": path, **variables},
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate()


def until(running: subprocess.Popen[str], words: str) -> list[str]:
    """Its lines up to the first with these, within two minutes."""
    lines = []
    late = Timer(120, running.kill)
    late.start()
    try:
        for line in running.stdout or ():
            lines.append(line)
            if words in line:
                return lines
    finally:
        late.cancel()
    raise AssertionError("".join(lines))


def same(folder: Any, straight: Any) -> None:
    """No step twice, none missing, and the numbers of the run that was never interrupted."""
    rows = folder.rows()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for one, other in zip(rows, straight.rows(), strict=True):
        assert one["samples"] == other["samples"]
        assert one["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)


@pytest.fixture
def straight(another: Callable[[], Any], within: Run) -> Any:
    """The same run, by one process with as many samples a step."""
    one = another()
    within("run", one.write(**{**SETTINGS, "accumulate": 4}))
    return one


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_passes_a_signal_on_and_the_same_command_resumes(
    folder: Any, straight: Any, launched: Start, number: int
) -> None:
    config = folder.write(**SETTINGS)
    running = launched(config, "--processes-per-node", "2")
    until(running, "step 12/")
    running.send_signal(number)
    began = time.monotonic()
    rest = running.communicate(timeout=60)[0]
    assert time.monotonic() - began < 30
    assert running.returncode, rest
    assert "stopping; what is done will be saved (a step takes " in rest
    assert " the last checkpoint took " in rest
    assert "stopped as asked" in rest
    again = launched(config, "--processes-per-node", "2")
    printed = again.communicate(timeout=120)[0]
    assert not again.returncode, printed
    same(folder, straight)


@pytest.mark.parametrize("leave", ["", "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"], ids=["as written", "as it is"])
def test_torchrun_starts_a_run_again_that_lost_a_process_and_its_numbers_are_the_same(
    folder: Any, straight: Any, launched: Start, leave: str
) -> None:
    """torchrun as it is keeps one store for all restarts, in which processes meet those that have died."""
    running = launched(folder.write(**SETTINGS), "--processes-per-node", "2", leave=leave)
    until(running, "step 25/")
    workers = psutil.Process(running.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    began = time.monotonic()
    until(running, "resuming from ")
    assert time.monotonic() - began < 60
    printed = running.communicate(timeout=120)[0]
    assert not running.returncode, printed
    same(folder, straight)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[tuple[str, ...]]]:
    """What starts a command on each of two machines: network namespaces, a cable between them, and their own names."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("`ip` or `unshare` is not installed")
    names = [f"vtrain{os.getpid()}{end}" for end in "ab"]
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n")
    cable = [f"vt{os.getpid() % 100000}{end}" for end in "ab"]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this machine allows no network namespaces: ip {' '.join(words)}: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for number, (name, end) in enumerate(zip(names, cable, strict=True), start=1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            for device in (end, "lo"):
                ip("-n", name, "link", "set", device, "up")
        inner = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        yield [
            (
                "ip",
                "netns",
                "exec",
                name,
                "unshare",
                "--uts",
                "--mount",
                "sh",
                "-c",
                inner,
                "sh",
                f"node{at}",
                str(hosts),
            )
            for at, name in enumerate(names, start=1)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_nodes_train_as_one_process_does(
    folder: Any, straight: Any, launched: Start, nodes: list[tuple[str, ...]]
) -> None:
    config = folder.write(**SETTINGS)
    both = [launched(config, "--nodes", "2", before=node, HOST="node1") for node in nodes]
    printed = [each.communicate(timeout=180)[0] for each in both]
    assert not any(each.returncode for each in both), "".join(printed)
    same(folder, straight)


def test_a_node_that_is_asked_to_end_saves_with_the_other_which_goes_on_when_it_is_back(
    folder: Any, straight: Any, launched: Start, nodes: list[tuple[str, ...]]
) -> None:
    """As with a spot instance: one machine gets SIGTERM, is gone, and another comes in its place."""
    config = folder.write(**SETTINGS)
    stays, goes = (launched(config, "--nodes", "2", before=node, HOST="node1") for node in nodes)
    end = time.monotonic() + 120
    while not (folder.output / "metrics.jsonl").exists() or len(folder.rows()) < 12:
        assert time.monotonic() < end
        time.sleep(0.05)
    goes.send_signal(signal.SIGTERM)
    goes.communicate(timeout=60)
    back = launched(config, "--nodes", "2", before=nodes[1], HOST="node1")
    printed = stays.communicate(timeout=180)[0]
    assert not stays.returncode, printed
    assert not back.wait(60)
    same(folder, straight)
