"""Benchmarks are scripts: they are run as such, and their modules loaded by path."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate.state import AcceleratorState

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WORLD = BENCHMARKS.parent / "examples" / "world"
MODULES = (
    "bare",
    "crepa",
    "crepa_memory",
    "efficientnet",
    "features",
    "gpu_results",
    "gpu_rows",
    "gpu_sana2b",
    "gpu_sides",
    "measured",
    "report",
    "startup",
    "steadiness",
    "step",
    "tiny_world",
    "workload",
    "works",
    "world_time",
)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module of benchmarks/, as its scripts import it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def load(name: str) -> ModuleType:
        loaded = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, loaded)
        return loaded

    return load


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Run a script of benchmarks/ on a CPU; gives what it printed and what it wrote to --json."""

    def run(name: str, *arguments: str) -> tuple[str, dict[str, Any]]:
        numbers = tmp_path / "numbers.json"
        command = [sys.executable, str(BENCHMARKS / name), *arguments, "--json", str(numbers)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads(numbers.read_text(encoding="utf-8"))

    return run


@pytest.fixture
def script_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[str, dict[str, Any]]]]:
    """As `script`, in this process, which has imported torch and diffusers already."""
    for folder in (WORLD, BENCHMARKS):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    known = set(sys.modules)

    def run(name: str, *arguments: str) -> tuple[str, dict[str, Any]]:
        numbers = tmp_path / "numbers.json"
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--json", str(numbers)])
        AcceleratorState._reset_state(reset_partial_state=True)
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return capsys.readouterr().out, json.loads(numbers.read_text(encoding="utf-8"))

    yield run
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]
