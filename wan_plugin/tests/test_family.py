"""What a plan asks of Wan: sizes, recipe, fingerprints, and what is wrong with a checkpoint."""

# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, unused-ignore"
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ftfy
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Tokenizer

from vtrain.contract import Caption, ClipShape, DataError, LatentShape, ModelError, Role, Size, TextPartSpec
from vtrain.testing.family import MemoryTests, measured
from vtrain_wan import tiny
from vtrain_wan.denoiser import WanDenoiser
from vtrain_wan.family import TI2VFamily, Wan21Family
from vtrain_wan.plugin import WAN21, WAN22_TI2V
from vtrain_wan.text import wording

Families = Callable[..., Wan21Family]
Hash = Callable[[Path], str]
WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")


def test_what_is_kept_beside_the_blocks_does_not_depend_on_their_number(wan21: Path, family_of: Families) -> None:
    """Under autocast, where a block's input is freed when the next one has begun."""
    small = family_of(wan21)
    config = json.loads((wan21 / "transformer" / "config.json").read_text())
    with FakeTensorMode(allow_non_fake_inputs=True):
        modules = [WanTransformer3DModel.from_config(config | {"num_layers": number}) for number in (2, 5)]
    examples = MemoryTests.examples(small, False)
    denoisers = [WanDenoiser(module, small._geometry, blocks="blocks") for module in modules]
    few, many = (measured(small, each, examples, "bf16") for each in denoisers)
    assert few == many
    assert min(few.plain.outside, few.checkpointed.outside) > 0


def test_the_first_buckets_are_the_official_sizes(wan21: Path, ti2v: Path, family_of: Families) -> None:
    """SUPPORTED_SIZES of Wan-Video/Wan2.1 and Wan2.2."""
    small, large = family_of(wan21), family_of(ti2v)
    assert small.resolutions()["480p"][:2] == (Size(832, 480), Size(480, 832))
    assert small.resolutions()["720p"][:2] == (Size(1280, 720), Size(720, 1280))
    assert large.resolutions()["720p"][:2] == (Size(1280, 704), Size(704, 1280))
    for family, areas in ((small, {"480p": 832 * 480, "720p": 1280 * 720}), (large, {"720p": 1280 * 704})):
        for name, sizes in family.resolutions().items():
            assert all(0.9 * areas[name] < size.area <= areas[name] for size in sizes)
            assert {Size(size.height, size.width) for size in sizes} == set(sizes)


def test_clips_and_latents_of_the_defaults(wan21: Path, ti2v: Path, family_of: Families) -> None:
    small, large = family_of(wan21), family_of(ti2v)
    assert (small.default_frames, small.default_fps, small.default_size) == (81, 16.0, Size(832, 480))
    assert (large.default_frames, large.default_fps, large.default_size) == (121, 24.0, Size(1280, 704))
    assert small.latent_shape(ClipShape(81, 480, 832)) == LatentShape(16, 21, 60, 104)
    assert large.latent_shape(ClipShape(121, 704, 1280)) == LatentShape(48, 31, 44, 80)
    assert (small.pixel_stride, large.pixel_stride) == (16, 32)
    with pytest.raises(ValueError, match=r"Wan 2\.2 TI2V takes 4k\+1 frames and multiples of 32 pixels"):
        large.latent_shape(ClipShape(121, 720, 1280))


def test_the_recipe_is_flow_with_the_checkpoints_own_shift(wan21: Path, ti2v: Path) -> None:
    for spec, folder in ((WAN21, wan21), (WAN22_TI2V, ti2v)):
        family = spec.build(spec.options.model_validate({"path": str(folder)}))
        assert spec.sampler == "flow"
        assert spec.sampler_options == {"shift": family.scheduler_config()["flow_shift"]}
        assert family.timestep(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0.0, 250.0, 1000.0]


def test_text_is_padded_in_full(family: Wan21Family) -> None:
    assert family.text_encoders()["umt5"].parts == {"text": TextPartSpec(64, 512, "full", "fp32")}


def test_an_extra_is_refused() -> None:
    with pytest.raises(DataError, match="Wan takes no motion_score with a caption"):
        wording(Caption("a cat", {"motion_score": 3}), "prompt")


