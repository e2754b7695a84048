"""The averaged weights of a checkpoint, read by diffusers' own classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vtrain.config.tables import EmaTable, LoraTable
from vtrain.contract import Denoiser, Device
from vtrain.train.ema import Average, AveragePiece
from vtrain.train.parameters import add_lora, lora_settings, trained
from vtrain_sanavideo.plugin import SANAVIDEO
from vtrain_sanavideo.tiny import build


@pytest.fixture
def moved(tmp_path: Path) -> tuple[Denoiser, Path]:
    family = SANAVIDEO.build(SANAVIDEO.options.model_validate({"path": str(build(tmp_path / "tiny"))}))
    return family.load_denoiser("cpu", "fp32"), tmp_path


def after_a_step(denoiser: Denoiser) -> Average:
    """Of weights that are all 1 higher than it began with, at decay 0.75."""
    average = Average(trained(denoiser.module), EmaTable(decay=0.75, warmup=False), Device())
    with torch.no_grad():
        for _, weights in trained(denoiser.module):
            weights.add_(1)
    average.update()
    return average


def test_from_pretrained_loads_the_average_of_all_weights(moved: tuple[Denoiser, Path]) -> None:
    from diffusers import SanaVideoTransformer3DModel

    denoiser, folder = moved
    denoiser.module.requires_grad_(True)
    before = {name: value.clone() for name, value in denoiser.module.state_dict().items()}
    average = after_a_step(denoiser)
    piece = AveragePiece(denoiser, average, None, lambda folder: denoiser)
    assert piece.bytes == 4 * sum(value.numel() for value in before.values())
    piece.write(folder, piece.gather(keep=True))
    loaded = SanaVideoTransformer3DModel.from_pretrained(folder / "ema" / "transformer")
    found = loaded.state_dict()
    assert found.keys() == before.keys()
    assert all(value.dtype is torch.float32 for value in found.values())
    for name, value in before.items():
        assert torch.allclose(found[name], value + 0.25, atol=1e-5), name


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_a_pipeline_of_diffusers_finds_the_averaged_adapter(moved: tuple[Denoiser, Path], base: torch.dtype) -> None:
    """fp32, whatever the base is stored in; and it comes back bit for bit."""
    from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin

    denoiser, folder = moved
    denoiser.module.to(base)
    table = LoraTable(rank=2, alpha=8.0)
    add_lora(denoiser, table, 3, "")
    before = {name: value.detach().float().clone() for name, value in trained(denoiser.module)}
    average = after_a_step(denoiser)
    piece = AveragePiece(denoiser, average, lora_settings(denoiser, table), lambda folder: denoiser)
    piece.write(folder, piece.gather(keep=True))
    state, metadata = SanaLoraLoaderMixin.lora_state_dict(folder / "ema", return_lora_metadata=True)
    assert metadata["transformer.lora_alpha"] == 8.0
    assert len(state) == len(before)
    for name, value in before.items():
        found = state[f"transformer.{name.replace('.default', '')}"]
        assert found.dtype is torch.float32
        assert torch.allclose(found, value + 0.25, atol=1e-5), name
    again = Average(trained(denoiser.module), EmaTable(), Device())
    back = AveragePiece(denoiser, again, lora_settings(denoiser, table), lambda folder: denoiser)
    back.load(folder)
    assert (again.steps, again.taken) == (1, 1)
    assert all(torch.equal(again.weights[name], value) for name, value in average.weights.items())
