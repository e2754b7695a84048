# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from vtrain.contract import Condition, DType, LatentShape, ModelError, NoiseLevel, SupportsLora, Text
from vtrain_sanavideo import tiny
from vtrain_sanavideo.denoiser import SanaVideoDenoiser
from vtrain_sanavideo.family import SanaVideoFamily

Families = Callable[..., SanaVideoFamily]
LATENTS = LatentShape(16, 3, 4, 6)
WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def condition(batch: int = 2) -> Condition:
    mask = torch.arange(12) < torch.tensor([[5], [12]])[:batch]
    return Condition(Text.of(normal(batch, 12, 64, seed=2) * mask[..., None], mask))


def level(*timesteps: float) -> NoiseLevel:
    return NoiseLevel(torch.tensor(timesteps) / 1000, torch.tensor(timesteps))


def predict(denoiser: SanaVideoDenoiser) -> torch.Tensor:
    with torch.no_grad():
        return denoiser.predict(normal(2, *LATENTS), level(300, 800), condition())


def theirs(module: SanaVideoTransformer3DModel, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The call that SanaVideoPipeline makes: inputs in the weights' type, an int64 mask, int64 timesteps."""
    text = condition().text
    with torch.no_grad():
        found = module(
            normal(2, *LATENTS).to(dtype),
            encoder_hidden_states=text.only.embeds.to(dtype),
            encoder_attention_mask=text.only.mask.long(),
            timestep=torch.tensor([300, 800]),
            return_dict=False,
        )[0]
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_prediction_is_bit_for_bit_diffusers_own(family: SanaVideoFamily, checkpoint: Path, name: DType) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    module = SanaVideoTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer", torch_dtype=dtype)
    denoiser = family.load_denoiser("cpu", name)
    assert torch.equal(predict(denoiser), theirs(module, dtype))
    assert {key: value.dtype for key, value in denoiser.module.state_dict().items()} == {
        key: value.dtype for key, value in module.state_dict().items()
    }
    assert type(denoiser.module) is SanaVideoTransformer3DModel


def test_rotary_tables_stay_fp32_and_are_those_of_from_pretrained(family: SanaVideoFamily, checkpoint: Path) -> None:
    module = SanaVideoTransformer3DModel.from_pretrained(
        checkpoint, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    loaded = dict(family.load_denoiser("cpu", "bf16").module.named_buffers())
    wanted = dict(module.named_buffers())
    assert loaded.keys() == wanted.keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, wanted[key]) for key, value in loaded.items())


def test_sharded_weights_load(tmp_path: Path, checkpoint: Path, family: SanaVideoFamily, family_of: Families) -> None:
    sharded = tiny.build(tmp_path / "sharded", max_shard_size="1MB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 2
    assert torch.equal(
        predict(family_of(sharded).load_denoiser("cpu", "fp32")), predict(family.load_denoiser("cpu", "fp32"))
    )


def test_a_scale_shift_table_with_a_leading_one_loads_and_is_logged(
    own_checkpoint: Path, family: SanaVideoFamily, family_of: Families, caplog: pytest.LogCaptureFixture
) -> None:
    state = load_file(own_checkpoint / WEIGHTS)
    state["scale_shift_table"] = state["scale_shift_table"][None].contiguous()
    save_file(state, own_checkpoint / WEIGHTS)
    changed = family_of(own_checkpoint)
    assert changed.check() == []
    with caplog.at_level(logging.INFO, "vtrain.contract.weights"):
        denoiser = changed.load_denoiser("cpu", "fp32")
    assert "scale_shift_table is stored as [1, 2, 96]" in caplog.text
    assert torch.equal(predict(denoiser), predict(family.load_denoiser("cpu", "fp32")))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer_blocks.0.scale_shift_table", (1, 6, 96)),
        ("scale_shift_table", (1, 1, 2, 96)),
        ("proj_out.bias", (1, 64)),
    ],
)
def test_no_other_leading_one_is_dropped(
    own_checkpoint: Path, family_of: Families, name: str, shape: tuple[int, ...]
) -> None:
    state = load_file(own_checkpoint / WEIGHTS)
    state[name] = state[name].reshape(shape)
    save_file(state, own_checkpoint / WEIGHTS)
    with pytest.raises(ModelError, match="instead of"):
        family_of(own_checkpoint).load_denoiser("cpu", "fp32")


def test_weights_that_do_not_fit_are_named_five_at_most(own_checkpoint: Path, family_of: Families) -> None:
    state = load_file(own_checkpoint / WEIGHTS)
    state.pop("proj_out.weight")
    state["patch_embedding.bias"] = torch.zeros(95)
    state |= {f"stranger.{number}": torch.zeros(1) for number in range(6)}
    save_file(state, own_checkpoint / WEIGHTS)
    with pytest.raises(ModelError) as caught:
        family_of(own_checkpoint).load_denoiser("cpu", "fp32")
    said = str(caught.value)
    assert "proj_out.weight is missing; patch_embedding.bias is [95] instead of [96]; stranger.0 is unexpected" in said
    assert said.count("stranger") == 3
    assert "and 3 more" in said


