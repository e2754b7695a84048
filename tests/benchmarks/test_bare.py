"""The loop that vtrain is measured against does the same work: else a ratio to it says nothing."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.optim.optimizer import register_optimizer_step_pre_hook

Load = Callable[[str], ModuleType]


class Work:
    """What a step asks of the model, what of it is trained, and by what optimizer."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.autocast: torch.dtype | None = None
        self.timestep = 0.0
        self.weights: list[tuple[str, torch.dtype, bool]] = []
        self.recomputes = False
        self.groups: list[tuple[Any, ...]] = []
        self.steps = self.forwards = self.averaged = 0

    def called(self, model: Any, given: dict[str, Any]) -> None:
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        self.forwards += 1
        self.inputs = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
        self.autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        self.timestep = max(self.timestep, float(given["timestep"].max()))
        self.recomputes = bool(model.is_gradient_checkpointing)
        self.weights = [(name, weight.dtype, weight.requires_grad) for name, weight in model.named_parameters()]

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        kept = ("weight_decay", "lr", "betas", "eps", "fused", "kahan_sum")
        sizes = [sum(weight.numel() for weight in group["params"]) for group in optimizer.param_groups]
        described = zip(sizes, optimizer.param_groups, strict=True)
        self.groups = sorted((size, *(group.get(name) for name in kept)) for size, group in described)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, mode) for name in ("tiny", "wan-tiny") for mode in ("full", "lora")),
        *(("tiny", mode) for mode in ("accumulate-4", "ema", "lora-ema", "bf16-stochastic", "bf16-kahan")),
    ],
)
def test_the_bare_loop_does_the_same_work_as_vtrain(
    module: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: str
) -> None:
    workload, step, bare = module("workload"), module("step"), module("bare")
    model = workload.MODELS[name]
    family = bare.FAMILIES[model.use]
    transformer = getattr(importlib.import_module(family.module), family.transformer)
    forward, lerp, sides = transformer.forward, torch._foreach_lerp_, {"bare": Work(), "vtrain": Work()}
    config = step.config_of(tmp_path, model, mode, 6, "run")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    blocks = {"bare": step.bare_block(config, model, mode, 6), "vtrain": step.vtrain_block(config)}
    for side, work in sides.items():

        def seen(self: Any, *given: Any, _work: Work = work, **named: Any) -> Any:
            _work.called(self, inspect.signature(forward).bind(self, *given, **named).arguments)
            return forward(self, *given, **named)

        def moved(average: list[Any], *given: Any, _work: Work = work) -> None:
            _work.averaged += sum(each.numel() for each in average)
            lerp(average, *given)

        monkeypatch.setattr(transformer, "forward", seen)
        monkeypatch.setattr(torch, "_foreach_lerp_", moved)
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_, _work=work: _work.stepped(optimizer))
        try:
            with blocks[side] as block:
                assert block() > 0
        finally:
            hook.remove()
            AcceleratorState._reset_state(reset_partial_state=True)
    ours, theirs = sides["vtrain"], sides["bare"]
    assert ours.inputs == theirs.inputs
    assert ours.autocast == theirs.autocast == torch.bfloat16
    assert 1 < ours.timestep <= 1000
    assert 1 < theirs.timestep <= 1000
    assert ours.weights == theirs.weights
    assert not ours.recomputes
    assert not theirs.recomputes
    assert ours.groups == theirs.groups
    asked = step.WORKS[mode]
    # An optimizer that is made of others is counted with them.
    assert ours.steps == theirs.steps == (12 if asked.optimizer == "adamw_bf16" else 6)
    assert ours.forwards == theirs.forwards == 6 * asked.accumulate
    assert ours.averaged == theirs.averaged
    assert (ours.averaged > 0) == asked.average