def test_fingerprints_follow_what_changes_the_result(
    wan21: Path, family_of: Families, sha256: Hash, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(**options: object) -> tuple[str, str]:
        family = family_of(wan21, **options)
        return family.text_encoders()["umt5"].fingerprint(sha256), family.video_fingerprint(sha256)

    text, video = of()
    assert of() == (text, video)
    assert of(text_precision="bf16")[0] != text
    assert of(text_precision="bf16")[1] == video
    assert of(vae_precision="bf16")[1] != video
    assert of(vae_tiling=True)[1] != video
    monkeypatch.setattr(ftfy, "__version__", "another")
    assert of()[0] != text, "another ftfy may clean a caption otherwise"
    assert of()[1] == video


def said(family: Wan21Family) -> str:
    return "\n".join(f"{problem.where}: {problem.what} {problem.remedy}" for problem in family.check())


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_checkpoint_of_another_version_is_named(wan21: Path, ti2v: Path) -> None:
    asked = TI2VFamily(WAN22_TI2V.options.model_validate({"path": str(wan21)}))
    assert "this is Wan 2.1 text-to-video of width 96, and not Wan 2.2 TI2V. Name another checkpoint" in said(asked)
    other = WAN21.build(WAN21.options.model_validate({"path": str(ti2v)}))
    assert isinstance(other, Wan21Family)
    assert "this is Wan 2.2 TI2V of width 96, and not Wan 2.1 text-to-video or Wan 2.1 image-to-video." in said(other)


def test_a_checkpoint_for_another_task_than_asked_for_is_named(wan21: Path, i2v: Path, family_of: Families) -> None:
    assert said(family_of(i2v)) == said(family_of(i2v, task="image-to-video")) == ""
    wanted = "this is Wan 2.1 image-to-video of width 96, and not Wan 2.1 text-to-video. Name another"
    assert wanted in said(family_of(i2v, task="text-to-video"))
    wanted = "this is Wan 2.1 text-to-video of width 96, and not Wan 2.1 image-to-video. Name another"
    assert wanted in said(family_of(wan21, task="image-to-video"))


def test_what_image_to_video_lacks_or_has_from_elsewhere_is_named(
    i2v: Path, tmp_path: Path, family_of: Families
) -> None:
    folder = Path(shutil.copytree(i2v, tmp_path / "model"))
    edit(folder / "image_encoder" / "config.json", hidden_size=48)
    edit(folder / "transformer" / "config.json", in_channels=32)
    problems = said(family_of(folder))
    assert "the image encoder's width is 48, and the transformer takes 32." in problems
    assert "embeddings.position_embedding.weight is [5, 32] instead of [5, 48]" in problems
    assert "noise, mask and picture have 36 channels, and the transformer takes 32." in problems
    (folder / "image_encoder" / "model.safetensors").unlink()
    (folder / "image_processor" / "preprocessor_config.json").unlink()
    problems = said(family_of(folder))
    assert "image_encoder/model.safetensors: this weight file is missing." in problems
    assert "preprocessor_config.json: this file is missing." in problems
    edit(folder / "model_index.json", image_encoder=[None, None])
    assert (
        "image_encoder is not listed, and this family works with CLIPVisionModel or CLIPVisionModelWithProjection."
        in said(family_of(folder))
    )


def test_first_and_last_frames_are_another_model(i2v: Path, tmp_path: Path, family_of: Families) -> None:
    folder = Path(shutil.copytree(i2v, tmp_path / "model"))
    edit(folder / "transformer" / "config.json", pos_embed_seq_len=514)
    assert "this is Wan 2.1 first-last-frame-to-video of width 96, and not" in said(family_of(folder))


def test_conditions_are_those_of_the_checkpoint(i2v: Path, wan21: Path, family_of: Families, sha256: Hash) -> None:
    """A picture's latents follow the codec, its embedding the image encoder and the processor."""
    assert family_of(wan21).conditions() == ()
    latents, embeds = family_of(i2v).conditions()
    assert latents.encoder is not None
    assert embeds.encoder is not None
    assert latents.encoder.tensors(ClipShape(81, 480, 832)) == {"image_latents": ((20, 21, 60, 104), "fp32")}
    assert embeds.encoder.tensors(ClipShape(81, 480, 832)) == {"image_embeds": ((5, 32), "fp32")}
    tiled, same = (each.encoder for each in family_of(i2v, vae_tiling=True).conditions())
    assert tiled is not None
    assert same is not None
    assert tiled.fingerprint(sha256) != latents.encoder.fingerprint(sha256)
    assert same.fingerprint(sha256) == embeds.encoder.fingerprint(sha256)


def test_the_processor_is_part_of_what_a_picture_is_known_by(
    i2v: Path, tmp_path: Path, family_of: Families, sha256: Hash
) -> None:
    folder = Path(shutil.copytree(i2v, tmp_path / "model"))
    marks = set()
    for values in ({}, {"resample": 2}, {"_name_or_path": "elsewhere"}):
        edit(folder / "image_processor" / "preprocessor_config.json", **values)
        encoder = family_of(folder).conditions()[1].encoder
        assert encoder is not None
        marks.add(encoder.fingerprint(sha256))
    assert len(marks) == 2


@pytest.mark.parametrize("role", ["prompt", "negative", "dropped"])
def test_tokens_are_those_of_the_encoder_and_what_is_cut_is_what_it_does_not_read(
    wan21: Path, family_of: Families, role: Role
) -> None:
    """Against transformers' tokenizer, of every number of tokens around the limit."""
    family, tokenizer = family_of(wan21), T5Tokenizer.from_pretrained(wan21 / "tokenizer")
    lines = [
        "",
        "a cat",
        "走る猫 &amp; Ü🐈\n  x",
        *((("wet grass, " * 200)[:letters]) for letters in range(1830, 1910, 2)),
    ]
    captions = [Caption(line) for line in lines]
    with family.open_token_counter() as counter:
        counts = [count for (count,) in counter.count(captions, role)]
    for caption, count in zip(captions, counts, strict=True):
        words = wording(caption, role)
        assert count.tokens == len(tokenizer(words)["input_ids"])
        assert (count.encoder, count.limit, count.lost) == ("umt5", 512, ("text",) if count.tokens > 512 else ())
        kept = tokenizer(words, truncation=True, max_length=512)["input_ids"]
        assert count.tokens <= 512 or tokenizer.decode(kept[:-1]).rstrip() == words[: -len(count.cut)].rstrip()
    assert role == "dropped" or len({count.tokens for count in counts if 508 < count.tokens < 520}) > 4


def test_the_fingerprint_of_tokens_follows_whatever_changes_a_count(
    own_checkpoint: Path, family_of: Families, sha256: Hash, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = family_of(own_checkpoint).token_fingerprint(sha256)
    assert family_of(own_checkpoint, text_precision="bf16").token_fingerprint(sha256) == known
    file = own_checkpoint / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert (other := family_of(own_checkpoint).token_fingerprint(sha256)) != known
    monkeypatch.setattr(ftfy, "__version__", "another")
    assert family_of(own_checkpoint).token_fingerprint(sha256) not in {known, other}


COUNT = """
import sys
from vtrain.contract import Caption
from vtrain_wan.plugin import WAN21
family = WAN21.build(WAN21.options.model_validate({"path": sys.argv[1]}))
with family.open_token_counter() as counter:
    counter.count([Caption("a cat")], "prompt")
print(len(family.conditions()), [name for name in ("torch", "transformers", "diffusers") if name in sys.modules])
"""


def test_counting_and_asking_for_conditions_import_no_torch(i2v: Path) -> None:
    done = subprocess.run([sys.executable, "-c", COUNT, str(i2v)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"


@pytest.mark.parametrize(("size", "heads", "found"), [("14B", 12, "1.3B"), ("1.3B", 40, "14B")])
def test_a_checkpoint_of_another_size_than_asked_for_is_named(
    own_checkpoint: Path, family_of: Families, size: str, heads: int, found: str
) -> None:
    edit(own_checkpoint / "transformer" / "config.json", num_attention_heads=heads, attention_head_dim=128)
    wanted = f"config.json: this is Wan 2.1 text-to-video {found}, and not Wan 2.1 text-to-video {size}."
    assert wanted in said(family_of(own_checkpoint, size=size, task="text-to-video"))


def test_two_experts_are_named(own_checkpoint: Path, family_of: Families) -> None:
    edit(own_checkpoint / "model_index.json", boundary_ratio=0.875)
    edit(own_checkpoint / "transformer" / "config.json", num_attention_heads=40, attention_head_dim=128)
    assert "this is Wan 2.2 with two experts, A14B, and not Wan 2.1 text-to-video or" in said(family_of(own_checkpoint))


def test_image_to_video_of_wan_22_is_named(own_checkpoint: Path, family_of: Families) -> None:
    file = own_checkpoint / "transformer" / "config.json"
    edit(file, num_attention_heads=40, attention_head_dim=128, in_channels=36)
    assert "this is Wan 2.2 image-to-video A14B, and not Wan 2.1 text-to-video or" in said(family_of(own_checkpoint))


@pytest.mark.parametrize("model", ["VACE", "Animate"])
def test_a_transformer_of_another_class_is_named(own_checkpoint: Path, family_of: Families, model: str) -> None:
    edit(own_checkpoint / "model_index.json", transformer=["diffusers", f"Wan{model}Transformer3DModel"])
    wanted = f"transformer is a Wan{model}Transformer3DModel, and this family works with WanTransformer3DModel."
    assert wanted in said(family_of(own_checkpoint))


def test_weights_of_another_model_than_their_config_are_named_from_their_headers(
    own_checkpoint: Path, ti2v: Path, family_of: Families
) -> None:
    state = load_file(own_checkpoint / WEIGHTS)
    save_file(state | {"condition_embedder.image_embedder.norm1.weight": torch.zeros(4)}, own_checkpoint / WEIGHTS)
    problems = said(family_of(own_checkpoint))
    assert (
        "these weights are of Wan 2.1 image-to-video of width 96, and the config beside them is of Wan 2.1 text"
        in problems
    )
    (own_checkpoint / WEIGHTS).write_bytes((ti2v / WEIGHTS).read_bytes())
    assert "these weights are of Wan 2.2 TI2V of width 96" in said(family_of(own_checkpoint))
    with pytest.raises(ModelError, match=r"patch_embedding\.weight is"):
        family_of(own_checkpoint).load_denoiser("cpu", "fp32")


def test_misshapen_weights_are_a_problem_before_anything_is_loaded(own_checkpoint: Path, family_of: Families) -> None:
    state = load_file(own_checkpoint / WEIGHTS)
    state["blocks.1.ffn.net.2.bias"] = torch.zeros(95)
    del state["proj_out.bias"]
    save_file(state, own_checkpoint / WEIGHTS)
    assert "proj_out.bias is missing; blocks.1.ffn.net.2.bias is [95] instead of [96]" in said(
        family_of(own_checkpoint)
    )


def test_a_text_encoder_of_another_checkpoint_is_named(own_checkpoint: Path, family_of: Families) -> None:
    edit(own_checkpoint / "transformer" / "config.json", text_dim=128)
    assert "the text encoder's width is 64, and the transformer takes 128." in said(family_of(own_checkpoint))


def test_statistics_of_another_vae_are_named(own_checkpoint: Path, family_of: Families) -> None:
    edit(own_checkpoint / "vae" / "config.json", latents_mean=[0.0] * 15)
    assert "vae/config.json: latents_mean: 15" in said(family_of(own_checkpoint)).replace(str(own_checkpoint) + "/", "")


@pytest.mark.parametrize("kind", ["wan21", "i2v", "ti2v"])
def test_a_tiny_checkpoint_is_the_same_for_the_same_seed_and_loads_in_the_pipeline(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue(kind)
    tiny.main([str(tmp_path / "again"), *([] if kind == "wan21" else [f"--{kind}"])])
    names = {path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()}
    odd = [name for name in names if (tmp_path / "again" / name).read_bytes() != (checkpoint / name).read_bytes()]
    assert odd == []
    pipeline = (WanImageToVideoPipeline if kind == "i2v" else WanPipeline).from_pretrained(checkpoint)
    assert pipeline.tokenizer("a cat").input_ids[-1] == pipeline.tokenizer.eos_token_id


def test_a_tiny_checkpoint_leaves_the_callers_random_state(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    tiny.build(tmp_path / "other", layers=1)
    assert torch.equal(before, torch.random.get_rng_state())
