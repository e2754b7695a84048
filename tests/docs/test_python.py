"""Every Python block of the pages runs; the plugin among them passes the conformance kit and trains."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.options import SanaVideoOptions

Run = Callable[..., subprocess.CompletedProcess[str]]
Install = Callable[[Path, Path], Path]


@pytest.fixture(scope="session")
def checkpoint(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What full training and LoRA leave in a checkpoint, both in one folder."""
    from vtrain.config.tables import LoraTable
    from vtrain.train.parameters import add_lora, lora_settings, lora_state

    family = SanaVideoFamily(SanaVideoOptions(path=str(prepared / "demo-output" / "tiny-checkpoint")))
    folder = tmp_path_factory.mktemp("checkpoint")
    denoiser = family.load_denoiser("cpu", "fp32")
    denoiser.save(folder, denoiser.module.state_dict())
    table = LoraTable(rank=4)
    add_lora(denoiser, table, seed=0, where="")
    denoiser.save_lora(folder, lora_state(denoiser.module), lora_settings(denoiser, table))
    return folder


def short_demo(prepared: Path, folder: Path) -> Path:
    """`nox -s clips`'s file in `folder`, as demo-output/demo.toml: two steps, no videos, an output folder of its own."""
    text = (prepared / "demo-output" / "demo.toml").read_text(encoding="utf-8")
    start, end = text.index("[validation]"), text.index("[checkpoint]")
    text = text[:start] + text[end:]
    for old, new in {"steps = 300": "steps = 2", (prepared / "demo-output" / "run").as_posix(): "run"}.items():
        assert old in text
        text = text.replace(old, new)
    config = folder / "demo-output" / "demo.toml"
    config.parent.mkdir()
    config.write_text(text, encoding="utf-8")
    return config


def run_block(block: Any, folder: Path, run: Run, arguments: tuple[Path, ...]) -> str:
    """Run one block in `folder`; gives what went wrong, "" if nothing did."""
    name = block.file or "block.py"
    (folder / name).write_text(block.text, encoding="utf-8")
    kit = name.startswith("test_")
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", name) if kit else (name,)
    done = run(*command, *(arguments if "sys.argv" in block.text else ()), folder=folder)
    if kit and " passed" not in done.stdout:
        return done.stdout + done.stderr
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.slow
def test_every_python_block_of_a_page_runs(
    python_page: Path,
    every_block: tuple[Any, ...],
    tmp_path: Path,
    prepared: Path,
    checkpoint: Path,
    installed_from: Install,
    run_python: Run,
) -> None:
    """Slow (4 to 15 seconds a page): most blocks are processes that import torch and diffusers, and some train."""
    folder = installed_from(python_page, tmp_path)
    short_demo(prepared, folder)
    arguments = (prepared / "demo-output" / "tiny-checkpoint", checkpoint)
    mine = [block for block in every_block if block.page == python_page and block.language == "python"]
    assert mine
    for block in mine:
        assert run_block(block, folder, run_python, arguments) == "", str(block)


@pytest.mark.parametrize("text", ["import vtrain.contract.nothing", "from vtrain.contract import Plan", "1 / 0"])
def test_a_planted_wrong_python_block_is_found(
    make_block: Callable[..., Any], tmp_path: Path, run_python: Run, text: str
) -> None:
    assert "Error" in run_block(make_block("python", text), tmp_path, run_python, ())


def test_a_planted_conformance_test_that_fails_or_tests_nothing_is_found(
    make_block: Callable[..., Any], tmp_path: Path, run_python: Run
) -> None:
    for text in ("def test_x():\n    assert False\n", "x = 1\n"):
        assert run_block(make_block("python", text, "file=test_planted.py"), tmp_path, run_python, ()) != ""


@pytest.mark.slow
def test_the_tracker_of_the_page_writes_its_table_and_keeps_its_id_when_the_run_is_resumed(
    root: Path, prepared: Path, tmp_path: Path, installed_from: Install, run_python: Run
) -> None:
    """Slow (10 seconds): two runs, each a process that imports torch and diffusers."""
    folder = installed_from(root / "docs" / "events.md", tmp_path)
    config = short_demo(prepared, folder)
    text = config.read_text(encoding="utf-8") + '\n[[tracker]]\nuse = "table"\n'
    for steps in (2, 3):
        config.write_text(text.replace("steps = 2", f"steps = {steps}"), encoding="utf-8")
        done = run_python("-m", "vtrain.cli", "run", config, folder=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "WARNING" not in done.stdout
    run = folder / "demo-output" / "run"
    table = [line.split(",") for line in (run / "table.csv").read_text(encoding="utf-8").splitlines()]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(int(step), float(loss)) for _, step, _, loss in table] == [(row["step"], row["loss"]) for row in metrics]
    assert len(table) == 3
    assert len({row[0] for row in table}) == 1


@pytest.mark.long
def test_the_plugin_of_the_page_trains_with_sana_video(
    root: Path, prepared: Path, tmp_path: Path, installed_from: Install, run_python: Run
) -> None:
    folder = installed_from(root / "docs" / "plugins.md", tmp_path)
    text = (prepared / "demo-output" / "demo.toml").read_text(encoding="utf-8")
    text = text.replace("steps = 300", "steps = 2").replace("demo-output/run", "demo-output/run-with-motion")
    start, end = text.index("[validation]"), text.index("[checkpoint]")
    config = folder / "motion.toml"
    config.write_text(text[:start] + text[end:] + '\n[[regularizer]]\nuse = "motion"\n', encoding="utf-8")
    done = run_python("-m", "vtrain.cli", "run", config, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = prepared / "demo-output" / "run-with-motion" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["terms"].keys() == {"motion/loss", "motion/unweighted"}
        assert row["terms"]["motion/loss"] == pytest.approx(0.1 * row["terms"]["motion/unweighted"])
        assert row["loss"] == pytest.approx(row["flow_loss"] + row["terms"]["motion/loss"])
