"""`vtrain export` of Wan, and LoRA files of other tools to start from: the keys of diffusers, peft, ComfyUI and kohya."""

# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, unused-ignore"
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtrain import api
from vtrain.contract import CheckpointError, ConfigError, Denoiser
from vtrain.plan.adapter import lora_scale
from vtrain.plan.records import Plan
from vtrain.run.prepare import planned
from vtrain.train import checkpoint
from vtrain.train.adapter import start_adapter
from vtrain.train.model import load_model, weights_piece
from vtrain.train.parameters import lora_state
from vtrain.train.pieces import CountersPiece
from vtrain.train.resume import RunState, Start
from vtrain.train.settings import settings

CONFIG = """
[run]
output_dir = "{output}"
[model]
use = "{family}"
path = "{model}"
train = "lora"
[model.lora]
{lora}
[[data]]
use = "folder"
path = "clips"
{more}
[train]
steps = 2
[optimizer]
use = "adamw"
lr = 1e-4
"""

Loaded = tuple[Plan, Denoiser, str]
Load = Callable[..., Loaded]


@pytest.fixture
def load(tmp_path: Path, wan21: Path) -> Load:
    """The plan of a new run, its denoiser as step 0 has it, and the mark of its base."""
    (tmp_path / "clips").mkdir()

    def make(lora: str, output: str = "run", model: Path = wan21, more: str = "") -> Loaded:
        file = tmp_path / f"{output}.toml"
        file.write_text(CONFIG.format(output=output, family="wan21", model=model, lora=lora, more=more))
        plan = planned(file)
        denoiser, base, _ = load_model(plan, Start(None, RunState(0, 0, {}, "", ""), ()), "cpu")
        start_adapter(plan, denoiser)
        return plan, denoiser, base

    return make


def trained(loaded: Loaded) -> Path:
    """A checkpoint of it, each weight of the adapter moved."""
    plan, denoiser, base = loaded
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in denoiser.module.named_parameters():
            if weight.requires_grad:
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
    values = {key: setting.value for key, setting in settings(plan).items()}
    pieces = [weights_piece(plan, denoiser), CountersPiece(RunState(2, 2, values, "", base))]
    return checkpoint.write(plan.config.run.output_dir / "checkpoints", 2, pieces)


def effects(loaded: Loaded) -> dict[str, Tensor]:
    """Module -> scale B A."""
    plan, denoiser, _ = loaded
    table = plan.config.model.table.lora
    assert table is not None
    state = lora_state(denoiser.module)
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {name: lora_scale(table) * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] for name in names}


@pytest.mark.parametrize("lora", ["rank = 4\nalpha = 7\ndropout = 0.5", "rank = 4\nalpha = 3\nrslora = true"])
@pytest.mark.parametrize("form", ["lora", "comfyui"])
def test_diffusers_reads_the_effect_that_was_trained(load: Load, wan21: Path, lora: str, form: Any) -> None:
    folder = trained(loaded := load(lora))
    done = api.export(folder, form=form)
    (file,) = done.folder.glob("*.safetensors")
    transformer = WanTransformer3DModel.from_pretrained(wan21 / "transformer")
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    pipeline = type("Pipeline", (WanLoraLoaderMixin,), {"components": {}, "hf_device_map": None})()
    pipeline.transformer = transformer
    pipeline.load_lora_weights(file)
    transformer.fuse_lora()
    after = {name.replace(".base_layer.", "."): value for name, value in transformer.state_dict().items()}
    wanted = effects(loaded)
    assert len(wanted) > 8
    for name, effect in wanted.items():
        moved = after[f"{name}.weight"] - before[f"{name}.weight"]
        assert torch.allclose(moved, effect, atol=1e-5), name
    assert done.error < 1e-5
    stored = load_file(file)
    if form == "comfyui":
        assert not any(key.endswith(".alpha") for key in stored)
        assert all(key.startswith("diffusion_model.blocks.") for key in stored)
        assert file.name == "run-step-000002-comfyui.safetensors"


def test_layers_outside_the_blocks_are_exported_for_comfyui_or_refused_in_words(load: Load) -> None:
    """diffusers reads an `.alpha` of a block's layers alone, and no adapter of patch_embedding in these keys."""
    outside = 'rank = 2\nalpha = 5\ntargets = ["to_q", "proj_out", "time_proj", "time_embedder.linear_1", "text_embedder.linear_2"]'
    done = api.export(trained(load(outside)), form="comfyui")
    (file,) = done.folder.glob("*.safetensors")
    assert {"diffusion_model.head.head.lora_up.weight", "diffusion_model.time_projection.1.lora_up.weight"} <= set(
        load_file(file)
    )
    assert done.effect is not None
    assert done.effect > 100 * done.error
    folder = trained(load('rank = 2\ntargets = ["patch_embedding", "to_q"]', "second"))
    with pytest.raises(CheckpointError) as raised:
        api.export(folder, form="comfyui")
    (problem,) = raised.value.problems
    assert problem.what.startswith("diffusers does not read an adapter of all these layers in ComfyUI's keys")
    assert "patch_embedding" in problem.what
    assert ".partial" not in str(raised.value)
    assert "--format lora" in problem.remedy


