"""Each benchmark runs from end to end in its smallest form. Their numbers are not judged here: no test is timed.

Those marked slow start processes of their own, a dozen or more that import torch and diffusers: 15 to 35 CPU-seconds each.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vtrain

Script = Callable[..., tuple[str, dict[str, Any]]]
ROOT = Path(__file__).parents[2]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(
    path.name
    for path in BENCHMARKS.glob("*.py")
    if "ArgumentParser(" in path.read_text(encoding="utf-8") and path.name != "same_bits.py"  # it measures nothing
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_finds_all_that_it_imports_and_explains_its_options(
    script_here: Script, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        script_here(name, "--help")
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_of_features_compares_a_run_with_one_and_without(script_here: Script, tmp_path: Path) -> None:
    text, numbers = script_here(
        "features.py", "--model", "tiny", "--features", "layersync", "--pairs", "2", "--steps", "2",
        "--folder", str(tmp_path / "work"),
    )  # fmt: skip
    (cost,) = numbers["features"]
    assert cost["feature"] == "layersync"
    assert numbers["model"] == "tiny"
    assert cost["without"] > 0
    assert cost["with_it"] > 0
    assert "| layersync " in text


@pytest.mark.slow
def test_the_benchmark_of_crepa_in_the_tiny_world_measures_runs_with_it_and_without(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "examples" / "world"))
    _, numbers = script(
        "crepa_world.py", "--steps", "2", "--clips", "24", "--prompts", "1", "--seeds", "42",
        "--output", str(tmp_path / "world"),
    )  # fmt: skip
    without, crepa = numbers["runs"]
    assert (without["arm"], crepa["arm"]) == ("without", "CREPA")
    assert without["similarity"] is None
    assert -1 <= crepa["similarity"] <= 1
    assert without["held_out"] > 0


@pytest.mark.slow
def test_the_step_benchmark_gives_ratios_of_time_and_memory(script: Script, tmp_path: Path) -> None:
    text, numbers = script(
        "step.py", "--models", "tiny", "--modes", "lora", "--pairs", "2", "--steps", "2", "--rss-pairs", "1",
        "--folder", str(tmp_path / "work"),
    )  # fmt: skip
    (timed,), (memory,) = numbers["time"], numbers["memory"]
    assert (timed["model"], timed["mode"], timed["ratio"]["pairs"], timed["ratio"]["limit"]) == (
        "tiny",
        "lora",
        2,
        1.10,
    )
    assert timed["ratio"]["low"] <= timed["ratio"]["median"] <= timed["ratio"]["high"]
    assert timed["bare"] > 0
    assert timed["vtrain"] > 0
    # A process that holds torch and a model has more than 200 MiB, whatever it was started from.
    assert memory["bare"] > 200 << 20
    assert memory["ratio"]["median"] == memory["vtrain"] / memory["bare"]
    (listening,) = numbers["listeners"]
    assert listening["ratio"]["limit"] == 1.01
    assert listening["without"] > 0
    assert listening["listening"] > 0
    assert text.count("| tiny  | lora    |") == 3
    assert numbers["machine"]["torch"] in text


@pytest.mark.slow
def test_the_startup_benchmark_compares_commands_and_says_of_which_install(script: Script) -> None:
    text, numbers = script("startup.py", "--runs", "1", "--threads", "1", "--models")
    assert [row["what"] for row in numbers["commands"]] == [
        "vtrain --help",
        "vtrain plugins list",
        "vtrain plugins list",
        "vtrain plan, sanavideo",
        "vtrain plan, sanavideo",
        "vtrain plan, wan21",
        "vtrain plan, wan21",
    ]
    assert [row["ratio"]["limit"] for row in numbers["commands"]] == [3.0, 3.0, None, None, 3.0, None, 3.0]
    assert all(row["cost"]["cpu"] > 0 and row["base"]["cpu"] > 0 for row in numbers["commands"])
    assert numbers["first_steps"] == []
    assert numbers["threads"] == {"1": [1]}
    assert "OMP_NUM_THREADS=1: steps compute with [1] threads: respected" in text
    kind = "editable" if Path(vtrain.__file__).is_relative_to(ROOT) else "normal"
    assert numbers["machine"]["vtrain"] == f"{vtrain.__version__}, {kind} install"
    assert f"vtrain {vtrain.__version__}, {kind} install" in text
    assert numbers["machine"]["cpu"] in text
    assert ("vtrain's bytecode: kept\n" in text) == numbers["bytecode"]


@pytest.mark.slow
def test_a_process_has_its_share_and_what_two_blocks_take_while_they_are_whole(script: Script) -> None:
    """Weights of a block that computes and of the one that comes, and as many gradients; and what lies in no block, whole."""
    text, numbers = script("processes.py", "--model", "tiny", "--counts", "2", "--memory-only")
    alone, two = (numbers["memory"][count] for count in ("1", "2"))
    states = 16 * alone["numbers"]
    computed = alone["most"] - states
    assert 0 < computed < states / 2
    assert states / 2 < two["most"] <= states / 2 + computed + 4 * (4 * two["block"]) + 2 * (4 * two["rest"])
    assert text.count("| tiny ") == 2


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_with_a_tiny_model(script_here: Script) -> None:
    text, numbers = script_here("gpu_sana2b.py", "--device", "cpu", "--tiny", "--blocks", "2", "--steps", "1")
    (here,) = numbers["cards"]
    assert list(here["groups"]) == ["lora 64x64x9", "full 64x64x9"]
    sides = ("bare", "vtrain", "CREPA cached", "CREPA decoded")
    groups = here["groups"].values()
    assert all(len(group["sides"][side]["seconds"]) == 2 for group in groups for side in sides)
    assert all(group["ratios"]["CREPA cached / vtrain, seconds"]["limit"] == 1.05 for group in groups)
    assert "SimpleTuner" in text
    assert text.count("| in turn") == 8


@pytest.mark.slow
def test_groups_of_the_gpu_benchmark_complete_one_file_and_have_the_bare_loop_with_them(script_here: Script) -> None:
    quick = ("gpu_sana2b.py", "--device", "cpu", "--tiny", "--blocks", "1", "--steps", "1", "--rows")
    script_here(*quick, "full", "lora-base")
    text, numbers = script_here(*quick, "lora-offload")
    (here,) = numbers["cards"]
    assert list(here["groups"]) == ["full 64x64x9", "lora-base 64x64x9", "lora-offload 64x64x9"]
    for group in here["groups"].values():
        rows = [side for side in group["sides"] if side != "bare"]
        assert all(not each["note"] for each in group["sides"].values())
        assert {f"{row} / bare, seconds" for row in rows} <= set(group["ratios"])
    assert "| base int4 " in text
    assert "| leaf offload " in text


@pytest.mark.slow
def test_the_crepa_benchmark_compares_kinds_of_teachers_with_the_step_without(script: Script, tmp_path: Path) -> None:
    sides = ("none", "cached", "source")
    text, numbers = script(
        "crepa.py", "--quick", "--modes", "lora", "--sides", *sides, "--folder", str(tmp_path / "work")
    )  # fmt: skip
    for found in (numbers["time"], numbers["memory"]):
        assert [(row["model"], row["mode"], row["side"]) for row in found] == [("tiny", "lora", side) for side in sides]
        assert found[0]["ratio"] is None
        assert [row["ratio"]["limit"] for row in found[1:]] == [1.05, None]
    assert all(row["cpu"] > 0 for row in numbers["time"])
    assert all(row["peak"] > 200 << 20 for row in numbers["memory"])
    assert text.count("| tiny  | lora    |") == 2 * len(sides)


def test_features_of_decoded_latents_are_more_like_their_own_frames_than_like_other_clips(script_here: Script) -> None:
    text, numbers = script_here("crepa_decoded.py", "--clips", "4")
    (found,) = numbers["likeness"]
    assert found["clips"] == 4
    assert found["others"] < found["decoded"] < 0.999
    assert found["lowest"] < found["decoded"]
    assert "features of 4 clips" in text


@pytest.mark.slow
def test_the_scan_benchmark_measures_each_part_and_compares_a_warm_scan_with_a_bare_walk(script: Script) -> None:
    text, numbers = script("scan.py", "--entries", "20", "1100", "--pairs", "1", "--cold")
    few, many = numbers["places"]
    assert (few["entries"], many["entries"]) == (20, 1100)
    for place in (few, many):
        assert set(place["costs"]) == {"bare", "first", "warm", "plan", "batch"}
        assert place["warm"]["median"] == place["costs"]["warm"]["cpu"] / place["costs"]["bare"]["cpu"]
    # A first batch needs torch, a plan does not.
    assert few["costs"]["plan"]["peak"] < 150 << 20 < few["costs"]["batch"]["peak"]
    assert "peak at 1,100 / at 20" in text


@pytest.mark.slow
def test_the_cache_benchmark_compares_clips_a_second(script: Script, tmp_path: Path) -> None:
    text, numbers = script("cache.py", "--clips", "5", "--pairs", "1", "--cold", "--folder", str(tmp_path / "work"))
    assert [(row["measure"], row["ratio"]["at_least"]) for row in numbers["compared"]] == [
        ("CPU", True),
        ("wall", True),
    ]
    assert all(row["bare"] > 0 and row["vtrain"] > 0 for row in numbers["compared"])
    # Both sides made the same latents, but for the last bits that a resample in pieces may change.
    ours = sorted((tmp_path / "work" / "cache" / "video").rglob("*.safetensors"))
    bare = sorted((tmp_path / "work" / "bare").glob("*.safetensors"))
    assert len(ours) == len(bare) == 5
    theirs = torch.stack([load_file(path)["mean"] for path in bare])
    mine = torch.stack([load_file(path)["mean"] for path in ours])
    nearest = (mine[:, None] - theirs[None]).abs().amax((2, 3, 4, 5)).amin(1)
    assert nearest.max() < 0.05
    assert text.count("at least 0.95") == 2


@pytest.mark.slow
def test_the_batches_benchmark_compares_batches_a_second_and_tells_the_wait(script: Script, tmp_path: Path) -> None:
    text, numbers = script(
        "batches.py", "--blocks", "1", "--batches", "2", "--models", "tiny", "--modes", "lora", "--steps", "2",
        "--folder", str(tmp_path / "work"),
    )  # fmt: skip
    assert [(row["batch_size"], row["compressed"]) for row in numbers["batches"]] == [
        (1, False), (4, False), (1, False), (4, False), (1, True),
    ]  # fmt: skip
    (waited,) = numbers["waits"]
    assert 0 <= waited["waited"] < waited["step"]
    assert "share of the step" in text


def test_two_records_are_compared_bit_for_bit_under_the_keys_of_today(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = runpy.run_path(str(BENCHMARKS / "same_bits.py"))["compare"]

    def record(folder: str, loss: float, key: str) -> None:
        (tmp_path / folder).mkdir()
        settings = {"step-000001": {"settings": {key: 1.0, "validation.prompts": {"a": "b"}}}}
        text = json.dumps({"metrics": [{"loss": loss}], "settings": settings})
        (tmp_path / folder / "run.json").write_text(text, encoding="utf-8")

    def compared(one: str, other: str) -> tuple[int, str]:
        return compare(tmp_path / one, tmp_path / other), capsys.readouterr().out

    record("old", 0.1, "train.clip.max")
    record("same", 0.1, "train.gradient_clip.max")
    record("other", 0.1 + 2**-56, "train.gradient_clip.max")
    (tmp_path / "empty").mkdir()
    assert compared("old", "same") == (0, "run.json: the same\n")
    code, said = compared("old", "other")
    assert (code, said.splitlines()[0]) == (1, "run.json: 1 differences")
    assert ".metrics[0].loss: 0.1 -> " in said
    assert compared("old", "empty")[0] == 2


@pytest.mark.slow
def test_the_gpu_benchmark_compares_chosen_rows_with_vtrain(script_here: Script) -> None:
    more = ["feed-forward", "every 2nd block", "block offload, stream", "leaf offload", "states on CPU"]
    quick = ("--device", "cpu", "--tiny", "--blocks", "2", "--steps", "1")
    _, numbers = script_here("gpu_sana2b.py", *quick, "--sides", "vtrain", *more)
    lora, full = numbers["cards"][0]["groups"].values()
    assert lora["ratios"].keys() == {f"{side} / vtrain, seconds" for side in more}
    assert full["ratios"].keys() == {f"{side} / vtrain, seconds" for side in more if "offload" not in side}
