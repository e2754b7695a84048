"""Two processes on one machine train as one process with twice the accumulation."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest
import torch

from vtrain import api
from vtrain.contract import ConfigError, Device, DeviceError
from vtrain.train import checkpoint
from vtrain.train.processes import _launcher
from vtrain.validate.videos import read_frames

Run = Callable[..., subprocess.CompletedProcess[str]]

IMAGE_TO_VIDEO = "\n[data.video]\nimage_to_video = 0.5\n"
TOLERANCE = 1e-6
"""Gradients are summed in another order (all-reduce), so fp32 rounding differs. Measured over these eight steps: losses 5.1e-8
relative, weights 4.5e-8 absolute at most."""


@pytest.mark.parametrize(
    ("train", "more"),
    [
        pytest.param("full", IMAGE_TO_VIDEO, id="full", marks=pytest.mark.long),
        pytest.param("lora", "", id="lora", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_curve_of_one_with_twice_the_accumulation(
    folder, another, vtrain: Run, within: Run, train: str, more: str
) -> None:
    """Full training starts half of its draws from a clean first frame; the adapter, which is slow, none."""
    settings = {"train": train, "more": more, "steps": 8, "save": 4, "batch_size": 1, "lr": 1e-3}
    one = another()
    within("run", one.write(accumulate=4, **settings))
    done = vtrain("run", folder.write(accumulate=2, **settings), processes=2)
    assert done.stdout.count("saved") == 2, done.stdout
    got, expected = folder.rows(), one.rows()
    for a, b in zip(got, expected, strict=True):
        assert a["samples"] == b["samples"]
        assert a["sigmas"] == b["sigmas"]
        assert a["lr"] == b["lr"]
        assert a["loss"] == pytest.approx(b["loss"], rel=TOLERANCE)
    from_an_image = sum(isinstance(sigma, list) for row in expected for sigma in row["sigmas"])
    assert 0 < from_an_image < 32 if more else from_an_image == 0
    left, right = folder.tensors(8), one.tensors(8)
    assert left.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=0, atol=TOLERANCE)


@pytest.mark.long
def test_a_typo_is_said_once_by_the_processes_of_a_machine(folder, start) -> None:
    of_two(folder)
    folder.config.write_text(folder.config.read_text().replace("log_every", "log_evry"))
    running = start("run", folder.config)
    printed = running.communicate(timeout=60)[0]
    assert running.returncode == 2
    assert printed.count("unknown key train.log_evry") == 1


def test_an_error_of_the_users_is_told_once_by_two_processes(folder, vtrain: Run) -> None:
    folder.write(batch_size=50)
    done = vtrain("run", folder.config, processes=2, check=None)
    assert done.returncode != 0
    assert done.stderr.count("one step takes batch_size 50") == 1


SHARD = "\n[parallel]\nshard = true\n"


SMOOTH = '\n[[regularizer]]\nuse = "toy-smooth"\nblock = 1\n'
FREE = {'"adamw"': '"schedulefree-adamw"', '"cosine"': '"constant"'}
INT8 = {'mixed = "no"': 'mixed = "no"\nbase = "int8"'}


@pytest.mark.parametrize(
    ("train", "more", "changes"),
    [
        pytest.param("lora", "", {}, id="lora", marks=pytest.mark.long),
        pytest.param("full", SMOOTH, {}, id="full with a regularizer", marks=pytest.mark.slow),
        pytest.param("lora", "", FREE, id="schedule-free", marks=pytest.mark.slow),
        pytest.param("lora", "", INT8, id="lora on int8", marks=pytest.mark.slow),
    ],
)
def test_sharded_processes_give_the_curve_of_one(
    folder, another, vtrain: Run, within: Run, train: str, more: str, changes: dict[str, str]
) -> None:
    """Slow, but for one: each starts two processes that import torch."""
    settings = {"train": train, "steps": 8, "save": 4, "batch_size": 1, "lr": 1e-3}
    one = another()
    for each, more_of in ((one, more), (folder, more + SHARD)):
        text = each.write(accumulate=4 if each is one else 2, more=more_of, **settings).read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        each.config.write_text(text)
    within("run", one.config)
    done = vtrain("run", folder.config, processes=2)
    assert done.stdout.count("saved") == 2, done.stdout
    for a, b in zip(folder.rows(), one.rows(), strict=True):
        assert a["samples"] == b["samples"]
        assert a["loss"] == pytest.approx(b["loss"], rel=TOLERANCE)
        assert a["grad_norm"] == (b["grad_norm"] and pytest.approx(b["grad_norm"], rel=1e-5))
    left, right = folder.tensors(8), one.tensors(8)
    assert left.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_sharded_processes_average_validate_and_are_resumed_by_any_number(
    folder, another, vtrain: Run, within: Run
) -> None:
    """Slow: two runs of two processes and two of one. Three prompts, so that one process solves one that nobody keeps."""
    more = folder.validation(one="gradient", two="another", three="a third")
    more += '\n[ema]\ndecay = 0.5\nvalidation = "both"\n'
    settings = {"steps": 6, "save": 3, "batch_size": 1, "lr": 1e-3, "more": more}
    one = another()
    within("run", one.write(accumulate=2, **settings))
    done = vtrain("run", folder.write(accumulate=1, **settings | {"more": more + SHARD}), processes=2)
    assert "failed" not in done.stdout
    left, right = folder.tensors(6), one.tensors(6)
    assert left.keys() == right.keys()
    assert any("ema" in name for name in left)
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=0, atol=TOLERANCE)
    for video in sorted((one.output / "samples").rglob("*.mp4")):
        ours = np.stack(read_frames(folder.output / "samples" / video.relative_to(one.output / "samples")))
        assert np.abs(ours.astype(float) - np.stack(read_frames(video))).mean() < 0.5, "of 255"
    resumed = another()
    shutil.copytree(folder.output / "checkpoints" / "step-000003", resumed.output / "checkpoints" / "step-000003")
    printed = within("run", resumed.write(accumulate=2, **settings)).stdout
    assert "changed since the checkpoint: parallel.shard: true -> false" in printed
    for name, value in resumed.tensors(6).items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=TOLERANCE)
    again = another()
    shutil.copytree(one.output / "checkpoints" / "step-000003", again.output / "checkpoints" / "step-000003")
    vtrain("run", again.write(accumulate=1, **settings | {"more": more + SHARD}), processes=2)
    for name, value in again.tensors(6).items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [((4, ""), (2, SHARD)), ((1, ""), (4, SHARD)), ((4, SHARD), (1, ""))],
    ids=["4 to 2 with shares", "1 to 4 with shares", "4 with shares to 1"],
)
def test_another_number_of_processes_takes_the_run_on_to_the_same_curve(
    folder, another, vtrain: Run, within: Run, first: tuple[int, str], then: tuple[int, str]
) -> None:
    """Slow: runs of four processes. A step has four samples; some weights have fewer rows than processes."""
    settings = {"save": 4, "steps": 8, "batch_size": 1, "lr": 1e-3}
    one = another()
    within("run", one.write(accumulate=4, **settings))
    for count, shard in (first, then):
        config = folder.write(accumulate=4 // count, more=shard, **settings)
        done = within("run", config) if count == 1 else vtrain("run", config, processes=count)
        if (count, shard) == first:  # as it was killed after its fourth step
            shutil.rmtree(folder.output / "checkpoints" / "step-000008")
    assert "step-000004" in done.stdout, done.stdout
    for a, b in zip(folder.rows(), one.rows(), strict=True):
        assert a["samples"] == b["samples"]
        assert a["loss"] == pytest.approx(b["loss"], rel=TOLERANCE)
    left, right = folder.tensors(8), one.tensors(8)
    assert left.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=0, atol=TOLERANCE)


def training(folder, start) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A command that has started two processes, at their second step, and these."""
    of_two(folder, steps=3000, save=1000, batch_size=1, log_every=1)
    running = start("run", folder.config)
    for line in running.stdout:
        if line.startswith("step 2/"):
            break
    children = psutil.Process(running.pid).children()
    assert len(children) == 2
    return running, children


