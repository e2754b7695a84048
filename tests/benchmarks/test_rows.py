"""The rows of benchmarks are configurations of vtrain's: each is one that can run, and is another than what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vtrain.contract import ConfigError
from vtrain.plan.records import Plan
from vtrain.run.prepare import planned
from vtrain.train.settings import settings

Load = Callable[[str], ModuleType]
CLIP = (64, 64, 9)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoint and clips of the benchmarks' smallest model go, made once."""
    return tmp_path_factory.mktemp("rows")


def told(plan: Plan) -> dict[str, object]:
    return {key: setting.value for key, setting in settings(plan).items() if not key.startswith("run.")}


def test_each_feature_is_a_valid_configuration_that_is_not_the_one_without_it(module: Load, work: Path) -> None:
    features, workload = module("features"), module("workload")
    model = workload.MODELS["tiny"]
    without: dict[str, Plan] = {}
    lacking = []
    for name, feature in features.FEATURES.items():
        if features.missing(name):
            lacking.append(name)
            continue
        plan = planned(features.config_of(work, model, name, 1, with_it=True))
        if feature.mode not in without:  # the same for all of a mode
            without[feature.mode] = planned(features.config_of(work, model, name, 1, with_it=False))
        beside = without[feature.mode]
        assert told(plan) != told(beside), name
        assert not {str(each) for each in plan.warnings} - {str(each) for each in beside.warnings}, name
        assert plan.config.train.accumulate == feature.clips, name
    assert set(lacking) <= {"adamw8bit"}  # the only one whose library is not of the test extra


def test_each_mode_of_the_step_is_a_valid_configuration_of_what_the_bare_loop_does(module: Load, work: Path) -> None:
    step, workload = module("step"), module("workload")
    for name, each in step.WORKS.items():
        plan = planned(step.config_of(work, workload.MODELS["tiny"], name, 1, f"step-{name}"))
        assert plan.config.train.accumulate == each.accumulate
        assert (plan.config.ema is not None) == each.average
        assert plan.config.optimizer.registered.spec.name == (each.optimizer or "adamw")
        assert plan.loaded == str(each.dtype).replace("torch.bfloat16", "bf16").replace("torch.float32", "fp32")
        assert plan.config.model.table.train == each.mode


def test_each_row_of_the_gpu_benchmark_is_a_valid_configuration(module: Load) -> None:
    rows, sides = module("gpu_rows"), module("gpu_sides")
    assert set(rows.ROWS) <= set(sides.SIDES | sides.SAVING)
    for name, row in rows.ROWS.items():
        for mode in row.modes:
            if name == "adamw8bit" and find_spec("bitsandbytes") is None:
                with pytest.raises(ConfigError, match="is not installed"):
                    rows.plan_of(name, mode, sides.TINY, CLIP)
                continue
            plan = rows.plan_of(name, mode, sides.TINY, CLIP)
            assert plan.config.precision.mixed == "bf16"
            assert (plan.config.model.table.lora is not None) == (mode == "lora")
            if not row.recomputes:
                assert plan.config.precision.gradient_checkpointing is True
            if rows.estimated(plan) is not None:
                assert rows.estimated(plan) > 0


def test_a_row_that_needs_recomputed_blocks_is_left_out_where_nothing_is_recomputed(module: Load) -> None:
    sides = module("gpu_sides")
    kept = sides.Setup("lora", sides.Clip(64, 64, 9), sides.TINY, sides.torch.device("cpu"), 1, False)
    left = {name for name in sides.SIDES | sides.SAVING if not sides.applies(name, kept)}
    assert left == {"block offload", "block offload, stream", "leaf offload", "pure bf16", "pure bf16, Kahan"}
    assert kept.plan("vtrain").config.precision.gradient_checkpointing is False


def test_the_headers_of_a_row_are_the_real_models_and_take_no_room(module: Load) -> None:
    rows, sides = module("gpu_rows"), module("gpu_sides")
    folder = rows.headers(sides.REAL)
    plan = rows.plan_of("base int8", "lora", sides.REAL, (832, 480, 49))
    assert plan.family.parameters == 2_056_862_144
    assert plan.storage.name == "int8"
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_size > 8e9
    assert file.stat().st_blocks * 512 < 1e6


