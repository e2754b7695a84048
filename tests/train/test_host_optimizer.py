"""offload.optimizer: the step made in the machine's memory is the step made on the card, bit for bit."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtrain.contract import Device, ParameterGroup
from vtrain.train.host_optimizer import HostWeights
from vtrain_builtin.adamw import AdamWOptions, build_adamw

Run = Callable[..., subprocess.CompletedProcess[str]]
OFF = "\n[offload]\noptimizer = true\n"
SMOOTH = '\n[[regularizer]]\nuse = "toy-smooth"\nblock = 1\n'


def step(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
    draw = torch.Generator().manual_seed(number)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=draw)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def adamw(named: list[tuple[str, Tensor]]) -> torch.optim.Optimizer:
    return build_adamw(AdamWOptions(lr=1e-2), [ParameterGroup(tuple(named), decay=True)])


@pytest.fixture
def pair() -> Callable[[], list[tuple[str, nn.Parameter]]]:
    def make() -> list[tuple[str, nn.Parameter]]:
        draw = torch.Generator().manual_seed(0)
        return [
            ("a", nn.Parameter(torch.randn(7, 5, generator=draw))),
            ("b", nn.Parameter(torch.randn(3, generator=draw))),
        ]

    return make


def test_steps_on_copies_move_the_parameters_as_steps_on_them(pair: Any) -> None:
    plain, moved = pair(), pair()
    host = HostWeights(moved, Device())
    ours, theirs = adamw(host.named), adamw(plain)
    host.step_here(ours)
    for number in range(4):
        step([weight for _, weight in plain], theirs, number)
        step([weight for _, weight in moved], ours, number)
        assert all(weight.grad is None for _, weight in moved), "a gradient stayed on the device"
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(plain, moved, strict=True))
    for (_, weight), (_, copy) in zip(plain, host.named, strict=True):
        assert torch.equal(theirs.state[weight]["exp_avg"], ours.state[copy]["exp_avg"])
    assert not any(a.data_ptr() == b.data_ptr() for (_, a), (_, b) in zip(moved, host.named, strict=True))


def test_a_parameter_without_a_gradient_stays(pair: Any) -> None:
    moved = pair()
    host = HostWeights(moved, Device())
    optimizer = adamw(host.named)
    host.step_here(optimizer)
    step([weight for _, weight in moved], optimizer, 0)
    before = moved[1][1].detach().clone()
    step([moved[0][1]], optimizer, 1)
    assert torch.equal(moved[1][1], before)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_run_with_states_in_the_machines_memory_is_the_run_without(
    folder, another, within: Run, card_in_ram: Any, train: str
) -> None:
    within("run", folder.write(SMOOTH, train=train, accumulate=2))
    other = another()
    pinned = card_in_ram.pinned
    within("run", other.write(SMOOTH + OFF, train=train, accumulate=2))
    assert card_in_ram.pinned > pinned
    assert other.rows() == folder.rows()
    ours, theirs = other.tensors(6), folder.tensors(6)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("first", "second"), [(OFF, OFF), ("", OFF), (OFF, "")], ids=["with", "from now on", "no more"]
)
def test_a_resumed_run_may_put_them_there_and_take_them_back(
    folder, another, within: Run, card_in_ram: Any, first: str, second: str
) -> None:
    """The copies are made of the checkpoint's weights."""
    within("run", folder.write(SMOOTH))
    other = another()
    within("run", other.write(SMOOTH + first))
    last = other.output / "checkpoints" / "step-000006"
    last.rename(other.path / "aside")
    printed = within("run", other.write(SMOOTH + second)).stdout
    assert "step-000003 (step 3)" in printed
    assert "offload" not in printed.partition("resuming")[2], "it changes no number"
    ours, theirs = other.tensors(6), folder.tensors(6)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_gradients_are_clipped_and_checked_before_they_leave(folder, another, within: Run, card_in_ram: Any) -> None:
    other = another()
    for config in (folder.write(), other.write(OFF)):
        clip = "log_every = 2\ngradient_clip = { max = 0.01 }"
        config.write_text(config.read_text().replace("log_every = 2", clip))
        within("run", config)
    assert other.rows() == folder.rows()


def test_on_a_cpu_nothing_is_copied_and_that_is_said(folder, within: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtrain.train.assemble.HostWeights", None)
    printed = " ".join(within("run", folder.write(OFF, steps=2)).stdout.split())
    assert "offload.optimizer changes nothing on a CPU" in printed
