"""[memory] kept: the memory that runs of the 104 M model take on a CPU, against limits and against the estimate.

The estimate is judged by growth: the peak of a process less what it held before it loaded the model. Of the estimate its allowance
for that goes off too (IMPORTED): imports would hide what a small model lacks. What kernels and the allocator take varies from run to
run: the whole process keeps the limit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from vtrain.plan.memory import IMPORTED
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

PROGRAM = """
import json, os, resource, sys
import diffusers, peft, transformers
from diffusers import AutoencoderKLWan, SanaVideoTransformer3DModel
from vtrain.cli.app import main
from vtrain.train import assemble

def loading(*arguments):
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with open(os.environ["MEASURED"], "w") as file:
        file.write(str(held))
    return load(*arguments)

load, assemble.load_model = assemble.load_model, loading
main()
"""
"""A run that writes down how many bytes it holds before it loads the model, with all imported that it uses."""

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
        ("full", 3.6, True),
        ("full", 3.2, True),
        pytest.param(
            "full", 2.5, True, marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="adamw8bit")
        ),
        ("lora", 2.8, False),
        ("lora", 2.1, True),
        ("lora", 1.6, True),
    ],
)
def test_a_run_keeps_its_limit_and_grows_by_what_was_estimated(
    folder: Path, train: str, limit: float, recompute: bool
) -> None:
    """Training and a checkpoint, with full caches."""
    config = folder / "config.toml"
    config.write_text(CONFIG.format(train=train, limit=f"{limit} GiB"), encoding="utf-8")
    vtrain("cache", "fill", config)
    shutil.rmtree(folder / "out", ignore_errors=True)
    found: Any = json.loads(vtrain("plan", config, "--json"))
    promise = found["memory"]["promise"]
    assert any("gradient_checkpointing" in words for words in promise["chosen"]) == recompute
    before, peak = (size / 2**30 for size in memory_of_run(config))
    imported, growth = IMPORTED / 2**30, peak - before
    assert before <= imported
    assert peak <= limit
    assert promise["takes"] / 2**30 - imported == pytest.approx(growth, rel=0.15)
    settings = json.loads((folder / "out" / "plan.json").read_text())["settings"]
    assert bool(settings["precision.gradient_checkpointing"]) == recompute, "recorded as it was chosen"


def vtrain(*arguments: str | Path) -> str:
    return subprocess.run(command(*arguments), check=True, capture_output=True, text=True, env=environment()).stdout


def memory_of_run(config: Path) -> tuple[int, int]:
    """Bytes that the process held before it loaded the model, and the most that it had at once."""
    measured = config.with_name("measured")
    process = subprocess.Popen(
        command("run", config, program=PROGRAM),
        stdout=subprocess.DEVNULL,
        env=environment() | {"MEASURED": str(measured)},
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return int(measured.read_text()), used.ru_maxrss * 1024


def command(*arguments: str | Path, program: str = "from vtrain.cli.app import main; main()") -> list[str]:
    return [sys.executable, "-c", program, *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