def test_inputs_take_the_weights_type_unless_autocast_chooses(family: SanaVideoFamily) -> None:
    assert predict(family.load_denoiser("cpu", "bf16")).dtype == torch.bfloat16
    master = family.load_denoiser("cpu", "fp32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = predict(master)
    exact = predict(master)
    assert exact.dtype == torch.float32
    assert not torch.equal(mixed.float(), exact)
    assert (mixed.float() - exact).norm() / exact.norm() < 0.03


def test_one_timestep_for_each_latent_frame_equals_one_for_the_clip_when_they_agree(family: SanaVideoFamily) -> None:
    denoiser = family.load_denoiser("cpu", "fp32")
    frames = NoiseLevel(level(300, 800).sigma[:, None].repeat(1, 3), level(300, 800).timestep[:, None].repeat(1, 3))
    with torch.no_grad():
        found = denoiser.predict(normal(2, *LATENTS), frames, condition())
    torch.testing.assert_close(found, predict(denoiser), rtol=1e-4, atol=1e-5)
    frames.timestep[0, 0] = 0.0
    with torch.no_grad():
        other = denoiser.predict(normal(2, *LATENTS), frames, condition())
    assert not torch.allclose(other[0], found[0], atol=1e-3)
    torch.testing.assert_close(other[1], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 16, 3, 5, 6), (1, 16, 3, 4, 7), (1, 4, 3, 4, 6), (16, 3, 4, 6)])
def test_latents_that_patches_do_not_cover_are_refused(family: SanaVideoFamily, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="latents"):
        family.load_denoiser("cpu", "fp32").predict(normal(*shape), level(500), condition(1))


def test_a_condition_it_does_not_know_is_refused(family: SanaVideoFamily) -> None:
    asked = Condition(condition(1).text, {"first_frame": torch.zeros(1)})
    with pytest.raises(ValueError, match="first_frame"):
        family.load_denoiser("cpu", "fp32").predict(normal(1, *LATENTS), level(500), asked)


def test_fold_puts_each_token_where_its_patch_is(family: SanaVideoFamily) -> None:
    """The patch embedding of a clip, flattened as the transformer flattens it, folds back to the convolution's own grid."""
    denoiser = family.load_denoiser("cpu", "fp32")
    module = denoiser.module
    assert isinstance(module, SanaVideoTransformer3DModel)
    with torch.no_grad():
        grid = module.patch_embedding(normal(2, *LATENTS))
    tokens = grid.flatten(2).transpose(1, 2)
    assert torch.equal(denoiser.fold(tokens, LATENTS), grid.permute(0, 2, 3, 4, 1))


