"""The helpers for models of diffusers and transformers, with classes that no part of vtrain is written for."""

# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from vtrain.contract import (
    ClipShape,
    Condition,
    DiffusersDenoiser,
    FrameRule,
    LatentGeometry,
    LatentShape,
    ModelError,
    NoiseLevel,
    NormalizedCodec,
    SupportsDecoderOnly,
    comfyui_names,
    load_autoencoder,
    load_module,
    load_pretrained,
    opened,
    read_codec,
    save_lora_file,
)

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "ffn_dim": 32, "num_layers": 2, "freq_dim": 16,
}  # fmt: skip
NARROW: dict[str, Any] = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
RESIDUAL: dict[str, Any] = {
    "base_dim": 8, "decoder_base_dim": 12, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "z_dim": 4, "patch_size": 2,
    "in_channels": 12, "out_channels": 12, "is_residual": True, "latents_mean": [0.5] * 4, "latents_std": [2.0] * 4,
    "scale_factor_spatial": 16,
}  # fmt: skip
"""Of the kind with a patch before its convolutions, whose decoder has a width of its own."""
GEOMETRY = LatentGeometry(16, FrameRule(4, 1), 8, (1, 2, 2))
RENAMES = {
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip


class Denoiser(DiffusersDenoiser):
    lora_targets = ("to_q",)

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        return noisy

    def lora_loader(self) -> Any:
        return WanLoraLoaderMixin


def test_a_denoiser_that_lacks_what_its_adapters_need_is_no_denoiser() -> None:
    """Else it would be missed when the first adapter is saved."""
    unfinished: Any = type("Unfinished", (DiffusersDenoiser,), {"predict": Denoiser.predict})
    with pytest.raises(TypeError, match=r"lora_loader.*lora_targets|lora_targets.*lora_loader"):
        unfinished(None, GEOMETRY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("models")
    WanTransformer3DModel(**TRANSFORMER).save_pretrained(made / "transformer")
    AutoencoderKLWan(**NARROW).save_pretrained(made / "vae")
    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    UMT5EncoderModel(UMT5Config(**sizes)).save_pretrained(made / "text")  # type: ignore[arg-type]
    return made


def denoiser(folder: Path) -> Denoiser:
    module = load_module(WanTransformer3DModel, folder / "transformer", "fp32", "cpu")
    return Denoiser(module, GEOMETRY, blocks="blocks")


def test_a_module_is_what_from_pretrained_loads_its_buffers_included(folder: Path) -> None:
    ours = load_module(WanTransformer3DModel, folder / "transformer", "bf16", "cpu")
    theirs = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    assert not ours.training
    buffers = dict(theirs.named_buffers())
    assert buffers
    assert all(torch.equal(value, buffers[name]) for name, value in ours.named_buffers())
    wanted = dict(theirs.named_parameters())
    assert {value.dtype for value in wanted.values()} == {torch.float32, torch.bfloat16}
    assert all(value.dtype == wanted[name].dtype for name, value in ours.named_parameters())
    assert all(torch.equal(value, wanted[name]) for name, value in ours.named_parameters())


def test_a_denoiser_saves_a_state_that_is_not_its_modules(folder: Path, tmp_path: Path) -> None:
    made = denoiser(folder)
    assert [type(block).__name__ for block in made.blocks] == ["WanTransformerBlock"] * 2
    state = {name: value + 1 for name, value in made.module.state_dict().items()}
    made.save(tmp_path, state)
    saved = WanTransformer3DModel.from_pretrained(tmp_path / "transformer").state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], value) for name, value in state.items())
    with pytest.raises(RuntimeError, match="Missing key"):
        made.save(tmp_path, dict(list(state.items())[1:]))


def test_checkpointing_goes_on_and_off(folder: Path) -> None:
    made = denoiser(folder)
    made.gradient_checkpointing(True)
    assert made.module.is_gradient_checkpointing  # type: ignore[truthy-function]
    made.gradient_checkpointing(False)
    assert not made.module.is_gradient_checkpointing  # type: ignore[truthy-function]


