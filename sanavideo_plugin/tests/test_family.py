# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
"""Geometry, defaults and fingerprints."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import SanaVideoPipeline, SanaVideoTransformer3DModel
from diffusers.pipelines.sana_video.pipeline_sana_video import ASPECT_RATIO_480_BIN
from pydantic import ValidationError

from vtrain.contract import ClipShape, Family, FrameRule, LatentShape, Size, TextPartSpec, default_arguments
from vtrain_sanavideo.check import TRANSFORMER_SOURCE, read_transformer
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.options import SanaVideoOptions
from vtrain_sanavideo.text import default_instruction

Families = Callable[..., SanaVideoFamily]
Hash = Callable[[Path], str]

REAL_2B = {
    "attention_head_dim": 112, "caption_channels": 2304, "cross_attention_dim": 2240, "cross_attention_head_dim": 112,
    "in_channels": 16, "mlp_ratio": 3.0, "num_attention_heads": 20, "num_cross_attention_heads": 20, "num_layers": 20,
    "out_channels": 16, "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "sample_size": 30,
}  # fmt: skip


def test_it_is_a_family_of_the_contract(checkpoint: Path) -> None:
    family: Family = SanaVideoFamily(SanaVideoOptions(path=str(checkpoint)))
    assert (family.default_size, family.default_frames, family.default_fps) == (Size(832, 480), 81, 16)
    assert (family.frame_rule, family.pixel_stride) == (FrameRule(4, 1), 16)
    assert (family.block_count, family.block_width) == (4, 96)
    assert family.text_encoders()["gemma"].parts == {"text": TextPartSpec(64, 300, "longest", "bf16")}


def test_the_buckets_are_the_official_ones(family: SanaVideoFamily) -> None:
    assert list(family.resolutions()) == ["480p"]
    official = {Size(width=int(width), height=int(height)) for height, width in ASPECT_RATIO_480_BIN.values()}
    assert set(family.resolutions()["480p"]) == official
    assert len(family.resolutions()["480p"]) == 11
    assert family.resolutions()["480p"][0] == family.default_size


def test_a_default_clip_is_32760_tokens(family: SanaVideoFamily) -> None:
    latents = family.latent_shape(ClipShape(81, 480, 832))
    assert latents == LatentShape(16, 21, 60, 104)
    assert latents.frames * latents.height // 2 * latents.width // 2 == 32760


def test_latent_frames_stand_for_four_pixel_frames_but_the_first(family: SanaVideoFamily) -> None:
    assert [list(family.pixel_frames(number)) for number in range(3)] == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize("clip", [ClipShape(80, 480, 832), ClipShape(81, 488, 832), ClipShape(81, 480, 840)])
def test_a_clip_that_would_be_cut_has_no_latent_shape(family: SanaVideoFamily, clip: ClipShape) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        family.latent_shape(clip)


def shapes_of(config: dict[str, object], folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """By our arithmetic, and of diffusers' module on the meta device."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        module = SanaVideoTransformer3DModel.from_config(config)
    return read_transformer(folder).shapes(), {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mlp_ratio": 2.5, "out_channels": None, "attention_bias": True},
        {"qk_norm": None, "norm_elementwise_affine": True},
        {"num_cross_attention_heads": 10, "patch_size": [1, 1, 1], "in_channels": 32, "num_layers": 1},
    ],
)
def test_the_shapes_of_weights_are_those_of_diffusers_module(tmp_path: Path, change: dict[str, object]) -> None:
    ours, theirs = shapes_of(REAL_2B | change, tmp_path / "transformer")
    assert ours == theirs
    if not change:
        assert sum(map(math.prod, ours.values())) == 2_056_862_144


def test_what_is_read_from_diffusers_source_is_what_it_says_at_run_time() -> None:
    said = inspect.signature(SanaVideoPipeline.__call__).parameters["complex_human_instruction"].default
    assert default_instruction() == "\n".join(said)
    read = default_arguments("diffusers", TRANSFORMER_SOURCE, "SanaVideoTransformer3DModel")
    signature = inspect.signature(SanaVideoTransformer3DModel.__init__).parameters
    assert read == {name: value.default for name, value in signature.items() if value.default is not value.empty}


