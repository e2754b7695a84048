"""What an export of SANA-Video is proved against: the trained model rounded as the file is, on the base that it was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vtrain import api
from vtrain.contract import CheckpointError
from vtrain.run.trained_model import open_source
from vtrain.train import adapter
from vtrain.train.resume import RunState, read_state

Trained = Callable[..., tuple[Path, Any, Any]]
WEAK = "rank = 4\nalpha = 0.005"
"""It changes less than rounding to bf16 does."""


def recorded(monkeypatch: pytest.MonkeyPatch, folder: Path, **settings: object) -> None:
    """The checkpoint says other settings; "__" stands for a dot."""
    read: RunState = read_state(folder)
    values = {**read.settings, **{name.replace("__", "."): value for name, value in settings.items()}}
    monkeypatch.setattr("vtrain.train.resume.read_state", lambda path: replace(read, settings=values))


def test_rounding_is_told_apart_from_what_is_proved(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 an adapter that is not in the file is found, also where it changes less than rounding does."""
    folder, *_ = trained(WEAK)
    done = api.export(folder, form="merged", dtype="bf16")
    assert done.effect is not None
    assert done.rounding is not None
    assert done.error < 1e-6 < done.effect < done.rounding
    assert done.tolerance < done.rounding
    assert any(text.startswith("rounding moves the prediction") for text in done.warnings)
    assert json.loads((done.folder / "export.json").read_text())["proof"]["rounding"] == done.rounding

    def unmerged(module: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        own = {name: value for name, value in module.state_dict().items() if "lora_" not in name}
        return {name.replace(".base_layer.", "."): value.to(dtype) for name, value in own.items()}

    monkeypatch.setattr(adapter, "merged_state", unmerged)
    with pytest.raises(CheckpointError, match="predicts otherwise than the trained model"):
        api.export(folder, folder.parents[2] / "unmerged", "merged", dtype="bf16")


@pytest.mark.parametrize("wrong", ["half", "nan"])
def test_a_merge_that_is_wrong_is_no_rounding(trained: Trained, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    folder, *_ = trained(WEAK)
    merge = adapter.merge

    def merged(module: Any) -> None:
        merge(module)
        for name, value in module.named_parameters():
            if name.endswith("attn1.to_q.base_layer.weight"):
                value.data.add_(1e-3 if wrong == "half" else torch.nan)

    monkeypatch.setattr(adapter, "merge", merged)
    monkeypatch.setattr("vtrain.run.proof.merge", merged)
    with pytest.raises(CheckpointError, match="predicts otherwise than the trained model"):
        api.export(folder, form="merged", dtype="bf16")


@pytest.mark.parametrize("base", ["int8", "bf16"])
def test_another_base_is_refused_however_it_was_stored(
    trained: Trained, own_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    """A quantised base is marked as it was read, in bf16."""
    folder, *_ = trained("rank = 4")
    recorded(monkeypatch, folder, precision__base=base)
    if base == "int8":
        assert api.export(folder, folder.parents[2] / "same", model=str(own_checkpoint)).step == 2
    weights = own_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    stored = load_file(weights)
    save_file({name: value + 1 for name, value in stored.items()}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match="trained on other weights"):
        api.export(folder, folder.parents[2] / "other", model=str(own_checkpoint))


def test_a_model_of_the_hub_that_lies_in_a_folder_now_has_no_revision(
    trained: Trained, own_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *_ = trained("rank = 4")
    recorded(monkeypatch, folder, model__path="owner/name", model__revision="abc123")
    source = open_source(folder, model=str(own_checkpoint))
    assert dict(source.model) == {"path": str(own_checkpoint)}


def test_a_vae_that_was_moved_is_missed_by_a_pipeline_alone(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *_ = trained("rank = 4")
    recorded(monkeypatch, folder, model__vae_path=str(tmp_path / "moved"))
    done = api.export(folder)
    assert any("model.vae_path is not at" in text for text in done.warnings)
    with pytest.raises(CheckpointError, match="a pipeline needs what"):
        api.export(folder, form="pipeline")
    shutil.rmtree(done.folder)
