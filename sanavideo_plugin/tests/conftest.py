from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vtrain_sanavideo import tiny
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.options import SanaVideoOptions


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint. Not to be written to."""
    return tiny.build(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def checkpoint_720p(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of the 720p model's format. Not to be written to."""
    return tiny.build(tmp_path_factory.mktemp("tiny-720p") / "checkpoint", resolution="720p")


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


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of random weights in transformers' layout, 64 wide."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino") / "model"
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)  # type: ignore[arg-type]
    return folder