def fingerprints(family: SanaVideoFamily, sha256: Hash) -> tuple[str, str]:
    """Of text and video."""
    return family.text_encoders()["gemma"].fingerprint(sha256), family.video_fingerprint(sha256)


def test_changes_to_what_text_depends_on_change_its_fingerprint_and_no_others(
    own_checkpoint: Path, checkpoint: Path, family_of: Families, sha256: Hash
) -> None:
    text, video = fingerprints(family_of(checkpoint), sha256)
    assert family_of(own_checkpoint).text_encoders()["gemma"].fingerprint(sha256) == text
    seen = {text}
    options: list[dict[str, object]] = [
        {"text_precision": "bf16"}, {"instruction": ""}, {"instruction": "x"}, {"motion_score": 10}, {"motion_score": "none"},
    ]  # fmt: skip
    for chosen in options:
        other = family_of(checkpoint, **chosen)
        seen.add(other.text_encoders()["gemma"].fingerprint(sha256))
        assert other.video_fingerprint(sha256) == video
    for name in (
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "text_encoder/model.safetensors",
        "text_encoder/config.json",
    ):
        disturb(own_checkpoint / name)
        seen.add(family_of(own_checkpoint).text_encoders()["gemma"].fingerprint(sha256))
        assert family_of(own_checkpoint).video_fingerprint(sha256) == video
    assert len(seen) == 1 + len(options) + 4


def test_changes_to_what_video_depends_on_change_its_fingerprint_and_no_others(
    own_checkpoint: Path, checkpoint: Path, family_of: Families, sha256: Hash
) -> None:
    text, video = fingerprints(family_of(checkpoint), sha256)
    seen = {video}
    options: list[dict[str, object]] = [{"vae_precision": "bf16"}, {"vae_tiling": True}]
    for chosen in options:
        other = family_of(checkpoint, **chosen)
        seen.add(other.video_fingerprint(sha256))
        assert other.text_encoders()["gemma"].fingerprint(sha256) == text
    for name in ("vae/diffusion_pytorch_model.safetensors", "vae/config.json"):
        disturb(own_checkpoint / name)
        seen.add(family_of(own_checkpoint).video_fingerprint(sha256))
        assert family_of(own_checkpoint).text_encoders()["gemma"].fingerprint(sha256) == text
    assert len(seen) == 5
    # From another place, the same VAE is the same.
    assert family_of(own_checkpoint, vae_path=str(checkpoint)).video_fingerprint(sha256) == video


def test_a_new_transformer_or_scheduler_invalidates_no_cache(
    own_checkpoint: Path, family_of: Families, sha256: Hash
) -> None:
    family = family_of(own_checkpoint)
    before = fingerprints(family, sha256)
    for name in (
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/config.json",
        "scheduler/scheduler_config.json",
    ):
        disturb(own_checkpoint / name)
    changed = family_of(own_checkpoint)
    assert fingerprints(changed, sha256) == before


def test_the_note_of_who_wrote_a_config_is_no_part_of_a_fingerprint(
    own_checkpoint: Path, checkpoint: Path, family_of: Families, sha256: Hash
) -> None:
    for name, key in (("vae", "_diffusers_version"), ("text_encoder", "transformers_version")):
        path = own_checkpoint / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: "99.0"}))
    changed, plain = family_of(own_checkpoint), family_of(checkpoint)
    assert changed.text_encoders()["gemma"].fingerprint(sha256) == plain.text_encoders()["gemma"].fingerprint(sha256)
    assert changed.video_fingerprint(sha256) == plain.video_fingerprint(sha256)


def disturb(path: Path) -> None:
    """Another content that still reads."""
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"disturbed": 1}))
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))


def test_the_plan_is_told_what_the_model_is(family: SanaVideoFamily, checkpoint: Path) -> None:
    rows = dict(family.describe())
    assert rows["model"] == str(checkpoint)
    assert "886,528 parameters" in rows["denoiser"]
    assert "x8 space, x4 time" in rows["video codec"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"path": ""},
        {"path": "a/b", "motion_score": -1},
        {"path": "a/b", "motion_score": 1.5},
        {"path": "a/b", "text_precision": "int8"},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SanaVideoOptions.model_validate(options)