def test_checkpointing_is_non_reentrant_and_can_be_turned_off(
    family: SanaVideoFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = family.load_denoiser("cpu", "fp32")
    real: Callable[..., object] = torch.utils.checkpoint.checkpoint
    seen: list[object] = []

    def spy(*args: object, **settings: object) -> object:
        seen.append(settings.get("use_reentrant"))
        return real(*args, **settings)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", spy)
    denoiser.gradient_checkpointing(True)
    denoiser.predict(normal(2, *LATENTS), level(300, 800), condition()).sum().backward()
    assert seen == [False] * len(denoiser.blocks)
    denoiser.gradient_checkpointing(False)
    denoiser.predict(normal(2, *LATENTS), level(300, 800), condition()).sum().backward()
    assert len(seen) == len(denoiser.blocks)


def test_weights_of_another_model_are_refused(family: SanaVideoFamily, family_of: Families, tmp_path: Path) -> None:
    other = family_of(tiny.build(tmp_path / "other", layers=2))
    denoiser = other.load_denoiser("cpu", "fp32")
    denoiser.save(tmp_path / "saved", denoiser.module.state_dict())
    with pytest.raises(ModelError, match="their config differs"):
        family.load_denoiser("cpu", "fp32", weights=tmp_path / "saved")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_saved_state_has_the_files_that_diffusers_itself_writes(
    family: SanaVideoFamily, tmp_path: Path, dtype: Any
) -> None:
    """Byte for byte those of save_pretrained on the module, and so is a state that the module never had, if it gets it."""
    denoiser = family.load_denoiser("cpu", dtype)
    denoiser.save(tmp_path / "own", denoiser.module.state_dict())
    given = {name: value + 1 for name, value in denoiser.module.state_dict().items()}
    denoiser.save(tmp_path / "given", given)
    denoiser.module.save_pretrained(tmp_path / "own-expected")  # type: ignore[operator]
    denoiser.module.load_state_dict(given)
    denoiser.module.save_pretrained(tmp_path / "given-expected")  # type: ignore[operator]
    for name in ("own", "given"):
        saved, expected = tmp_path / name / "transformer", tmp_path / f"{name}-expected"
        assert sorted(path.name for path in saved.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
        for path in saved.iterdir():
            assert path.read_bytes() == (expected / path.name).read_bytes()


def test_a_state_of_another_model_is_not_saved(family: SanaVideoFamily, tmp_path: Path) -> None:
    denoiser = family.load_denoiser("cpu", "fp32")
    state = dict(denoiser.module.state_dict())
    state["proj_out.weight"] = state["proj_out.weight"][:-1]
    with pytest.raises(RuntimeError, match=r"size mismatch for proj_out\.weight"):
        denoiser.save(tmp_path, state)
    assert list(tmp_path.iterdir()) == []


PLAIN_DIFFUSERS = """
import sys, torch
from diffusers import SanaVideoPipeline, SanaVideoTransformer3DModel
model, adapter, full, out = sys.argv[1:]
pipeline = SanaVideoPipeline.from_pretrained(model)
pipeline.load_lora_weights(adapter)
inputs = torch.load(f"{out}/inputs.pt", weights_only=True)
with torch.no_grad():
    lora = pipeline.transformer.eval()(**inputs, return_dict=False)[0]
    whole = SanaVideoTransformer3DModel.from_pretrained(full)(**inputs, return_dict=False)[0]
torch.save({"lora": lora, "full": whole}, f"{out}/outputs.pt")
assert not [name for name in sys.modules if name.startswith("vtrain")]
"""


@pytest.mark.long
def test_plain_diffusers_loads_what_is_saved(family: SanaVideoFamily, checkpoint: Path, tmp_path: Path) -> None:
    """An adapter whose alpha is not its rank, and full weights, in a process that never imports vtrain."""
    adapted, full = family.load_denoiser("cpu", "fp32"), family.load_denoiser("cpu", "fp32")
    assert isinstance(adapted, SupportsLora)
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 32,
        "target_modules": sorted(adapted.lora_targets),
        "lora_dropout": 0.0,
    }
    inject_adapter_in_model(LoraConfig(**settings), adapted.module)
    with torch.no_grad():
        for name, weight in adapted.module.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.02 * normal(*weight.shape, seed=len(name)))
        for weight in full.module.parameters():
            weight.add_(0.01 * normal(*weight.shape, seed=weight.numel()))
    adapted.save_lora(tmp_path / "adapter", get_peft_model_state_dict(adapted.module), settings)
    full.save(tmp_path / "full", full.module.state_dict())
    text = condition().text
    inputs = {
        "hidden_states": normal(2, *LATENTS),
        "encoder_hidden_states": text.only.embeds,
        "encoder_attention_mask": text.only.mask,
        "timestep": torch.tensor([300.0, 800.0]),
    }
    torch.save(inputs, tmp_path / "inputs.pt")
    paths = [checkpoint, tmp_path / "adapter", tmp_path / "full" / "transformer", tmp_path]
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS, *map(str, paths)], check=True, capture_output=True)
    found = torch.load(tmp_path / "outputs.pt", weights_only=True)
    torch.testing.assert_close(found["lora"], predict(adapted), rtol=1e-5, atol=1e-6)
    assert torch.equal(found["full"], predict(full))
    plain = predict(family.load_denoiser("cpu", "fp32"))
    assert (found["lora"] - plain).norm() / plain.norm() > 0.05


def test_an_adapter_without_its_scale_is_not_written(family: SanaVideoFamily, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_alpha"):
        family.load_denoiser("cpu", "fp32").save_lora(tmp_path, {"a.lora_A.weight": torch.zeros(1)}, {"r": 4})


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", {"unet.a.lora_A.weight": torch.zeros(1)}])
def test_an_adapter_that_cannot_be_read_is_an_error(family: SanaVideoFamily, tmp_path: Path, content: object) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        save_file(content, path)
    with pytest.raises(ModelError, match="pytorch_lora_weights"):
        family.load_denoiser("cpu", "fp32").load_lora(tmp_path)


def test_the_adapters_file_tells_rank_and_alpha(family: SanaVideoFamily, tmp_path: Path) -> None:
    from safetensors import safe_open

    settings = {"r": 4, "lora_alpha": 8.0, "target_modules": ["to_q"], "lora_dropout": 0.0}
    key = "transformer_blocks.0.attn1.to_q.lora_A.weight"
    family.load_denoiser("cpu", "fp32").save_lora(tmp_path, {key: torch.zeros(4, 96)}, settings)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert told == {f"transformer.{name}": value for name, value in settings.items()}