def of_two(folder, **values) -> None:
    """A file that asks for two processes itself."""
    text = folder.write(**values).read_text(encoding="utf-8")
    folder.config.write_text(text.replace('output_dir = "out"', 'output_dir = "out"\nprocesses = 2'), encoding="utf-8")


@pytest.mark.long
def test_the_file_starts_its_processes_and_ctrl_c_saves_in_all(folder, start) -> None:
    running, _ = training(folder, start)
    running.send_signal(signal.SIGINT)
    rest = running.communicate(timeout=60)[0]
    assert running.returncode == 130, rest
    assert "saved" in rest
    assert "Traceback" not in rest
    (done,) = (folder.output / "checkpoints").glob("step-*")
    step = int(done.name.removeprefix("step-"))
    assert folder.rows()[-1]["step"] == step
    assert len(folder.rows()[-1]["samples"]) == 2


@pytest.mark.long
def test_a_process_that_is_killed_ends_all_with_its_own_message_alone(folder, start) -> None:
    running, children = training(folder, start)
    children[1].kill()
    began = time.monotonic()
    rest = running.communicate(timeout=60)[0]
    assert time.monotonic() - began < 30
    assert running.returncode == 137, rest
    assert "of 2 was killed by SIGKILL" in rest
    assert "Traceback" not in rest
    assert not psutil.pid_exists(children[0].pid)


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_end(folder, start) -> None:
    """Slow: two processes import torch."""
    running, children = training(folder, start)
    running.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    newest, faults = checkpoint.latest(folder.output / "checkpoints")
    assert newest is not None
    assert faults == []
    assert len(folder.rows()) == int(newest.name.removeprefix("step-"))


@pytest.mark.slow
def test_a_port_in_use_is_said_once_with_what_to_do(folder, start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow: two processes import torch."""
    of_two(folder)
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        running = start("run", folder.config)
        printed = running.communicate(timeout=60)[0]
    assert running.returncode == 2, printed
    assert printed.count(f"port {port} of this machine (MASTER_PORT), where the processes are to meet, is in use.") == 1
    assert "unset MASTER_PORT" in printed
    assert "Traceback" not in printed


def test_torchrun_on_several_machines_with_one_store_is_warned_of_and_starts_nothing_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On one machine vtrain keeps each start apart; `vtrain launch` writes files in which torchrun does."""
    given = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in {**given, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    (said,) = _launcher(Device())
    assert said.endswith("Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(DeviceError, match="may wait for them for ever"):
        list(_launcher(Device()))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert not list(_launcher(Device()))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not list(_launcher(Device()))


def test_a_program_of_ones_own_is_told_that_it_is_one_process(folder) -> None:
    of_two(folder)
    with pytest.raises(ConfigError, match=r"run\.processes is 2, and this is one process"), api.run(folder.config):
        pass