def test_taps_fold_into_the_grid_of_patches_and_odd_latents_are_refused(folder: Path) -> None:
    made = denoiser(folder)
    noisy = torch.randn(2, 16, 3, 4, 6)
    grid = made.module.patch_embedding(noisy)  # type: ignore[operator]
    folded = made.fold(grid.flatten(2).transpose(1, 2), LatentShape(16, 3, 4, 6))
    assert torch.equal(folded, grid.permute(0, 2, 3, 4, 1))
    made.check_latents(noisy)
    for odd in (noisy[:, :, :, :3], noisy[..., :5], noisy[:, :4], noisy[0]):
        with pytest.raises(ValueError, match="latents"):
            made.check_latents(odd)


def adapter(made: Denoiser) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": ["to_q", "to_out.0", "ffn.net.0.proj"]}
    inject_adapter_in_model(LoraConfig(**settings), made.module)
    return get_peft_model_state_dict(made.module), settings


def test_an_adapter_comes_back_by_its_own_names_with_its_scale_in_the_file(folder: Path, tmp_path: Path) -> None:
    made = denoiser(folder)
    state, settings = adapter(made)
    made.save_lora(tmp_path, state, settings)
    back = made.load_lora(tmp_path)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    read, metadata = WanLoraLoaderMixin.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert read.keys() == {f"transformer.{name}" for name in state}
    assert metadata["transformer.lora_alpha"] == 8
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.r"] == 2
    with pytest.raises(ValueError, match="lora_alpha"):
        save_lora_file(tmp_path, state, {"r": 2}, WanLoraLoaderMixin)


