"""An optimizer's state goes to disk and back bit for bit, and never through pickle."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from vtrain.contract import CheckpointError
from vtrain.train.optimizer_state import SCALARS, TENSORS, load_optimizer, save_optimizer


def model(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "fused", "sgd", "rprop"])
def test_a_resumed_optimizer_takes_the_same_steps(tmp_path: Path, kind: str) -> None:
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
        "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    }[kind]
    straight, first, second = model(), model(), model()
    train(straight, make(straight.parameters()), 6)
    optimizer = make(first.parameters())
    train(first, optimizer, 3)
    save_optimizer(tmp_path, optimizer, list(first.named_parameters()))
    second.load_state_dict(first.state_dict())
    resumed = make(second.parameters())
    load_optimizer(tmp_path, resumed, list(second.named_parameters()))
    train(second, resumed, 3, first=3)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_settings_come_from_the_file_and_not_from_the_checkpoint(tmp_path: Path) -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    train(module, optimizer, 1)
    save_optimizer(tmp_path, optimizer, list(module.named_parameters()))
    other = torch.optim.AdamW(module.parameters(), lr=0.5, weight_decay=0.3)
    load_optimizer(tmp_path, other, list(module.named_parameters()))
    assert other.param_groups[0]["lr"] == 0.5
    assert other.param_groups[0]["weight_decay"] == 0.3


def test_state_of_another_shape_or_other_names_is_refused(tmp_path: Path) -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    train(module, optimizer, 1)
    save_optimizer(tmp_path, optimizer, list(module.named_parameters()))
    wider = model(width=9)
    with pytest.raises(CheckpointError, match="other parameters"):
        load_optimizer(tmp_path, torch.optim.AdamW(wider.parameters(), lr=0.1), list(wider.named_parameters()))
    renamed = [(f"other.{name}", p) for name, p in module.named_parameters()]
    with pytest.raises(CheckpointError, match="other parameters"):
        load_optimizer(tmp_path, optimizer, renamed)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("pwned"),))  # type: ignore[return-value]


def test_a_planted_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = model()
    named = list(module.named_parameters())
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    train(module, optimizer, 1)
    save_optimizer(tmp_path, optimizer, named)
    for victim in (TENSORS, SCALARS):
        good = (tmp_path / victim).read_bytes()
        (tmp_path / victim).write_bytes(pickle.dumps(Hostile()))
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_optimizer(tmp_path, optimizer, named)
        assert not (tmp_path / "pwned").exists()
        (tmp_path / victim).write_bytes(good)
    load_optimizer(tmp_path, optimizer, named)
    pickle.loads(pickle.dumps(Hostile()))  # noqa: S301 - shows that the planted pickle would have acted
    assert (tmp_path / "pwned").exists()
