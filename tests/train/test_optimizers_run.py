"""Whole runs with each sort of optimizer: resumed bit for bit, in bf16 too; weights for evaluation; statistics; clipping."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vtrain.contract import Event
from vtrain.train.eval_weights import AVERAGED, AveragedPiece, eval_weights
from vtrain.train.optimizer_piece import OptimizerPiece
from vtrain.train.statistics import Statistics
from vtrain.train.step import clip_gradients, gradient_norm
from vtrain.validate.generate import Validation

Run = Callable[..., subprocess.CompletedProcess[str]]
SMOOTH = '\n[[regularizer]]\nuse = "toy-smooth"\nblock = 1\n'
VALIDATION = '\n[validation]\nevery = "3 steps"\nsteps = 2\nsize = "64x64"\n[validation.prompts]\na = "b"\n'


def written(folder: Any, use: str, *, more: str = "", bf16: bool = False, **values: Any) -> Path:
    """The configuration with another optimizer, of bf16 weights if asked."""
    config: Path = folder.write(more=more, **values)
    text = config.read_text(encoding="utf-8").replace('use = "adamw"', f'use = "{use}"')
    config.write_text(text.replace('mixed = "no"', 'mixed = "no"\nbase = "bf16"') if bf16 else text, encoding="utf-8")
    return config


def of_denoiser(name: str) -> bool:
    """Whether a tensor of a checkpoint is a weight of the denoiser."""
    return not name.startswith(("optimizer", "regularizers", AVERAGED))


RESUMED = [
    ("adamw_bf16", True, 1e-3),
    ("optimi-adamw", True, 1e-3),
    ("optimi-lion", True, 1e-4),
    ("optimi-ranger", False, 1e-3),
    ("muon", False, 1e-3),
    ("prodigy", False, 1.0),
    ("schedulefree-adamw", False, 1e-3),
]


@pytest.mark.parametrize(("use", "bf16", "lr"), RESUMED, ids=[each[0] for each in RESUMED])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    folder, within: Run, use: str, bf16: bool, lr: float
) -> None:
    config = written(folder, use, bf16=bf16, lr=lr, steps=4, save=2, log_every=1, more=SMOOTH)
    config.write_text(
        config.read_text(encoding="utf-8").replace(
            "log_every = 1", 'log_every = 1\ngradient_clip = { method = "norm", max = 0.5 }'
        ),
        encoding="utf-8",
    )
    within("run", config)
    rows, tensors = folder.rows(), folder.tensors(4)
    assert any(row["grad_norm"] > 0.5 for row in rows)  # so that something was clipped
    shutil.rmtree(folder.output / "checkpoints" / "step-000004")
    done = within("run", config)
    assert "step-000002" in done.stdout
    assert folder.rows() == rows
    again = folder.tensors(4)
    assert again.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(again[name], tensors[name])] == []
    of_model = [value for name, value in tensors.items() if of_denoiser(name)]
    assert {value.dtype for value in of_model} == {torch.bfloat16 if bf16 else torch.float32}


def test_bf16_weights_move_as_fp32_ones_do(folder, another, within: Run) -> None:
    """At a rate of 1e-4 the losses of the two runs stay together, and weights of every block move."""
    losses, moved = {}, {}
    for bf16, place in ((True, folder), (False, another())):
        within("run", written(place, "adamw_bf16", bf16=bf16, lr=1e-4, steps=8, save=1, log_every=1))
        losses[bf16] = [row["flow_loss"] for row in place.rows()]
        first, last = (place.tensors(step) for step in (6, 8))
        moved[bf16] = {
            name: float((last[name].float() - value.float()).abs().mean())
            for name, value in first.items()
            if of_denoiser(name) and value.ndim > 1
        }
    assert losses[True] == pytest.approx(losses[False], rel=0.05)
    assert len(moved[True]) > 5
    for name, way in moved[True].items():
        assert 0.3 < way / moved[False][name] < 20, name  # a rounded step is larger where it is taken, and rarer


def test_validation_has_the_average_and_training_goes_on_with_its_own_bits(
    folder, another, within: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    generate = Validation.__call__

    def watched(self: Validation, step: int) -> Iterator[Event]:
        seen[step] = {name: value.clone() for name, value in self.validator.denoiser.module.state_dict().items()}
        yield from generate(self, step)

    monkeypatch.setattr(Validation, "__call__", watched)
    within("run", written(folder, "schedulefree-adamw", more=VALIDATION, steps=6, save=3, log_every=1))
    for step in (3, 6):
        checkpoint = folder.output / "checkpoints" / f"step-{step:06d}"
        (averaged,) = (checkpoint / AVERAGED).rglob("*.safetensors")
        stored, training = load_file(averaged), load_file(checkpoint / averaged.relative_to(checkpoint / AVERAGED))
        assert all(torch.equal(stored[name], value) for name, value in seen[step].items())
        assert any(not torch.equal(stored[name], value) for name, value in training.items())
    without = another()
    within("run", written(without, "schedulefree-adamw", steps=6, save=3, log_every=1))
    assert without.rows() == folder.rows()
    ours, theirs = folder.tensors(6), without.tensors(6)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_an_ema_takes_the_weights_for_evaluation(folder, within: Run) -> None:
    """With a decay of 0 it is the last of them."""
    ema = "\n[ema]\ndecay = 0.0\nwarmup = false\n"
    within("run", written(folder, "schedulefree-adamw", more=ema, steps=3, save=3))
    checkpoint = folder.output / "checkpoints" / "step-000003"
    one, other = (load_file(checkpoint / below / "denoiser.safetensors") for below in ("ema", AVERAGED))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_an_adapters_average_is_saved_beside_it_too(folder, within: Run) -> None:
    within("run", written(folder, "schedulefree-adamw", train="lora", steps=3, save=3))
    checkpoint = folder.output / "checkpoints" / "step-000003"
    (averaged,) = (checkpoint / AVERAGED).rglob("*.safetensors")
    (training,) = (each for each in checkpoint.glob("*.safetensors") if each.name == averaged.name)
    one, other = load_file(averaged), load_file(training)
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_an_optimizer_without_an_average_saves_none(folder, within: Run) -> None:
    within("run", folder.write(steps=2, save=2))
    assert not (folder.output / "checkpoints" / "step-000002" / AVERAGED).exists()
    assert eval_weights(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), [], []) is None
    assert AveragedPiece.name != OptimizerPiece.name


def test_statistics_of_each_block_are_logged_where_steps_are_and_change_nothing(folder, another, within: Run) -> None:
    plain = another()
    within("run", plain.write(more=SMOOTH, steps=5, log_every=2))
    config = folder.write(more=SMOOTH, steps=5, log_every=2)
    config.write_text(
        config.read_text(encoding="utf-8").replace("log_every = 2", "log_every = 2\nstatistics = true"),
        encoding="utf-8",
    )
    done = within("run", config)
    assert "statistics/" not in done.stdout  # a line of numbers stays one that can be read
    rows = folder.rows()
    own = [{key for key in row["terms"] if key.startswith("statistics/")} for row in rows]
    assert [bool(each) for each in own] == [False, True, False, True, True]
    kinds = {"grad_rms", "weight_rms", "update_ratio", "output_rms", "output_max"}
    blocks = {f"statistics/block-{number:02d}/{kind}" for number in range(3) for kind in kinds}
    assert own[1] == blocks | {f"statistics/others/{kind}" for kind in kinds if not kind.startswith("output")}
    assert all(
        math.isfinite(row["terms"][key]) and row["terms"][key] >= 0  # the last step's rate is 0
        for row in rows
        for key in row["terms"]
        if "statistics" in key
    )
    for row in rows:
        row["terms"] = {key: value for key, value in row["terms"].items() if not key.startswith("statistics/")}
    assert rows == plain.rows()
    ours, theirs = folder.tensors(5), plain.tensors(5)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_statistics_are_those_of_numpy() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    head = nn.Linear(4, 1)
    named = [*blocks.named_parameters(), *head.named_parameters()]
    statistics, found = Statistics(list(blocks), named), {}
    x = torch.randn(3, 4)
    with statistics.outputs(found):
        first = blocks[0](x)
        second = blocks[1](first)
        with torch.no_grad():  # as rollout does
            blocks[1](blocks[0](100 * x))
    head(second).square().sum().backward()
    before = statistics.gradients(found)
    old = {name: value.detach().clone() for name, value in named}
    torch.optim.SGD([weight for _, weight in named], lr=0.1).step()
    statistics.updates(found, before)

    def rms(*values: Tensor) -> float:
        flat = torch.cat([value.detach().double().flatten() for value in values]).numpy()
        return float((flat**2).mean() ** 0.5)

    numbers = {name: float(value) for name, value in found.items()}
    assert numbers["statistics/block-00/output_rms"] == pytest.approx(rms(first), rel=1e-5)
    assert numbers["statistics/block-01/output_max"] == pytest.approx(float(second.detach().abs().max()))
    own = dict(blocks[1].named_parameters(prefix="1"))
    assert numbers["statistics/block-01/grad_rms"] == pytest.approx(
        rms(*(each.grad for each in own.values())), rel=1e-5
    )
    ratio = rms(*(value - old[name] for name, value in own.items())) / rms(*(old[name] for name in own))
    assert numbers["statistics/block-01/update_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert numbers["statistics/others/weight_rms"] == pytest.approx(rms(old["weight"], old["bias"]), rel=1e-5)
    with nullcontext():
        blocks[0](x)  # outside, nothing listens any more
    assert numbers == {name: float(value) for name, value in found.items()}


def test_a_limit_of_0_clips_nothing_and_the_norm_is_logged(folder, another, within: Run) -> None:
    rows = []
    for place, table in ((folder, '\ngradient_clip = { method = "value", max = 0 }'), (another(), "")):
        config = place.write(steps=4, log_every=2)
        text = config.read_text(encoding="utf-8").replace("log_every = 2", f"log_every = 2{table}")
        config.write_text(text, encoding="utf-8")
        within("run", config)
        rows.append(place.rows())
    assert rows[0] == rows[1]
    assert [row["grad_norm"] is not None for row in rows[0]] == [False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_and_clipping_by_it_are_right_also_of_bf16_gradients(dtype: torch.dtype) -> None:
    weights = [nn.Parameter(torch.zeros(1000, dtype=dtype)) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        weight.grad = torch.randn(1000, generator=generator).to(dtype)
    exact = float(torch.cat([weight.grad.double() for weight in weights]).norm())
    norm = gradient_norm(weights)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(exact, rel=1e-5)
    clip_gradients(weights, "norm", 1.0, norm)
    assert float(torch.cat([weight.grad.double() for weight in weights]).norm()) == pytest.approx(1.0, rel=5e-3)