def test_a_pipeline_of_image_to_video_has_its_image_encoder_too(load: Load, i2v: Path) -> None:
    more = "[data.video]\nimage_to_video = 1.0"
    folder = trained(load("rank = 2", model=i2v, more=more))
    done = api.export(folder, form="pipeline")
    assert {path.name for path in done.folder.iterdir() if path.is_dir()} == {
        path.name for path in i2v.iterdir() if path.is_dir()
    }
    index = json.loads((i2v / "model_index.json").read_text())
    assert json.loads((done.folder / "model_index.json").read_text()) == index


def kohya(name: str) -> str:
    """musubi-tuner's name of a module: its own, with underscores."""
    return "lora_unet_" + name.replace(".", "_")


def written(file: Path, source: Path, style: str, scale: float) -> None:
    """The adapter of a checkpoint in the keys of another tool."""
    state = load_file(source / "pytorch_lora_weights.safetensors")
    state = {name.removeprefix("transformer."): value for name, value in state.items()}
    out: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    for name, value in state.items():
        module, end = name.rsplit(".lora_", 1)
        theirs = (
            module.replace("attn1", "self_attn").replace("attn2", "cross_attn").replace("to_out.0", "o")
            .replace("to_q", "q").replace("to_k", "k").replace("to_v", "v")
            .replace("ffn.net.0.proj", "ffn.0").replace("ffn.net.2", "ffn.2")
        )  # fmt: skip
        down = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[end]
        key = {
            "bare": name,
            "peft": f"base_model.model.{name}",
            "comfyui": f"diffusion_model.{theirs}.{down}",
            "comfyui without alpha": f"diffusion_model.{theirs}.lora_{end}",
            "kohya": f"{kohya(theirs)}.{down}",
        }[style]
        # A tool that knows no alpha has the scale in its weights.
        folded = style in ("bare", "peft", "comfyui without alpha") and end.startswith("B")
        out[key] = value * scale if folded else value
        if not key.endswith(("lora_A.weight", "lora_B.weight")):
            out[f"{key.removesuffix('.' + down)}.alpha"] = torch.tensor(scale * 4)
    save_file(out, file, metadata)


@pytest.mark.parametrize("style", ["bare", "peft", "comfyui", "comfyui without alpha", "kohya"])
def test_a_lora_of_another_tool_starts_a_run_with_its_effect(load: Load, tmp_path: Path, style: str) -> None:
    source = load("rank = 4\nalpha = 6", "first")
    written(tmp_path / "other.safetensors", trained(source), style, 1.5)
    second = load(f'rank = 4\nalpha = 9\nstart = "{tmp_path / "other.safetensors"}"', "second")
    wanted, found = effects(source), effects(second)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)


def test_a_convolution_has_room_for_a_rank_of_its_inputs_at_every_tap(load: Load) -> None:
    """peft's A of it reads 16 channels at 1 x 2 x 2 places."""
    target = 'targets = ["patch_embedding"]'
    shape = load(f"rank = 1\n{target}")[0].family.load_denoiser("cpu", "fp32").module.patch_embedding.weight.shape
    outside, inside = shape[0], shape[1:].numel()
    room = min(outside, inside)
    assert room > shape[1], "else this shows nothing"
    assert not any("model.lora.rank" in each for each in load(f"rank = {room}\n{target}")[0].warnings)
    (warning,) = (each for each in load(f"rank = {room + 1}\n{target}")[0].warnings if "model.lora.rank" in each)
    assert f"patch_embedding is {inside} -> {outside}" in warning


def test_a_lora_of_another_model_is_refused_by_the_plan(load: Load, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 8)}, file)
    with pytest.raises(ConfigError, match=r"half of blocks\.0\.attn1\.to_q"):
        load(f'rank = 4\nstart = "{file}"')
    pair = {f"transformer.blocks.0.attn1.to_q.lora_{side}.weight": torch.ones(8, 8) for side in "AB"}
    save_file(pair, file)
    with pytest.raises(ConfigError, match="another width"):
        load(f'rank = 8\nstart = "{file}"')
    save_file({**pair, "text_encoder.layer.lora_A.weight": torch.ones(8, 8)}, file)
    with pytest.raises(ConfigError, match=r"no place for text_encoder\.layer\.lora_A"):
        load(f'rank = 8\nstart = "{file}"')