def test_each_group_has_rows_of_its_mode_and_takes_less_than_four_minutes(module: Load) -> None:
    rows, sides = module("gpu_rows"), module("gpu_sides")
    measured: set[tuple[str, str]] = set()
    for name, group in rows.GROUPS.items():
        assert group.minutes < 4, name
        assert "vtrain" in group.rows, name
        setup = sides.Setup(group.mode, sides.Clip(64, 64, 9), sides.TINY, sides.torch.device("cpu"), 1)
        assert all(sides.applies(row, setup) for row in group.rows), name
        measured |= {(group.mode, row) for row in group.rows}
    assert {row for _, row in measured} >= set(rows.ROWS)
    assert {("full", "EMA"), ("full", "adamw8bit"), ("full", "states on CPU"), ("lora", "feed-forward")} <= measured


@pytest.fixture
def results(module: Load) -> ModuleType:
    return module("gpu_results")


def side(results: ModuleType, name: str, seconds: float, **known: Any) -> Any:
    return results.Measured(name, "lora", "64x64x9", seconds=[seconds] * 3, **known)


def test_a_later_call_completes_the_file_and_replaces_what_it_measured_again(
    results: ModuleType, tmp_path: Path
) -> None:
    path, card, machine = tmp_path / "gpu.json", {"gpu": "H100"}, {"torch": "2.13"}
    first = results.Results(path, card, machine)
    first.add("lora", {"bare": side(results, "bare", 1.0), "vtrain": side(results, "vtrain", 2.0)}, {"steps": 2})
    later = results.Results(path, card, machine)
    later.add("full", {"bare": side(results, "bare", 4.0), "EMA": side(results, "EMA", 5.0)}, {"steps": 2})
    again = results.Results(path, card, machine)
    again.add("lora", {"bare": side(results, "bare", 1.0), "vtrain": side(results, "vtrain", 1.5)}, {"steps": 2})
    assert list(again.groups) == ["full", "lora"]
    text = results.Results(path, card, machine).text()
    assert "lora, vtrain / bare, seconds: 1.500 [1.500, 1.500] over 3, limit 1.02: MISSED" in text
    assert "full, EMA / bare, seconds: 1.250" in text
    assert "2.000" not in text
    assert not list(tmp_path.glob(".*"))  # what it is written to first has taken its place


def test_figures_of_another_card_or_version_stay_apart(results: ModuleType, tmp_path: Path) -> None:
    path, machine = tmp_path / "gpu.json", {"torch": "2.13"}
    both = {"bare": side(results, "bare", 1.0), "vtrain": side(results, "vtrain", 2.0)}
    results.Results(path, {"gpu": "H100"}, machine).add("lora", both, {})
    other = results.Results(path, {"gpu": "H200"}, machine)
    other.add("lora", {"bare": side(results, "bare", 1.0), "vtrain": side(results, "vtrain", 1.0)}, {})
    assert "The file also has figures of H100: gpu H100" in other.text()
    newer = results.Results(path, {"gpu": "H200"}, {"torch": "2.14"})
    assert newer.groups == {}
    assert newer.others == ["H100: gpu H100, torch 2.13", "H200: torch 2.13"]
    assert "vtrain / bare, seconds: 2.000" in results.Results(path, {"gpu": "H100"}, machine).text()


@pytest.mark.parametrize("text", ["{", "[]", '{"setups": []}', '{"cards": [{"gpu": "H100"}]}'])
def test_a_file_of_something_else_is_not_overwritten(results: ModuleType, tmp_path: Path, text: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match="no file of this script's results"):
        results.Results(path, {}, {})
    assert path.read_text() == text


def test_an_estimate_stands_beside_the_measured_peak(results: ModuleType) -> None:
    gib = 1 << 30
    each = side(results, "EMA", 1.0, allocated=10 * gib, reserved=11 * gib, estimate=int(10.8 * gib))
    bare = side(results, "bare", 0.5, allocated=8 * gib, reserved=9 * gib)
    cells = dict(zip(results.HEADS, results.row(each, results.ratios({"bare": bare, "EMA": each})), strict=True))
    assert cells["estimate"] == "10.80 (+8%)"
    assert cells["peak GiB (reserved)"] == "10.00 (11.00)"
    assert results.row(each, results.ratios({"bare": bare, "EMA": each}))[4:7:2] == ("2.000", "1.250")
