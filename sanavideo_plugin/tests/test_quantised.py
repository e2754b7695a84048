"""A quantised base of SANA-Video: its convolutions, levels for each frame, adapters, and checkpoints quantised already."""

# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, unused-ignore"
from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vtrain.config.tables import LoraTable
from vtrain.contract import Condition, Device, NoiseLevel, Text, TextPart, timed
from vtrain.contract.precision import STORAGE, StorageName
from vtrain.plan.precision import quantised
from vtrain.train.parameters import add_lora, trained
from vtrain.train.precision import held_bytes, quantise
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.options import SanaVideoOptions

QUANTISED = [name for name, storage in STORAGE.items() if storage.quantised]


@pytest.fixture
def family(checkpoint: Path) -> SanaVideoFamily:
    return SanaVideoFamily(SanaVideoOptions(path=str(checkpoint)))


def loaded(family: SanaVideoFamily, base: StorageName, targets: tuple[str, ...] | None = None) -> Any:
    denoiser = family.load_denoiser("cpu", "bf16")
    if STORAGE[base].quantised:
        quantise(denoiser, STORAGE[base], targets or denoiser.lora_targets, "cpu", there=False)
    return denoiser


def predicted(family: SanaVideoFamily, denoiser: Any, frames: bool = False) -> Tensor:
    """frames: with a level for each latent frame, the first of which is clean, as image-to-video has it."""
    generator = torch.Generator().manual_seed(3)
    (encoder,) = family.text_encoders().values()
    (text,) = encoder.parts.values()
    part = TextPart(torch.randn(1, 20, text.width, generator=generator), torch.ones(1, 20, dtype=torch.bool))
    sigma = torch.tensor([[0.0, 0.6]]) if frames else torch.tensor([0.6])
    noisy = torch.randn(1, 16, 2, 8, 8, generator=generator)
    out: Tensor = denoiser.predict(noisy, timed(family, NoiseLevel(sigma)), Condition(Text({"text": part})))
    return out.float()


@pytest.mark.parametrize("base", QUANTISED)
def test_linear_and_convolutions_are_quantised_and_the_plan_counted_them_right(
    family: SanaVideoFamily, base: StorageName
) -> None:
    denoiser, found = loaded(family, base), quantised(family, STORAGE[base], ())
    assert found is not None
    kinds = {type(module).__name__ for module in denoiser.module.modules() if hasattr(module, "qweight")}
    assert kinds == {"QLinear", "QConv2d"}
    assert sum(map(held_bytes, denoiser.module.parameters())) == found.total_bytes
    assert sum(hasattr(module, "qweight") for module in denoiser.module.modules()) == found.layers
    assert not found.kept
    with torch.no_grad():
        for frames in (False, True):
            wanted, got = (predicted(family, each, frames) for each in (loaded(family, "bf16"), denoiser))
            assert 0 < float((got - wanted).norm() / wanted.norm()) < 3 * (STORAGE[base].error or 0)


def test_a_convolution_that_gets_an_adapter_stays_bf16_and_learns(family: SanaVideoFamily) -> None:
    targets = ("to_q", "ff.conv_point")
    denoiser = loaded(family, "int8", targets)
    found = quantised(family, STORAGE["int8"], targets)
    assert found is not None
    assert list(found.kept) == [f"transformer_blocks.{n}.ff.conv_point" for n in range(family.block_count)]
    add_lora(denoiser, LoraTable(rank=2, targets=targets), 0, "")
    with Device().autocast("bf16"):
        predicted(family, denoiser).square().mean().backward()
    names = [name for name, weight in trained(denoiser.module) if weight.grad is not None]
    assert any("ff.conv_point" in name for name in names)


def test_an_adapter_on_a_quantised_convolution_would_be_loud(family: SanaVideoFamily) -> None:
    """Which is why such a convolution is not quantised."""
    from peft import LoraConfig, inject_adapter_in_model

    config, denoiser = LoraConfig(r=2, target_modules=["ff.conv_point"]), loaded(family, "int8")
    with pytest.raises((ValueError, TypeError, RuntimeError, AttributeError)):
        _adapted(family, denoiser, config, inject_adapter_in_model)


def _adapted(family: SanaVideoFamily, denoiser: Any, config: object, inject: Callable[..., object]) -> None:
    inject(config, denoiser.module, "x")
    with torch.no_grad():
        predicted(family, denoiser)


def test_checkpointing_changes_no_gradient_on_a_quantised_base(family: SanaVideoFamily) -> None:
    gradients = []
    for checkpointing in (False, True):
        denoiser = loaded(family, "int8")
        add_lora(denoiser, LoraTable(rank=2), 0, "")
        for module in denoiser.module.modules():  # peft begins with an adapter that changes nothing
            if isinstance(module, nn.Linear) and module.weight.dtype is torch.float32:
                nn.init.normal_(module.weight, std=0.02, generator=torch.Generator().manual_seed(1))
        denoiser.gradient_checkpointing(checkpointing)
        denoiser.module.train()
        with Device().autocast("bf16"):
            predicted(family, denoiser).square().mean().backward()
        gradients.append([weight.grad for _, weight in trained(denoiser.module)])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_fusing_an_adapter_into_quantised_weights_is_wrong_which_is_why_nothing_does_it(
    family: SanaVideoFamily,
) -> None:
    """In silence, or loudly: an adapter is merged into the bf16 model, never into what was quantised."""
    denoiser = loaded(family, "int4")
    add_lora(denoiser, LoraTable(rank=4, alpha=32.0), 0, "")
    generator = torch.Generator().manual_seed(1)
    for _, weight in trained(denoiser.module):
        nn.init.normal_(weight, std=0.02, generator=generator)
    with torch.no_grad():
        wanted = predicted(family, denoiser)
        try:
            for module in denoiser.module.modules():
                if hasattr(module, "merge") and hasattr(module, "lora_A"):
                    module.merge()
            got = predicted(family, denoiser)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return
    assert not torch.allclose(got, wanted, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_that_is_quantised_already_is_refused_by_its_headers(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state = {
        name: value.to(torch.float8_e4m3fn) if value.ndim == 2 and "attn1" in name else value
        for name, value in state.items()
    }
    save_file(state, file)
    problems = SanaVideoFamily(SanaVideoOptions(path=str(folder))).check()
    (found,) = [problem for problem in problems if "quantised" in problem.what]
    assert "F8_E4M3" in found.what
    assert "bf16 or fp32; precision.base quantises them" in found.remedy
    assert not SanaVideoFamily(SanaVideoOptions(path=str(checkpoint))).check()
