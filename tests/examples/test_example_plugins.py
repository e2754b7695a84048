"""The plugins of examples/plugins pass the conformance kit, as files and from their wheels, and a run uses all of them at once."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile

import pytest

from vtrain.testing import PluginTests

ROOT = Path(__file__).parents[2]
EXAMPLES = {folder.name.removeprefix("vtrain-"): folder for folder in sorted((ROOT / "examples/plugins").glob("*/"))}

CONFIG = """
[run]
output_dir = "output"

[model]
use = "toy"
train = "full"

[precision]
mixed = "no"
base = "fp32"

[[data]]
use = "zip"
path = "clips.zip"
resolution = "64x64"
[data.video]
frames = 9

[train]
steps = {steps}
batch_size = 2

[sampler]
use = "levels"
distribution = "cosmap"

[optimizer]
use = "lion"
lr = 1e-4

[[regularizer]]
use = "disperse"
block = 1

[[tracker]]
use = "post"
url = "{url}"
"""


def loaded(file: Path) -> ModuleType:
    """A module of an example, which its tests can import. No plugin is installed: the registry knows nothing of it."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kit_tests(name: str, folder: Path) -> Iterator[tuple[str, object]]:
    """The classes of an example's tests and their fixtures, but those of the installed plugin, which the wheel's test runs."""
    loaded(folder / f"vtrain_{name}.py")
    for each, value in vars(loaded(folder / f"test_{name}.py")).items():
        if (each.startswith("Test") and not issubclass(value, PluginTests)) or "FixtureFunctionDefinition" in type(
            value
        ).__name__:
            yield each, value


for _name, _folder in EXAMPLES.items():
    globals().update(kit_tests(_name, _folder))


def test_there_is_an_example_of_every_small_kind_and_each_is_small() -> None:
    assert EXAMPLES.keys() == {"disperse", "levels", "lion", "post", "zip"}
    lengths = {
        file.name: len(file.read_text().splitlines()) for each in EXAMPLES.values() for file in each.glob("*.py")
    }
    assert len(lengths) == 10
    assert max(lengths.values()) < 80, lengths


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples, each installed from its wheel, without a network."""
    place = tmp_path_factory.mktemp("examples")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", "wheels", *map(str, EXAMPLES.values())]
    subprocess.run([*pip, *build], cwd=place, check=True)
    wheels = sorted(str(wheel) for wheel in (place / "wheels").glob("*.whl"))
    assert len(wheels) == len(EXAMPLES)
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", "installed", *wheels], cwd=place, check=True
    )
    return place / "installed"


def python(installed: Path, *arguments: str | Path, cwd: Path) -> str:
    """What a Python process with the examples prints."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "VTRAIN_PLUGIN_TIMEOUT": "0"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_passes_its_own_tests_from_its_wheel(name: str, installed: Path, tmp_path: Path) -> None:
    """Slow (5 seconds each, and 15 for the wheels): a process that imports torch."""
    (tmp_path / f"test_{name}.py").write_bytes((EXAMPLES[name] / f"test_{name}.py").read_bytes())
    said = python(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_{name}.py", cwd=tmp_path)
    assert " passed" in said
    assert "failed" not in said


@pytest.mark.slow
def test_a_run_with_all_five_trains_and_is_resumed(installed: Path, service: Any, tmp_path: Path) -> None:
    """Slow (20 seconds): two runs, each a process that imports torch. service: that of vtrain-post's own tests."""
    with ZipFile(tmp_path / "clips.zip", "w") as archive:
        for file in sorted((ROOT / "examples/clips").glob("b*.*")):
            archive.write(file, f"clips/{file.name}")
    for steps in (2, 3):
        text = CONFIG.format(steps=steps, url=service.url)
        (tmp_path / "config.toml").write_text(text, encoding="utf-8")
        said = python(installed, "-m", "vtrain.cli", "run", "config.toml", cwd=tmp_path)
        assert "WARNING" not in said, said
    metrics = [json.loads(line) for line in (tmp_path / "output/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert all(row["terms"]["disperse/loss"] < 0 and math.isfinite(row["loss"]) for row in metrics)
    assert all(sample.startswith("clips.zip/clips/b") for row in metrics for sample in row["samples"]), metrics[0][
        "samples"
    ]
    posted = [step for each in service.received if each["event"] == "logged" for step in each["steps"]]
    assert [(step["step"], step["loss"]) for step in posted] == [(row["step"], row["loss"]) for row in metrics]
    assert len({each["run"] for each in service.received}) == 1, "the resumed run has another name"
    assert [each["step"] for each in service.received if each["event"] == "start"] == [0, 2]
