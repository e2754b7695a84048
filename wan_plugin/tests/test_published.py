"""Wan's checkpoints as they are published: their sizes, and what they hold beside what the classes of diffusers read."""

# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, unused-ignore"
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vtrain.contract import CheckpointSource, ClipShape, Size
from vtrain.testing.family import MemoryTests, measured
from vtrain_wan import checkpoint, tiny
from vtrain_wan.denoiser import WanDenoiser
from vtrain_wan.family import Wan21Family

Families = Callable[..., Wan21Family]

PUBLISHED = {
    # name: width, heads, layers, feed-forward, channels, parameters (counted by the class itself on the meta device)
    "Wan 2.1 text-to-video 1.3B": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan 2.1 text-to-video 14B": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    "Wan 2.1 image-to-video 14B": {
        "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "in_channels": 36, "image_dim": 1280,
        "added_kv_proj_dim": 5120,
    },
    "Wan 2.2 TI2V 5B": {
        "num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48,
    },
}  # fmt: skip
"""What Wan's published configs say beside the class's defaults."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_and_names_of_the_published_models_are_those_of_diffusers_class(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        module = WanTransformer3DModel(**PUBLISHED[name])
    module.save_config(tmp_path)
    config = checkpoint.read_transformer(tmp_path)
    assert config.shapes() == {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert config.parameters == sum(value.numel() for value in module.parameters())
    assert checkpoint.identity(config.shapes()) == name


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_stored_memory_of_the_published_models_is_what_is_measured(
    name: str, wan21: Path, i2v: Path, ti2v: Path, family_of: Families, tmp_path: Path
) -> None:
    """Slow (a minute): transformers at full size on fake weights; the codec and the text of the tiny one, which do not count."""
    chosen = ti2v if "TI2V" in name else i2v if "image" in name else wan21
    # With fp32 text, as all figures are: levels of frames take its type, and beside bf16 text keep 2 bytes less for each number.
    small = family_of(chosen)
    narrow = {"text_dim": 64} | ({"image_dim": tiny.IMAGE_WIDTH} if chosen is i2v else {})
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = WanTransformer3DModel(**PUBLISHED[name] | narrow)
    model = tmp_path / small._source.folder.name
    shutil.copytree(small._source.folder, model)
    module.save_config(model / "transformer")
    for levels in {False, small.frame_levels}:
        examples = MemoryTests.examples(small, levels)
        for compute in ("fp32", "bf16"):
            found = measured(small, WanDenoiser(module, small._geometry, blocks="blocks"), examples, compute)
            stored = family_of(model).block_memory(weights="fp32", compute=compute, frame_levels=levels)
            assert stored == found


@pytest.fixture
def own(i2v: Path, tmp_path: Path) -> Path:
    """A copy of Wan 2.1 image-to-video to change."""
    return Path(shutil.copytree(i2v, tmp_path / "i2v"))


def test_weights_that_the_class_reads_over_are_no_fault(own: Path, family_of: Families) -> None:
    """The published image-to-video transformers hold a norm_added_q in each block, all zeros."""
    assert list(checkpoint.IGNORED) == WanTransformer3DModel._keys_to_ignore_on_load_unexpected
    file = own / "transformer" / "diffusion_pytorch_model.safetensors"
    stored = load_file(file)
    save_file(stored | {f"blocks.{n}.attn2.norm_added_q.weight": torch.zeros(96) for n in range(4)}, file)
    family = family_of(own)
    assert family.check() == []
    assert family.load_denoiser("cpu", "fp32").module.state_dict().keys() == stored.keys()
    save_file(stored | {"blocks.0.attn2.norm_added_v.weight": torch.zeros(96)}, file)
    (problem,) = family_of(own).check()
    assert "norm_added_v.weight is unexpected" in problem.what


def test_an_image_encoder_with_a_projection_gives_the_same_embedding(own: Path, i2v: Path, family_of: Families) -> None:
    """As diffusers' conversion script saves it; the pipeline reads no projection either."""
    encoder = own / "image_encoder"
    config = CLIPVisionConfig.from_pretrained(encoder)
    weights = load_file(encoder / "model.safetensors")
    whole = CLIPVisionModelWithProjection(config)
    missing = whole.load_state_dict(
        {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in weights.items()}, strict=False
    )
    assert missing.missing_keys == ["visual_projection.weight"]
    whole.save_pretrained(encoder)
    index = own / "model_index.json"
    listed = json.loads(index.read_text()) | {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    index.write_text(json.dumps(listed))
    assert family_of(own).check() == []
    pixels = torch.linspace(-1, 1, 3 * 64 * 96).reshape(1, 3, 1, 64, 96)
    embeds = [embedded(family_of(folder), pixels) for folder in (own, i2v)]
    assert torch.equal(*embeds)


def embedded(family: Wan21Family, pixels: torch.Tensor) -> torch.Tensor:
    encoder = family.conditions()[1].encoder
    assert encoder is not None
    with encoder.open("cpu") as opened:
        return opened.encode(pixels, ClipShape(9, 64, 96))["image_embeds"]


def test_a_checkpoint_that_the_installed_libraries_saved_again_is_one(
    own: Path, tmp_path: Path, family_of: Families
) -> None:
    """They name the image processor by another class."""
    again = tmp_path / "again"
    WanImageToVideoPipeline.from_pretrained(own).save_pretrained(again)
    assert family_of(again).check() == []


def test_weights_that_can_still_be_fetched_are_no_problem(
    own: Path, family_of: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of a hub id has configs and tokenizers alone; weights come with the run."""
    for file in own.rglob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr(CheckpointSource, "folder", own)
    monkeypatch.setattr(CheckpointSource, "may_fetch", lambda self: True)
    assert family_of(Path("owner/i2v")).check() == []


def test_the_small_one_was_published_for_480p_alone(tmp_path: Path, wan21: Path, family_of: Families) -> None:
    folder = Path(shutil.copytree(wan21, tmp_path / "wan21"))
    assert {"480p", "720p"} == family_of(folder).resolutions().keys()
    config = folder / "transformer" / "config.json"
    wide = {"num_attention_heads": 12, "attention_head_dim": 128}
    config.write_text(json.dumps(json.loads(config.read_text()) | wide))
    assert family_of(folder).resolutions().keys() == {"480p"}
    assert family_of(folder).default_size == Size(832, 480)
