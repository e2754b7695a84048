"""A quantised base on a card: what its numbers stand for, in every form that quanto gives weights there, and no compiler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtrain.contract.precision import STORAGE, StorageName

Record = Callable[[str, object], None]
QUANTISED = [name for name, storage in STORAGE.items() if storage.quantised]
SIDES = [(2240, 2240), (1536, 1536), (896, 2240), (100, 64), (256, 48), (192, 7)]
"""(in, out): of SANA-Video 2B, of Wan 1.3B and of a smaller model, whose fp8 weights quanto would give its own kernel; odd ones."""


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What quanto would compile raises."""
    from optimum.quanto.library.extensions import extension

    def load(**_: Any) -> None:
        raise AssertionError("quanto compiles a kernel")

    monkeypatch.setattr(extension, "load", load)


def apart(ours: Tensor, wanted: Tensor) -> float:
    ours, wanted = ours.detach().double().cpu(), wanted.detach().double().cpu()
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("there", [False, True], ids=["quantised on the CPU", "quantised there"])
@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("base", QUANTISED)
def test_a_quantised_layer_on_a_card_gives_its_product_and_its_bias(
    device: Any, record_property: Record, base: StorageName, sides: tuple[int, int], there: bool
) -> None:
    """Biases as large as the products, so that one that is forgotten is seen; and the gradient of the input."""
    from vtrain.train.precision import quantise_block

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(*sides)).bfloat16()
    with torch.no_grad():
        plain[0].bias.normal_()
    quantised = copy.deepcopy(plain)
    if there:
        quantised.to(device.torch)
    quantise_block(quantised, "block", STORAGE[base], (), kept := {})
    quantised.to(device.torch)
    value = torch.randn(3, 5, sides[0], dtype=torch.bfloat16)
    ours, theirs = (value.to(place, copy=True).requires_grad_() for place in (device.torch, "cpu"))
    out, wanted = quantised(ours), plain(theirs)
    slope = torch.randn_like(wanted)
    out.backward(slope.to(device.torch))
    wanted.backward(slope)
    assert ours.grad is not None
    assert theirs.grad is not None
    found = apart(out, wanted), apart(ours.grad, theirs.grad)
    record_property("relative error of output and gradient", found)
    assert not kept
    assert max(found) < {"int8": 0.02, "fp8": 0.06, "int4": 0.2}[base]
    weight = quantised[0].weight
    assert "Marlin" not in type(weight).__name__
    if STORAGE[base].bits == 8:
        exact = value.double() @ weight.dequantize().double().cpu().T + plain[0].bias.double()
        assert apart(out, exact) < 0.01, "other than what its numbers stand for"


@pytest.mark.parametrize("base", QUANTISED)
def test_a_quantised_model_leaves_the_card_and_comes_back(
    device: Any, record_property: Record, base: StorageName
) -> None:
    """As offload.model_cpu has it. The error of a whole prediction is near the one that the plan states."""
    from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel

    from vtrain.contract import FrameRule, LatentGeometry
    from vtrain.train.offload import resting
    from vtrain.train.precision import quantise
    from vtrain_sanavideo.denoiser import SanaVideoDenoiser

    torch.manual_seed(0)
    model = SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=8, attention_head_dim=112, num_layers=4,
        num_cross_attention_heads=8, cross_attention_head_dim=112, cross_attention_dim=896, caption_channels=64,
        mlp_ratio=2.5, sample_size=30, patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads",
    ).bfloat16()  # fmt: skip
    latents, text = torch.randn(1, 16, 2, 4, 4).bfloat16(), torch.randn(1, 4, 64).bfloat16()

    def predicted(module: nn.Module) -> Tensor:
        with torch.no_grad():
            given = latents.to(device.torch), text.to(device.torch), torch.full((1,), 500.0, device=device.torch)
            found: Tensor = module(given[0], encoder_hidden_states=given[1], timestep=given[2], return_dict=False)[0]
        return found

    denoiser = SanaVideoDenoiser(copy.deepcopy(model), LatentGeometry(16, FrameRule(4, 1), 8, (1, 2, 2)))
    assert quantise(denoiser, STORAGE[base], denoiser.lora_targets, str(device), there=False) == ""
    wanted, before = predicted(model.to(device.torch)), predicted(denoiser.module)
    with resting(denoiser.module, None, to_cpu=True, device=device):
        assert {weight.device.type for weight in denoiser.module.parameters()} == {"cpu"}
    after, error = predicted(denoiser.module), apart(before, wanted)
    record_property("error of a prediction", error)
    assert torch.equal(before, after)
    assert 0 < error < 3 * (STORAGE[base].error or 0)
