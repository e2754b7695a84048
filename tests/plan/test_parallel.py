"""[parallel] in a plan: what cannot be shared is refused, with what can; what a share takes is estimated."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vtrain.config import load
from vtrain.contract import ConfigError
from vtrain.plan.memory import BACKWARD, SAVING, STEP, TRAINING, MemorySettings, Workload, estimate_of
from vtrain.plan.parallel import parallel_problems, samples_change
from vtrain.plan.records import Plan
from vtrain.plan.workload import memory_settings
from vtrain.registry import discover

PlanOf = Callable[..., Plan]
SHARD = "\n[parallel]\nshard = true\n"


@pytest.mark.parametrize(
    ("tables", "more", "said"),
    [
        ({"optimizer": 'use = "muon"\nlr = 1e-4'}, "", 'parallel.shard with optimizer "muon": it needs whole weights'),
        (
            {},
            "[offload]\nmodel_cpu = true\n",
            "offload.model_cpu with parallel.shard: both move the denoiser's weights",
        ),
        ({"train": "steps = 10\nstatistics = true"}, "", "train.statistics with parallel.shard"),
    ],
)
def test_what_needs_whole_weights_is_refused_with_what_does_not(
    plan_of: PlanOf, tables: dict[str, str], more: str, said: str
) -> None:
    assert plan_of(more=more, **tables)
    with pytest.raises(ConfigError) as caught:
        plan_of(more=more + SHARD, **tables)
    (problem,) = caught.value.problems
    assert problem.what.startswith(said)
    assert problem.remedy.endswith("or set parallel.shard = false.")


def test_an_optimizer_that_needs_whole_weights_is_refused_with_those_that_do_not(
    plan_of: PlanOf, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError):
        plan_of(optimizer='use = "muon"\nlr = 1e-4', more=SHARD)
    (problem,) = parallel_problems(load(tmp_path / "config.toml", discover()), discover())
    assert "adamw" in problem.remedy
    assert "schedulefree-adamw" in problem.remedy
    assert "muon" not in problem.remedy


def test_one_process_shares_with_nobody(plan_of: PlanOf) -> None:
    said = "parallel.shard has no effect on one process: it has all weights"
    assert said in plan_of(more=SHARD).warnings
    assert said not in plan_of(processes=2, more=SHARD).warnings


def test_a_share_takes_its_part_and_two_blocks(plan_of: PlanOf) -> None:
    assert memory_settings(plan_of(processes=4, more=SHARD).config, plan_of().family, 4).shards == 4
    work = Workload(
        parameters=1000, blocks=10, in_blocks=0.8, adapter=100, guessed=False, tokens=0, latents=30, kept=None
    )
    settings = MemorySettings(stored=2.0, trained=4.0, adapter=False, recompute="blocks", processes=4, shards=4)

    def parts(settings: MemorySettings) -> dict[str, int]:
        found = {phase.name: phase.device for phase in estimate_of(work, settings).phases if phase.name in TRAINING}
        return dict(found.get(STEP) or found[BACKWARD])

    full = parts(settings)
    assert full["weights"] == 1000 + 4000 * (0.2 + 2 * 0.08)
    assert full["optimizer"] == 2000
    assert full["gradients"] == 1000 + 2 * 320
    saving = {count: _saving_host(work, replace(settings, shards=count)) for count in (1, 4)}
    assert saving == {1: 8000, 4: pytest.approx(1600, abs=1)}, (
        "the optimizer's states at once; shares of them a tensor at a time"
    )
    frozen = parts(replace(settings, adapter=True, quantised=True, stored=1.0))
    assert frozen["weights"] == 1000 + 100 + 400 * (0.2 + 2 * 0.08), "what is quantised is whole on each"


def _saving_host(work: Workload, settings: MemorySettings) -> int:
    return next(phase.host["gathered"] for phase in estimate_of(work, settings).phases if phase.name == SAVING)


@pytest.mark.parametrize(
    ("processes", "train", "said"),
    [
        (2, "steps = 10\naccumulate = 2", ""),
        (4, "steps = 10", ""),
        (2, "steps = 10", "a step takes 2 samples, and took 4 .*; train.accumulate = 2 keeps it at 4"),
        (3, "steps = 10", "no train.accumulate keeps it at 4, which is no multiple of 3"),
    ],
)
def test_another_number_of_samples_a_step_is_said_with_the_accumulate_that_keeps_it(
    plan_of: PlanOf, processes: int, train: str, said: str
) -> None:
    before: dict[str, Any] = {"train.batch_size": 1, "train.accumulate": 4, "processes": 1}
    found = list(samples_change(before, plan_of(processes=processes, train=train)))
    if not said:
        assert found == []
        return
    (text,) = found
    assert re.search(said, text), text
