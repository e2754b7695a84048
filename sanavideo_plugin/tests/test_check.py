"""Every bad model folder is told of before anything is loaded, all its problems at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vtrain.contract import ModelError
from vtrain_sanavideo import tiny
from vtrain_sanavideo.family import SanaVideoFamily

Families = Callable[..., SanaVideoFamily]
TRANSFORMER = Path("transformer", "diffusion_pytorch_model.safetensors")


def said(family: SanaVideoFamily) -> str:
    return "\n".join(map(str, family.check()))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_sound_folder_has_no_problem(family: SanaVideoFamily) -> None:
    assert family.check() == []


def test_a_missing_folder_is_one_problem(tmp_path: Path, family_of: Families) -> None:
    family = family_of(tmp_path / "nowhere")
    assert [problem.where for problem in family.check()] == [str(tmp_path / "nowhere")]
    assert "no such model folder" in said(family)
    with pytest.raises(ModelError, match="no such model folder"):
        _ = family.block_count


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(own_checkpoint: Path, family_of: Families, part: str) -> None:
    shutil.rmtree(own_checkpoint / part)
    places = [problem.where for problem in family_of(own_checkpoint).check()]
    assert places
    assert all(part in place for place in places)


def test_all_problems_are_told_at_once(own_checkpoint: Path, family_of: Families) -> None:
    change(own_checkpoint / "model_index.json", transformer=["diffusers", "WanTransformer3DModel"])
    (own_checkpoint / "tokenizer" / "tokenizer.json").unlink()
    (own_checkpoint / "text_encoder" / "model.safetensors").unlink()
    change(own_checkpoint / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    (own_checkpoint / "vae" / "config.json").write_text("{")
    text = said(family_of(own_checkpoint))
    for words in ("WanTransformer3DModel", "tokenizer.json", "model.safetensors", "flow_prediction", "cannot be read"):
        assert words in text


def test_another_models_class_is_named(own_checkpoint: Path, family_of: Families) -> None:
    change(own_checkpoint / "model_index.json", text_encoder=["transformers", "UMT5EncoderModel"], vae=None)
    text = said(family_of(own_checkpoint))
    assert "text_encoder is a UMT5EncoderModel, and this family works with Gemma2Model" in text
    assert "vae is not listed" in text


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_truncated_weights_are_told_of(own_checkpoint: Path, family_of: Families, part: str) -> None:
    path = next((own_checkpoint / part).glob("*.safetensors"))
    whole = path.read_bytes()
    for length in (len(whole) - 1, 100, 4, 0):
        path.write_bytes(whole[:length])
        problems = family_of(own_checkpoint).check()
        assert [problem.where for problem in problems] == [str(path)]
        assert "truncated" in problems[0].what
    path.write_bytes((8).to_bytes(8, "little") + b"not json" + whole)
    assert "is not a safetensors file" in said(family_of(own_checkpoint))


def test_truncated_weights_are_not_loaded_either(own_checkpoint: Path, family_of: Families) -> None:
    for part in ("transformer", "vae", "text_encoder"):
        path = next((own_checkpoint / part).glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-10])
    family = family_of(own_checkpoint)
    with pytest.raises(ModelError, match="truncated"):
        family.load_denoiser("cpu", "fp32")
    with pytest.raises(ModelError, match="truncated"), family.open_video_codec("cpu"):
        pass
    with pytest.raises(ModelError, match="truncated"), family.text_encoders()["gemma"].open("cpu"):
        pass


def test_a_missing_shard_is_told_of(tmp_path: Path, family_of: Families) -> None:
    folder = tiny.build(tmp_path / "sharded", max_shard_size="1MB")
    family = family_of(folder)
    assert family.check() == []
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    assert [(problem.where, problem.what) for problem in family.check()] == [
        (str(shard), "this weight file is missing.")
    ]
    with pytest.raises(ModelError, match="this weight file is missing"):
        family.load_denoiser("cpu", "fp32")


def test_a_broken_index_of_shards_is_told_of(own_checkpoint: Path, family_of: Families) -> None:
    folder = own_checkpoint / "transformer"
    (own_checkpoint / TRANSFORMER).unlink()
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")
    assert "index of the weights cannot be read" in said(family_of(own_checkpoint))


def test_pickled_weights_are_not_read(own_checkpoint: Path, family_of: Families) -> None:
    (own_checkpoint / TRANSFORMER).rename(own_checkpoint / "transformer" / "diffusion_pytorch_model.bin")
    assert "pickles are not read" in said(family_of(own_checkpoint))


def test_a_shape_that_does_not_fit_the_config_is_told_of(own_checkpoint: Path, family_of: Families) -> None:
    state = load_file(own_checkpoint / TRANSFORMER)
    state["proj_out.weight"] = torch.zeros(64, 95)
    save_file(state, own_checkpoint / TRANSFORMER)
    assert "proj_out.weight is [64, 95] instead of [64, 96]" in said(family_of(own_checkpoint))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": "four"}, "num_layers"),
        ({"guidance_embeds": True}, "guidance_embeds"),
        ({"patch_size": [2, 2, 2]}, "patch_size"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"caption_channels": 32}, "the text encoder's width is 64, and the transformer takes 32"),
    ],
)
def test_a_transformer_config_that_cannot_be_is_told_of(
    own_checkpoint: Path, family_of: Families, values: dict[str, object], words: str
) -> None:
    change(own_checkpoint / "transformer" / "config.json", **values)
    assert words in said(family_of(own_checkpoint))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"_class_name": "AutoencoderDC"}, "this VAE is a AutoencoderDC"),
        ({"z_dim": 48}, "latents_mean: 16, but z_dim asks for 48"),
        (
            {"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8},
            "8 latent channels, and the transformer takes 16",
        ),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial: 16, but dim_mult and patch_size give 8"),
        ({"temperal_downsample": [False, False, True]}, "scale_factor_temporal: 4, but temperal_downsample gives 2"),
        ({"latents_std": [0.0] * 16}, "latents_std"),
    ],
)
def test_a_vae_of_another_kind_is_told_of(
    own_checkpoint: Path, family_of: Families, values: dict[str, object], words: str
) -> None:
    change(own_checkpoint / "vae" / "config.json", **values)
    assert words in said(family_of(own_checkpoint))


def test_vae_path_may_name_a_copy_of_the_same_vae(own_checkpoint: Path, checkpoint: Path, family_of: Families) -> None:
    assert family_of(checkpoint, vae_path=str(own_checkpoint)).check() == []
    alone = own_checkpoint / "vae"
    family = family_of(checkpoint, vae_path=str(alone))
    assert family.check() == []
    with family.open_video_codec("cpu") as codec:
        assert codec.encode(torch.zeros(1, 3, 1, 16, 16)).mean.shape == (1, 16, 1, 2, 2)


def test_vae_path_may_not_name_another_vae(own_checkpoint: Path, checkpoint: Path, family_of: Families) -> None:
    change(own_checkpoint / "vae" / "config.json", latents_mean=[0.0] * 16, base_dim=16)
    assert "base_dim, latents_mean differ" in said(family_of(checkpoint, vae_path=str(own_checkpoint)))
    change(own_checkpoint / "vae" / "config.json", _class_name="AutoencoderKL")
    assert "this VAE is a AutoencoderKL" in said(family_of(checkpoint, vae_path=str(own_checkpoint)))
    missing = family_of(checkpoint, vae_path=str(own_checkpoint / "nowhere"))
    assert "no such model folder" in said(missing)


def test_a_default_that_a_config_leaves_out_is_no_difference(
    own_checkpoint: Path, checkpoint: Path, family_of: Families
) -> None:
    path = own_checkpoint / "vae" / "config.json"
    kept = {
        key: value
        for key, value in json.loads(path.read_text()).items()
        if key in ("base_dim", "dim_mult", "num_res_blocks")
    }
    path.write_text(json.dumps(kept))
    assert family_of(checkpoint, vae_path=str(own_checkpoint)).check() == []


def test_a_revision_of_a_folder_is_told_of(checkpoint: Path, family_of: Families) -> None:
    assert "revision is for hub ids" in said(family_of(checkpoint, revision="main"))


CONFIG = """
[run]
output_dir = "{folder}/out"
[model]
use = "sanavideo"
path = "{model}"
train = "full"
[[data]]
use = "folder"
path = "{folder}"
[train]
steps = 1
[optimizer]
use = "adamw"
lr = 1e-4
"""


def test_a_plan_tells_weights_that_do_not_fit_their_configs_before_anything_is_loaded(
    own_checkpoint: Path, tmp_path: Path
) -> None:
    change(own_checkpoint / "transformer" / "config.json", num_layers=3)
    change(own_checkpoint / "vae" / "config.json", base_dim=16)
    vocabulary = json.loads((own_checkpoint / "text_encoder" / "config.json").read_text())["vocab_size"]
    change(own_checkpoint / "text_encoder" / "config.json", vocab_size=vocabulary + 1)
    (tmp_path / "run.toml").write_text(CONFIG.format(folder=tmp_path, model=own_checkpoint))
    code = "import sys; from vtrain.cli.app import main; sys.argv = ['vtrain', 'plan', sys.argv[1]]; main()"
    command = [sys.executable, "-X", "importtime", "-c", code, str(tmp_path / "run.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "1000"})
    assert done.returncode == 2
    timed = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in timed}
    told = done.stderr
    for words in (
        "transformer_blocks.3.attn1.norm_k.weight is unexpected",
        "encoder.conv_in.weight is [8, 3, 3, 3, 3] instead of [16, 3, 3, 3, 3]",
        f"embed_tokens.weight is [{vocabulary}, 64] instead of [{vocabulary + 1}, 64]",
    ):
        assert words in told
    assert "vtrain_sanavideo" in imported
    assert not imported & {"torch", "diffusers", "transformers", "accelerate"}
