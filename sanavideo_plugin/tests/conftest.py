from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vtrain_sanavideo import tiny
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.options import SanaVideoOptions


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint. Not to be written to."""
    return tiny.build(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def own_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def family_of() -> Callable[..., SanaVideoFamily]:
    """Build a family on a folder, in fp32 unless told otherwise."""

    def build(folder: Path, **options: object) -> SanaVideoFamily:
        return SanaVideoFamily(
            SanaVideoOptions.model_validate({"text_precision": "fp32", "path": str(folder)} | options)
        )

    return build


@pytest.fixture
def family(checkpoint: Path, family_of: Callable[..., SanaVideoFamily]) -> SanaVideoFamily:
    return family_of(checkpoint)


@pytest.fixture
def sha256() -> Callable[[Path], str]:
    return lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
