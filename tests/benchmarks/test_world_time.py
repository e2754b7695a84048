"""The tiny world's modes in the same time: what each is given, and what its table says."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from vtrain.run.prepare import planned

Load = Callable[[str], ModuleType]
WORLD = Path(__file__).parents[2] / "examples" / "world"


@pytest.fixture
def world_time(module: Load, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(WORLD))
    return module("world_time")


def test_each_mode_is_a_valid_configuration_of_the_steps_that_it_is_given(
    world_time: ModuleType, tmp_path: Path
) -> None:
    built = sys.modules["checkpoint"].build(tmp_path / "checkpoint")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "model").symlink_to(built)
    found = {}
    for mode in world_time.MODES:
        config = world_time.config_of(mode, tmp_path, tmp_path / mode.folder, world_time.lengths(mode, 123))
        plan = planned(config)
        assert plan.config.train.steps == 123
        assert plan.config.checkpoint.every.value == plan.config.validation.every.value == 123
        assert plan.config.model.table.train == {"world": "full", "lora": "lora"}[mode.task]
        found[mode.name] = (plan.storage.name, plan.config.optimizer.registered.spec.name)
        assert (plan.config.ema is not None) == mode.averaged
    assert found["full, pure bf16, adamw_bf16"] == ("bf16", "adamw_bf16")
    assert found["LoRA, bf16, base int8"] == ("int8", "adamw")
    assert len(set(found)) == len(world_time.MODES)


def test_a_mode_whose_step_takes_longer_gets_fewer_steps_and_the_same_time(
    world_time: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(config: Path) -> Path:
        asked.append(planned(config).config.train.steps)
        folder = config.parent / "run"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps({"flow_loss": 0.5}) + "\n", encoding="utf-8")
        return folder

    accuracy = sys.modules["evaluate"].Accuracy(4, 1.0, 1.0, 0.5, 0.5)
    monkeypatch.setattr(world_time.tiny_world, "run", run)
    monkeypatch.setattr(world_time, "judged", lambda mode, *_: {mode.name: {"all prompts": accuracy}})
    monkeypatch.setattr(world_time, "trial", lambda *_: world_time.Trial(0.2, 0.3, 1.5))
    sys.modules["checkpoint"].build(tmp_path / "checkpoint")
    plain, slower = (mode for mode in world_time.MODES if mode.name in ("full, bf16", "full, bf16, muon"))
    rows = [row for seed in (42, 43) for mode in (plain, slower) for row in world_time.made(mode, tmp_path, seed)]
    assert asked == [600, 400, 600, 400]
    again = world_time.made(plain, tmp_path, 42)
    assert len(asked) == 4  # what is done is not done again
    assert again == [rows[0]]
    text = world_time.table(rows)
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:]] for line in text.splitlines()}
    # One metrics line each: the table tells the steps that were made, not those that were asked for.
    assert cells["full, bf16"][:2] == ["0.200", "1"]
    assert cells["full, bf16, muon"][0] == "0.300"
    assert cells["full, bf16, muon"][3:6] == ["4 of 8", "100% / 100% / 50%", "0.500"]


@pytest.mark.slow
def test_a_mode_is_timed_trained_and_judged(
    world_time: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WHOLE": {"world": 4, "lora": 2}, "PAIRS": 1, "STEPS": 1, "PROMPTS": 2}.items():
        monkeypatch.setattr(world_time, name, value)
    monkeypatch.setattr(world_time.demo, "CLIPS", 24)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # where `vtrain` is
    output = tmp_path / "numbers.json"
    rows = ["--rows", "full, bf16", "full, bf16, EMA"]
    monkeypatch.setattr(
        sys, "argv", ["world_time.py", "--output", str(tmp_path / "world"), *rows, "--json", str(output)]
    )
    world_time.main()
    found = json.loads(output.read_text())["rows"]
    assert [row["label"] for row in found] == ["full, bf16", "full, bf16, EMA", "full, bf16, EMA, averaged weights"]
    assert found[0]["steps"] == 4
    assert found[1]["steps"] == round(4 / found[1]["trial"]["ratio"])
    assert "From random weights, 1 seed:" in capsys.readouterr().out
