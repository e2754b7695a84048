from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vtrain.contract import CheckpointOptions
from vtrain_wan import tiny
from vtrain_wan.family import TI2VFamily, Wan21Family
from vtrain_wan.plugin import WAN21, Wan21Options


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow of the kit (1 to 3 s each): memory as it is measured, that of what core itself opens and closes, graphs of blocks, and
    weights of other bytes."""
    slow = ("the_stored_memory_of_blocks", "the_text_encoders_are_released", "the_codec_is_released")
    slow += ("a_block_is_one_graph", "fingerprints_change_with_weights")
    for item in items:
        if item.path.parent == Path(__file__).parent and any(name in item.name for name in slow):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def wan21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of Wan 2.1. Not to be written to."""
    return tiny.build(tmp_path_factory.mktemp("tiny") / "wan21")


@pytest.fixture(scope="session")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of Wan 2.2 TI2V. Not to be written to."""
    return tiny.build(tmp_path_factory.mktemp("tiny") / "ti2v", ti2v=True)


@pytest.fixture(scope="session")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of Wan 2.1 image-to-video. Not to be written to."""
    return tiny.build(tmp_path_factory.mktemp("tiny") / "i2v", i2v=True)


@pytest.fixture(params=["wan21", "ti2v"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Each of the two that take text alone, in turn."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Path)
    return found


@pytest.fixture
def own_checkpoint(wan21: Path, tmp_path: Path) -> Path:
    """A copy of Wan 2.1 to break."""
    return Path(shutil.copytree(wan21, tmp_path / "model"))


@pytest.fixture
def family_of() -> Callable[..., Wan21Family]:
    """Build the family that the folder is named after, in fp32 unless told otherwise."""

    def build(folder: Path, **options: object) -> Wan21Family:
        chosen = {"text_precision": "fp32", "path": str(folder)} | options
        if folder.name == "ti2v":
            return TI2VFamily(CheckpointOptions.model_validate(chosen))
        built = WAN21.build(Wan21Options.model_validate(chosen))
        assert isinstance(built, Wan21Family)
        return built

    return build


@pytest.fixture
def family(checkpoint: Path, family_of: Callable[..., Wan21Family]) -> Wan21Family:
    return family_of(checkpoint)


@pytest.fixture
def sha256() -> Callable[[Path], str]:
    return lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
