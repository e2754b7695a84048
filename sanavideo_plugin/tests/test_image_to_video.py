"""A level for each latent frame: as diffusers' pipeline gives it, with checkpointing and an adapter; what it takes in memory."""

# peft and diffusers are untyped.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from torch._subclasses.fake_tensor import FakeTensorMode

from vtrain.contract import Condition, DType, LatentShape, NoiseLevel, Text
from vtrain.testing.family import MemoryTests, measured
from vtrain_sanavideo.denoiser import SanaVideoDenoiser
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.flow import SanaVideoFlow
from vtrain_sanavideo.options import SanaVideoFlowOptions, SanaVideoOptions

LATENTS = LatentShape(16, 3, 4, 6)
BLOCKS = 4
SIZES_2B = {
    "num_attention_heads": 20, "attention_head_dim": 112, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240, "num_layers": 20, "mlp_ratio": 3.0,
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def condition(batch: int) -> Condition:
    mask = torch.arange(12) < torch.tensor([[5], [12]])[:batch]
    return Condition(Text.of(normal(batch, 12, 64, seed=2) * mask[..., None], mask))


def mixed() -> NoiseLevel:
    """Of an image-to-video clip and a text-to-video clip."""
    timestep = torch.tensor([[0.0, 300.0, 300.0], [800.0, 800.0, 800.0]])
    return NoiseLevel(timestep / 1000, timestep)


def test_levels_by_frame_are_the_timesteps_by_token_that_the_pipeline_gives(family: SanaVideoFamily) -> None:
    """SanaImageToVideoPipeline hands the transformer (B, 1, f, h, w) timesteps on the grid of patches. Bit for bit."""
    denoiser = family.load_denoiser("cpu", "fp32")
    module = denoiser.module
    assert isinstance(module, SanaVideoTransformer3DModel)
    noisy, text = normal(2, *LATENTS), condition(2).text
    by_token = mixed().timestep[:, None, :, None, None].expand(2, 1, 3, 2, 3)
    with torch.no_grad():
        ours = denoiser.predict(noisy, mixed(), condition(2))
        theirs = module(
            noisy,
            encoder_hidden_states=text.only.embeds,
            encoder_attention_mask=text.only.mask.long(),
            timestep=by_token,
            return_dict=False,
        )[0]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_frame_at_level_0_is_the_clean_one_bit_for_bit(dtype: torch.dtype) -> None:
    flow = SanaVideoFlow(SanaVideoFlowOptions(), {})
    clean, noise = (normal(2, *LATENTS, seed=seed).to(dtype) for seed in (3, 4))
    noisy, _ = flow.corrupt(clean, noise, mixed())
    assert torch.equal(noisy[0, :, 0], clean[0, :, 0])
    whole, _ = flow.corrupt(clean, noise, NoiseLevel(mixed().sigma[:, 1], mixed().timestep[:, 1]))
    assert torch.equal(noisy[1], whole[1])
    assert torch.equal(noisy[0, :, 1:], whole[0, :, 1:])


def adapted(denoiser: SanaVideoDenoiser) -> SanaVideoDenoiser:
    """With an adapter that does something."""
    denoiser.module.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=list(denoiser.lora_targets)), denoiser.module)
    for name, parameter in denoiser.module.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(normal(*parameter.shape, seed=len(name)) / 10)
    return denoiser


@pytest.mark.parametrize("train", ["full", "lora"])
def test_gradients_are_the_same_with_and_without_checkpointing(family: SanaVideoFamily, train: str) -> None:
    denoiser = family.load_denoiser("cpu", "fp32")
    denoiser.module.requires_grad_(True).train()
    if train == "lora":
        adapted(denoiser)
    found = []
    for on in (False, True):
        denoiser.gradient_checkpointing(on)
        denoiser.module.zero_grad()
        prediction = denoiser.predict(normal(2, *LATENTS), mixed(), condition(2))
        torch.autograd.backward(prediction[0, :, 1:].square().mean() + prediction[1].square().mean())
        found.append({name: p.grad.clone() for name, p in denoiser.module.named_parameters() if p.grad is not None})
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    assert len(plain) > 10
    for name, gradient in plain.items():
        assert gradient.any(), name
        assert torch.equal(gradient, checkpointed[name]), name


