"""The modules of examples/world: plain scripts that import one another by name, as when they are run."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

WORLD = Path(__file__).parents[2] / "examples" / "world"


@pytest.fixture(scope="session", autouse=True)
def _importable() -> None:
    if str(WORLD) not in sys.path:
        sys.path.append(str(WORLD))


@pytest.fixture(scope="session")
def world(_importable: None) -> ModuleType:
    return import_module("world")


@pytest.fixture(scope="session")
def judge(_importable: None) -> ModuleType:
    return import_module("judge")


@pytest.fixture(scope="session")
def train_vae(_importable: None) -> ModuleType:
    return import_module("train_vae")


@pytest.fixture(scope="session")
def checkpoint(_importable: None) -> ModuleType:
    return import_module("checkpoint")


@pytest.fixture(scope="session")
def evaluate(_importable: None) -> ModuleType:
    return import_module("evaluate")


@pytest.fixture(scope="session")
def demo(_importable: None) -> ModuleType:
    return import_module("demo")


@pytest.fixture(scope="session")
def built(checkpoint: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the tiny world."""
    folder: Path = checkpoint.build(tmp_path_factory.mktemp("world") / "checkpoint")
    return folder
