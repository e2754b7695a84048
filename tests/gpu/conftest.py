"""The tiny world on a GPU: runs in this process and in others, and a report that survives a cut.

`python -m pytest tests/gpu` where torch sees a card; elsewhere every test is skipped. VTRAIN_GPU_TESTS=cpu runs on a CPU what means
something there, so that the tests themselves are known to work. The report is written again after each test:
gpu-report.json, or the file that VTRAIN_GPU_REPORT names.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

SETTINGS = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Blocks of memory are split finely, so that a peak is what tensors take and not how they happen to lie.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "HF_HUB_OFFLINE": "1",
}
"""Of the environment where these tests run. CUDA's are read once, when a card is first used: before any test."""

WORLD = Path(__file__).parents[2] / "examples" / "world"
REPORT = Path(os.environ.get("VTRAIN_GPU_REPORT", "gpu-report.json")).absolute()
ON_CPU = os.environ.get("VTRAIN_GPU_TESTS") == "cpu"

CONFIG = """
[run]
output_dir = "{output}"
seed = 42
deterministic = {deterministic}
[model]
use = "sanavideo"
path = "{model}"
train = "{train}"
text_precision = "bf16"
[precision]
mixed = "bf16"
gradient_checkpointing = {checkpointing}
[[data]]
use = "folder"
path = "{clips}"
resolution = ["64x64"]
[data.video]
frames = 9
fps = 8
image_to_video = {image_to_video}
[cache]
dir = "{cache}"
[train]
steps = {steps}
batch_size = 8
caption_dropout = 0.1
log_every = {log_every}
gradient_clip = {{ method = "norm", max = 1.0 }}
[optimizer]
use = "{optimizer}"
lr = 1e-3
[lr_schedule]
use = "constant"
warmup = "5 steps"
[checkpoint]
every = "{every} steps"
keep = "all"
"""
MEASURED = ("seconds", "data_wait", "memory")
"""What of a row of metrics is measured: it differs between runs that are the same."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    missing = not torch.cuda.is_available() and not ON_CPU
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(
                    pytest.mark.skip(reason="torch sees no CUDA device; VTRAIN_GPU_TESTS=cpu runs it on the CPU")
                )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where some of these tests run: others keep the environment that they find."""
    own = [item for item in session.items if Path(__file__).parent in item.path.parents]
    if any(not item.get_closest_marker("skip") for item in own):
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)


@dataclass
class Report:
    """What ran where, and what it measured."""

    began: float = field(default_factory=time.monotonic)
    machine: dict[str, object] = field(default_factory=dict)
    tests: dict[str, dict[str, object]] = field(default_factory=dict)

    def write(self) -> None:
        """Whole or not at all, whenever the machine goes away."""
        seconds = round(time.monotonic() - self.began, 1)
        aside = REPORT.with_name(f".{REPORT.name}.partial")
        content = {"machine": self.machine, "seconds": seconds, "tests": self.tests}
        aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
        aside.replace(REPORT)


_report = Report()


def machine() -> dict[str, object]:
    """Card, driver and versions."""
    import torch

    from vtrain.contract import Device

    device, notices = Device.find()
    figures = device.figures()
    names = ("torch", "diffusers", "transformers", "accelerate", "peft", "vtrain", "vtrain-sanavideo", "vtrain-wan")
    return {
        "device": str(device),
        "name": device.name,
        "capability": device.capability,
        "memory": figures.total if figures else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.accelerated else None,
        "notices": list(notices),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    found: pytest.TestReport = outcome.get_result()
    skipped_here = found.skipped and not _report.machine
    if Path(__file__).parent not in item.path.parents or skipped_here or (found.when != "call" and found.passed):
        return
    _report.machine = _report.machine or machine()
    _report.tests[item.name if found.when == "call" else f"{item.name}, {found.when}"] = {
        "outcome": found.outcome,
        "seconds": round(found.duration, 2),
        **dict(found.user_properties),
        **({"why": str(found.longrepr)[-2000:]} if found.failed else {}),
    }
    _report.write()


@pytest.fixture(scope="session")
def device() -> Any:
    from vtrain.contract import Device

    found, _ = Device.find()
    return found


@pytest.fixture
def card(device: Any) -> Any:
    """The device, for what only a card has."""
    if not device.accelerated:
        pytest.skip("a CPU has none of it")
    return device


@dataclass(frozen=True)
class World:
    """Clips and checkpoint of the tiny world, and an encoder for CREPA. folder: where runs go, each in its own."""

    folder: Path

    def config(self, name: str, more: str = "", **values: object) -> Path:
        """Write the configuration of a run called `name`; `more` is appended. Runs share the cache unless told otherwise."""
        given: dict[str, object] = {
            "train": "full", "steps": 12, "every": 6, "log_every": 3, "image_to_video": 0.0, "checkpointing": "false",
            "deterministic": "true", "optimizer": "adamw", "cache": self.folder / "cache",
        }  # fmt: skip
        places = {"output": self.folder / name, "model": self.folder / "model", "clips": self.folder / "clips"}
        text = CONFIG.format(**given, **places) if not values else CONFIG.format(**(given | values), **places)
        path = self.folder / f"{name}.toml"
        path.write_text(text + more, encoding="utf-8")
        return path

    def rows(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a run."""
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def numbers(self, name: str) -> list[dict[str, Any]]:
        """The same without what is measured."""
        return [{key: value for key, value in row.items() if key not in MEASURED} for row in self.rows(name)]

    def tensors(self, name: str, step: int) -> dict[str, Any]:
        """Every tensor of a checkpoint."""
        from safetensors.torch import load_file

        folder = self.folder / name / "checkpoints" / f"step-{step:06d}"
        files = sorted(folder.rglob("*.safetensors"))
        return {f"{file.relative_to(folder)}:{key}": value for file in files for key, value in load_file(file).items()}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """64 clips, the checkpoint with its trained VAE, and a small DINOv2 of random weights."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    if str(WORLD) not in sys.path:
        sys.path.append(str(WORLD))
    drawing, checkpoint = import_module("world"), import_module("checkpoint")
    folder = tmp_path_factory.mktemp("gpu-world")
    drawing.write_clips(folder / "clips", drawing.clips(64, seed=0))
    checkpoint.build(folder / "model")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "dino")
    return World(folder)


CODE = "from vtrain.cli.app import main; main()"


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `vtrain` in a process of its own; whatever still runs at the end is killed."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "-c", CODE, *map(str, arguments)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return running[-1]

    yield start
    for process in running:
        with process:  # its pipe is closed, whoever read it
            process.kill()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`vtrain run` in this process: importing and opening the card once for all. Gives what was printed."""
    from vtrain.cli.app import main

    def call(config: Path, check: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["vtrain", "run", str(config)])
        out = StringIO()
        with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit) as ended:
            main()
        assert int(ended.value.code or 0) == check, out.getvalue()
        return out.getvalue()

    return call