@contextlib.contextmanager
def kept(denoiser: SanaVideoDenoiser, *inputs: torch.Tensor) -> Iterator[dict[int, int]]:
    """Bytes by storage of all that autograd keeps meanwhile, weights and inputs left out."""
    own = {each.untyped_storage().data_ptr() for each in (*inputs, *denoiser.module.parameters())}
    found: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


TYPES = pytest.mark.parametrize(("weights", "compute"), [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])


def price(family: SanaVideoFamily, weights: DType, compute: DType, tokens: int, *, checkpointing: bool) -> float:
    """Of a level for each frame, beyond one for the clip."""
    found = [family.block_memory(weights=weights, compute=compute, frame_levels=each) for each in (True, False)]
    kept = [each.kept(tokens, family.block_count, checkpointing=checkpointing) for each in found if each is not None]
    return kept[0] - kept[1]


@TYPES
def test_the_price_is_what_autograd_keeps_more(family: SanaVideoFamily, weights: DType, compute: DType) -> None:
    """Counted in tensors saved for the backward pass; with checkpointing, one block's come when it is recomputed."""
    noisy, given = normal(1, *LATENTS), condition(1)

    def held(timestep: list[float] | list[list[float]], checkpointing: bool) -> int:
        denoiser = family.load_denoiser("cpu", weights)
        denoiser.module.requires_grad_(True).train()
        denoiser.gradient_checkpointing(checkpointing)
        level = NoiseLevel(torch.tensor(timestep) / 1000, torch.tensor(timestep))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=compute == "bf16")
        with kept(denoiser, noisy, given.text.only.embeds) as found, autocast:
            denoiser.predict(noisy, level, given)
        return sum(found.values())

    more = [held([[0.0, 500.0, 500.0]], on) - held([500.0], on) for on in (False, True)]
    # The first token's would be there for the clip as a whole.
    tokens, width, size = 3 * 2 * 3 - 1, 96, 4 if weights == "fp32" else 2
    block = 8 * tokens * width * size
    assert price(family, weights, compute, tokens, checkpointing=False) == more[0]
    assert price(family, weights, compute, tokens, checkpointing=True) == more[1] + block
    assert more[0] > BLOCKS * block


@pytest.mark.slow
@TYPES
@pytest.mark.parametrize("frame_levels", [False, True])
@pytest.mark.parametrize("model", ["checkpoint", "checkpoint_720p"])
def test_the_stored_memory_of_the_2b_model_is_what_is_measured(
    tmp_path: Path, request: pytest.FixtureRequest, model: str, weights: DType, compute: DType, frame_levels: bool
) -> None:
    """Its transformer at full size, on fake weights; the codec and the text of the tiny one, which do not count.

    Slow: eight seconds each.
    """
    own_checkpoint = Path(shutil.copytree(request.getfixturevalue(model), tmp_path / "model"))
    family = SanaVideoFamily(SanaVideoOptions(path=str(own_checkpoint)))
    examples = MemoryTests.examples(family, frame_levels)
    file = own_checkpoint / "transformer" / "config.json"
    real = json.loads(file.read_text()) | SIZES_2B
    file.write_text(json.dumps(real))
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = SanaVideoTransformer3DModel.from_config(real)
        if weights == "bf16":
            for part in module.modules():
                for name, weight in part.named_parameters(recurse=False):
                    setattr(part, name, torch.nn.Parameter(weight.detach().bfloat16()))
    found = measured(family, SanaVideoDenoiser(module, family._geometry), examples, compute)
    stored = SanaVideoFamily(SanaVideoOptions(path=str(own_checkpoint))).block_memory(
        weights=weights, compute=compute, frame_levels=frame_levels
    )
    assert stored == found
