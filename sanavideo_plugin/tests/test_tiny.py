# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import SanaVideoPipeline

from vtrain_sanavideo import tiny


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_weights(checkpoint: Path, tmp_path: Path) -> None:
    again = contents(tiny.build(tmp_path / "again"))
    assert again == contents(checkpoint)
    other = contents(tiny.build(tmp_path / "other", seed=1))
    assert sorted(name for name in again if again[name] != other[name]) == [
        "text_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_building_leaves_the_random_state_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    tiny.build(tmp_path / "model", layers=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_pipeline_of_diffusers_loads_it_and_makes_a_video(checkpoint: Path) -> None:
    pipeline = SanaVideoPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        "a cat", height=64, width=96, frames=5, num_inference_steps=2, use_resolution_binning=False, output_type="pt"
    ).frames
    assert tuple(frames.shape) == (1, 5, 3, 64, 96)
    assert frames.isfinite().all()
    assert frames.std() > 0


def test_the_tokenizer_is_built_as_gemmas(checkpoint: Path) -> None:
    tokenizer = SanaVideoPipeline.from_pretrained(checkpoint, transformer=None, text_encoder=None, vae=None).tokenizer
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id] == [
        0,
        1,
        2,
        3,
    ]
    assert tokenizer("").input_ids == [2]
    text = "a cat walks, 走る ü"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert 3 not in tokenizer(text).input_ids


def test_the_command_line_writes_a_checkpoint_that_checks(tmp_path: Path, family_of: Callable[..., object]) -> None:
    command = [sys.executable, "-m", "vtrain_sanavideo.tiny"]
    text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "random weights" in text
    subprocess.run([*command, str(tmp_path / "made"), "--layers", "2"], capture_output=True, check=True)
    made = family_of(tmp_path / "made")
    assert made.check() == []  # type: ignore[attr-defined]
    assert made.block_count == 2  # type: ignore[attr-defined]