def test_an_adapter_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    made = denoiser(folder)
    with pytest.raises(ModelError, match="cannot be read"):
        made.load_lora(tmp_path)
    save_file({"unet.a.lora_A.weight": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ModelError, match="no adapter of a WanTransformer3DModel: it has unet"):
        made.load_lora(tmp_path)


def test_diffusers_reads_comfyuis_names_back_as_peft_wrote_them(folder: Path) -> None:
    """Its own conversion of adapters that others trained: written by others, in the other direction."""
    state, _ = adapter(denoiser(folder))
    names = comfyui_names(state, RENAMES)
    assert names["blocks.1.attn1.to_out.0.lora_B.weight"] == "diffusion_model.blocks.1.self_attn.o.lora_up.weight"
    assert names["blocks.0.ffn.net.0.proj.lora_A.weight"] == "diffusion_model.blocks.0.ffn.0.lora_down.weight"
    read = _convert_non_diffusers_wan_lora_to_diffusers({names[name]: value for name, value in state.items()})
    assert read.keys() == {f"transformer.{name}" for name in state}
    assert all(torch.equal(read[f"transformer.{name}"], value) for name, value in state.items())


def test_names_are_renamed_by_whole_parts_the_longest_first() -> None:
    names = ("blocks.10.to_q.lora_A.weight", "blocks.10.to_q_norm.lora_A.weight", "a.b.c.lora_A.weight")
    assert list(comfyui_names(names, {"to_q": "q", "a.b": "x", "b": "y"}).values()) == [
        "diffusion_model.blocks.10.q.lora_down.weight",
        "diffusion_model.blocks.10.to_q_norm.lora_down.weight",
        "diffusion_model.x.c.lora_down.weight",
    ]
    assert comfyui_names(names[:1], {}) == {names[0]: "diffusion_model.blocks.10.to_q.lora_down.weight"}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["blocks.0.to_q.weight"], "no weight of a LoRA adapter"),
        (["blocks.0.to_q.lora_A.weight", "blocks.0.q.lora_A.weight"], "two weights would both be called"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(names: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        comfyui_names(names, {"to_q": "q"})


def test_a_text_encoder_is_frozen_and_its_faults_are_those_of_its_load_report(folder: Path, tmp_path: Path) -> None:
    ours = load_pretrained(UMT5EncoderModel, folder / "text", "fp32", "cpu", "text encoder")
    theirs = UMT5EncoderModel.from_pretrained(folder / "text")
    tokens = torch.tensor([[3, 4, 1]])
    with torch.no_grad():  # attention with gradients takes another path, of other last bits
        assert torch.equal(ours(tokens)[0], theirs.eval()(tokens)[0])
    assert not ours.training
    assert not any(weight.requires_grad for weight in ours.parameters())
    state = {name: value.clone() for name, value in load_file(folder / "text" / "model.safetensors").items()}
    state["encoder.final_layer_norm.weight"] = torch.zeros(3)
    state["odd.weight"] = torch.zeros(1)
    del state["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "text" / "config.json").read_bytes())
    with pytest.raises(ModelError) as raised:
        load_pretrained(UMT5EncoderModel, tmp_path, "fp32", "cpu", "text encoder")
    for words in (
        "encoder.block.0.layer.0.SelfAttention.q.weight is missing",
        "encoder.final_layer_norm.weight is [3] instead of [16]",
        "odd.weight is unexpected",
    ):
        assert words in str(raised.value)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="this weight file is missing"):
        load_pretrained(UMT5EncoderModel, tmp_path, "fp32", "cpu", "text encoder")


@pytest.mark.parametrize("sizes", [NARROW, {}, RESIDUAL], ids=["narrow", "default", "residual"])
def test_shapes_and_factors_of_a_codec_are_those_of_diffusers_module(tmp_path: Path, sizes: dict[str, Any]) -> None:
    with torch.device("meta"):
        module = AutoencoderKLWan(**sizes)
    (tmp_path / "config.json").write_text(json.dumps(dict(module.config)))
    config = read_codec(tmp_path, {})
    theirs = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert config.shapes().items() <= theirs.items()
    assert config.space_factor == module.config.scale_factor_spatial
    assert config.time_factor == module.config.scale_factor_temporal


@pytest.mark.parametrize("sizes", [NARROW, RESIDUAL], ids=["narrow", "residual"])
def test_a_codec_normalises_as_its_statistics_say_and_takes_what_its_geometry_says(
    tmp_path: Path, sizes: dict[str, Any]
) -> None:
    AutoencoderKLWan(**sizes).save_pretrained(tmp_path)
    config = read_codec(tmp_path, {})
    geometry = config.geometry()
    vae = AutoencoderKLWan.from_pretrained(tmp_path).eval()
    pixels = torch.rand(1, 3, 5, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(numbers).view(1, -1, 1, 1, 1) for numbers in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        latents = (vae.encode(pixels).latent_dist.mode() - mean) / std
        frames = vae.decode(latents / (1.0 / std) + mean).sample

    def load() -> NormalizedCodec:
        loaded = load_autoencoder(AutoencoderKLWan, tmp_path, "fp32", "cpu")
        return NormalizedCodec(loaded, torch.tensor(config.latents_mean), config.latents_std, geometry, "this VAE")

    with opened(load, "cpu") as codec:
        assert torch.equal(codec.encode(pixels).mean, latents)
        assert tuple(latents.shape[1:]) == geometry.latent_shape(ClipShape(5, 32, 64), "x")
        with pytest.raises(ValueError, match=f"this VAE takes multiples of {config.space_factor}"):
            codec.encode(pixels[..., :-2])
        assert isinstance(codec, SupportsDecoderOnly)
        codec.drop_encoder()
        assert torch.equal(codec.decode(latents), frames)
        with pytest.raises(RuntimeError, match="let go of what encodes"):
            codec.encode(pixels)
    with pytest.raises(RuntimeError, match="closed"):
        codec.decode(latents)


def test_a_first_latent_frame_that_would_stand_for_no_frame_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8k\+0: the first latent frame would stand for none"):
        LatentGeometry(16, FrameRule(8, 0), 8)


def test_each_pixel_frame_belongs_to_one_latent_frame() -> None:
    for rule in (FrameRule(4, 1), FrameRule(8, 1), FrameRule(4, 4)):
        geometry = LatentGeometry(16, rule, 8)
        frames = geometry.latent_shape(ClipShape(rule.offset + 3 * rule.stride, 8, 8), "x").frames
        assert [number for latent in range(frames) for number in geometry.pixel_frames(latent)] == list(
            range(rule.offset + 3 * rule.stride)
        )
