"""[memory] kept: the memory of whole runs of the 104 M model on a CPU, against three limits and against the estimate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vtrain_sanavideo import tiny

CLIPS = Path(__file__).parents[2] / "examples" / "clips"
CONFIG = """
[run]
output_dir = "out"
[model]
use = "sanavideo"
path = "model"
train = "{train}"
[[data]]
use = "folder"
path = "clips"
resolution = ["256x256"]
upscale = true
video = {{ frames = 17, min_frames = 9, fps = 8, repeat_frames = true }}
[cache]
dir = "cache"
[train]
steps = 2
batch_size = 2
log_every = 1
[optimizer]
lr = 1e-4
[checkpoint]
every = "2 steps"
[memory]
limit = "{limit}"
may = ["checkpointing", "adamw8bit"]
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="os.wait4 counts in KiB on Linux")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("promise")
    tiny.build(made / "model", layers=6, heads=8, head_dim=112)
    shutil.copytree(CLIPS, made / "clips")
    return made


@pytest.mark.parametrize(
    ("train", "limit", "recompute"),
    [
        ("full", 4.6, False),
        ("full", 3.2, True),
        ("full", 2.5, True),
        ("lora", 2.8, False),
        ("lora", 2.1, True),
        ("lora", 1.6, True),
    ],
)
def test_a_run_stays_below_its_limit_and_near_its_estimate(
    folder: Path, train: str, limit: float, recompute: bool
) -> None:
    """Of the whole process at its peak, from start to end: imports, caches, training and a checkpoint."""
    config = folder / "config.toml"
    config.write_text(CONFIG.format(train=train, limit=f"{limit} GiB"), encoding="utf-8")
    shutil.rmtree(folder / "out", ignore_errors=True)
    found: Any = json.loads(vtrain("plan", config, "--json"))
    promise = found["memory"]["promise"]
    assert any("gradient_checkpointing" in words for words in promise["chosen"]) == recompute
    peak = peak_of_run(config) / 2**30
    assert peak <= limit
    assert promise["takes"] / 2**30 == pytest.approx(peak, rel=0.15)
    settings = json.loads((folder / "out" / "plan.json").read_text())["settings"]
    assert bool(settings["precision.gradient_checkpointing"]) == recompute, "recorded as it was chosen"


def vtrain(*arguments: str | Path) -> str:
    return subprocess.run(command(*arguments), check=True, capture_output=True, text=True, env=environment()).stdout


def peak_of_run(config: Path) -> int:
    """Most bytes that the process had at once."""
    process = subprocess.Popen(command("run", config), stdout=subprocess.DEVNULL, env=environment())
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_maxrss * 1024


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from vtrain.cli.app import main; main()", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
