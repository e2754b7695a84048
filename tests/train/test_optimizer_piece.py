"""An optimizer's state goes to disk and back bit for bit, and never through pickle."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vtrain.contract import CheckpointError, ParameterGroup, PluginError
from vtrain.train.optimizer_piece import SCALARS, TENSORS, OptimizerPiece
from vtrain_builtin.plugin import vtrain_optimizers


def save_optimizer(folder: Path, *of: object, **more: object) -> None:
    piece = OptimizerPiece(*of, **more)  # type: ignore[arg-type]
    piece.write(folder, piece.gather(keep=True))


def load_optimizer(folder: Path, *of: object, **more: object) -> None:
    OptimizerPiece(*of, **more).load(folder)  # type: ignore[arg-type]


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
    load_optimizer(tmp_path, other, list(module.named_parameters()), own={"lr", "weight_decay", "eps"})
    assert other.param_groups[0]["lr"] == 0.5
    assert other.param_groups[0]["weight_decay"] == 0.3


class Counting(torch.optim.SGD):
    """Keeps a count in its groups, as schedule-free optimizers do."""

    def step(self, closure: object = None) -> None:
        super().step()
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1


def test_a_count_that_an_optimizer_keeps_in_its_groups_goes_on(tmp_path: Path) -> None:
    module = model()
    optimizer = Counting(module.parameters(), lr=0.1)
    piece = OptimizerPiece(optimizer, list(module.named_parameters()), own={"momentum"})
    train(module, optimizer, 3)
    piece.write(tmp_path, piece.gather(keep=True))
    again = Counting(module.parameters(), lr=0.2, momentum=0.5)
    load_optimizer(tmp_path, again, list(module.named_parameters()), own={"momentum"})
    assert again.param_groups[0]["k"] == 3
    assert (again.param_groups[0]["lr"], again.param_groups[0]["momentum"]) == (0.2, 0.5)


class Turning(torch.optim.SGD):
    """Keeps a flag and a tensor in its groups, as torch-optimi does, and settings of its own names."""

    def __init__(self, parameters: Any, lr: float, friction: float) -> None:
        super().__init__(parameters, lr=lr)
        for group in self.param_groups:
            group |= {"started": False, "friction": friction}

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            if not group["started"]:
                group["started"], group["turn"] = True, torch.tensor(0, dtype=torch.int32)
            group["turn"] += 1
        super().step()


def test_flags_and_tensors_of_groups_go_on_and_settings_are_those_of_the_file(tmp_path: Path) -> None:
    module = model()
    optimizer = Turning(module.parameters(), lr=0.1, friction=0.5)
    piece = OptimizerPiece(optimizer, list(module.named_parameters()))
    train(module, optimizer, 3)
    piece.write(tmp_path, piece.gather(keep=True))
    assert json.loads((tmp_path / SCALARS).read_text(encoding="utf-8"))["groups"] == [{"started": True}]
    again = Turning(module.parameters(), lr=0.1, friction=0.25)
    resumed = OptimizerPiece(again, list(module.named_parameters()))
    resumed.load(tmp_path)
    train(module, again, 2)
    assert (int(again.param_groups[0]["turn"]), again.param_groups[0]["friction"]) == (5, 0.25)
    resumed.write(tmp_path, resumed.gather(keep=True))  # also a second time, of a run that was itself resumed
    third = Turning(module.parameters(), lr=0.1, friction=0.25)
    OptimizerPiece(third, list(module.named_parameters())).load(tmp_path)
    assert third.param_groups[0]["turn"].dtype == torch.int32
    assert int(third.param_groups[0]["turn"]) == 5


def test_a_parameter_that_never_got_a_gradient_has_no_state_and_that_is_fine(tmp_path: Path) -> None:
    module = model()
    module.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    train(module, optimizer, 2)
    named = list(module.named_parameters())
    save_optimizer(tmp_path, optimizer, named)
    again = torch.optim.AdamW(module.parameters(), lr=0.1)
    load_optimizer(tmp_path, again, named)
    assert len(again.state) == len(optimizer.state)


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


STATES = [
    ("adamw8bit", {"lr": 1e-3}),
    ("prodigy", {"lr": 1.0, "slice_p": 4}),
    ("optimi-sgd", {"lr": 1e-3}),
]
"""Optimizers that keep of a vector, such as SANA's conv_inverted.bias of 13,440 numbers, vectors of other lengths too; and one that
does not."""


@pytest.mark.parametrize(("use", "options"), STATES, ids=[use for use, _ in STATES])
def test_what_is_kept_of_a_long_bias_comes_back_and_that_of_a_longer_one_is_refused(
    tmp_path: Path, use: str, options: dict[str, Any]
) -> None:
    spec = {spec.name: spec for spec in vtrain_optimizers()}[use]
    pytest.importorskip(spec.library[0])

    def made(length: int = 13_440) -> tuple[nn.Module, torch.optim.Optimizer, OptimizerPiece]:
        module = nn.Sequential(nn.Linear(4, length), nn.Linear(length, 2))
        named = list(module.named_parameters())
        with torch.no_grad():
            for number, (_, weight) in enumerate(named):
                weight.copy_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
        optimizer = spec.build(spec.options.model_validate(options), [ParameterGroup(tuple(named), decay=True)])
        return module, optimizer, OptimizerPiece(optimizer, named, own=spec.options.model_fields)

    (straight, optimizer, piece), (resumed, again, kept), (_, _, longer) = made(), made(), made(13_443)
    train(straight, optimizer, 3)
    piece.write(tmp_path, piece.gather(keep=True))
    resumed.load_state_dict(straight.state_dict())
    kept.load(tmp_path)
    train(straight, optimizer, 3, first=3)
    train(resumed, again, 3, first=3)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(CheckpointError, match=r"other parameters \(0\.weight, 0\.bias, 1\.weight\)"):
        longer.load(tmp_path)


def test_rows_and_columns_of_a_matrix_come_back(tmp_path: Path) -> None:
    """Adafactor's: (rows, 1) and (1, columns)."""
    straight, resumed = model(), model()
    optimizer, again = (torch.optim.Adafactor(module.parameters(), lr=0.1) for module in (straight, resumed))
    train(straight, optimizer, 3)
    save_optimizer(tmp_path, optimizer, list(straight.named_parameters()))
    resumed.load_state_dict(straight.state_dict())
    load_optimizer(tmp_path, again, list(resumed.named_parameters()))
    train(straight, optimizer, 3, first=3)
    train(resumed, again, 3, first=3)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda stored: stored.update(groups=5), '"groups" is no list of tables'),
        (lambda stored: stored.update(groups=[[1]]), '"groups" is no list of tables'),
        (lambda stored: stored.update(state=[]), '"state" is no table'),
        (lambda stored: stored["groups"][0].update(k=float("nan")), r"groups\[0\]\.k is NaN, which is no number"),
        (lambda stored: stored["groups"][0].update(k=True), r"groups\[0\]\.k is true, which is no number"),
        (lambda stored: stored["groups"][0].update(betas=3), r"groups\[0\]\.betas is 3, and it is no count"),
        (lambda stored: stored["groups"][0].update(params=3), r"groups\[0\]\.params is 3, and it is no count"),
        (
            lambda stored: stored["state"].update({"0.bias::step": -2}),
            "0.bias::step is -2, which is no number of steps",
        ),
        (lambda stored: stored["state"].update({"0.bias::step": "x"}), '0.bias::step is "x", which is no number'),
        (lambda stored: stored["state"].update({"0.bias::d": float("nan")}), "0.bias::d is not a number"),
    ],
)
def test_numbers_that_an_optimizer_cannot_have_kept_are_refused(tmp_path: Path, change: Any, told: str) -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    train(module, optimizer, 1)
    save_optimizer(tmp_path, optimizer, list(module.named_parameters()))
    stored = json.loads((tmp_path / SCALARS).read_text(encoding="utf-8"))
    change(stored)
    (tmp_path / SCALARS).write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"optimizer\.json: .*{told}"):
        load_optimizer(tmp_path, optimizer, list(module.named_parameters()))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_learning_rate_in_a_checkpoint_is_not_taken(tmp_path: Path) -> None:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    save_optimizer(tmp_path, optimizer, list(module.named_parameters()))
    stored = json.loads((tmp_path / SCALARS).read_text(encoding="utf-8"))
    stored["groups"][0] |= {"lr": 9.0, "initial_lr": 9.0}
    (tmp_path / SCALARS).write_text(json.dumps(stored), encoding="utf-8")
    load_optimizer(tmp_path, optimizer, list(module.named_parameters()))
    assert optimizer.param_groups[0]["lr"] == 0.1


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


def test_an_optimizer_whose_options_leave_it_without_a_state_is_saved_and_loaded(tmp_path: Path) -> None:
    """SGD keeps a momentum if there is one: its plugin says state_bytes = 4."""
    module = model()
    plain = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.0)
    piece = OptimizerPiece(plain, list(module.named_parameters()), stateful=True)
    piece.check(stepped=False)
    train(module, plain, 1)
    piece.write(tmp_path, piece.gather(keep=True))
    piece.load(tmp_path)
    assert not any(plain.state.values())


class Apart(torch.optim.SGD):
    """Its momentum lies in an attribute, by the parameter."""

    def step(self, closure: object = None) -> None:
        self.kept = {id(p): {"momentum": p.grad.clone()} for group in self.param_groups for p in group["params"]}
        super().step()


def test_a_state_in_an_attribute_is_found_where_its_plugin_says_that_there_is_one() -> None:
    module = model()
    optimizer = Apart(module.parameters(), lr=0.1)
    train(module, optimizer, 1)
    named = list(module.named_parameters())
    with pytest.raises(PluginError, match=r'brings back: "kept", an attribute with tensors that are shaped like'):
        OptimizerPiece(optimizer, named, stateful=True).check()
    OptimizerPiece(optimizer, named).check()
