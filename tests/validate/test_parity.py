"""What validation makes is what diffusers' own SanaVideoPipeline makes with the same weights, prompt, seed and steps."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vtrain.config import load
from vtrain.config.tables import LoraTable
from vtrain.contract import ConfigError, Device, Size, TextEncoderSpec, TextPartSpec
from vtrain.data.batches import pad
from vtrain.data.caching.caches import Caches, fill_caches
from vtrain.plan.make import make_plan
from vtrain.plan.records import Plan
from vtrain.registry import discover
from vtrain.run.prepare import extra_texts
from vtrain.train.parameters import add_lora
from vtrain.validate.generate import Interrupted, Validator
from vtrain.validate.videos import read_frames

LATENT_TOLERANCE = 1e-4
"""Largest difference of latents, whose values are about 1, after six solver steps in fp32 with guidance 5."""


def validator(plan: Plan, stop: bool = False) -> Validator:
    assert plan.validation is not None
    fill_caches(plan, (), extra_texts(plan), "cpu", lambda _: None)
    denoiser = plan.family.load_denoiser("cpu", "fp32")
    return Validator(
        plan.validation,
        plan.family,
        plan.sampler,
        Caches.open(plan),
        denoiser,
        Device(),
        lambda: nullcontext(),
        lambda: stop,
    )


def test_latents_and_frames_equal_the_pipelines(
    plan: Plan, tiny: Path, generated: Callable[..., Any], decoded: Callable[..., torch.Tensor]
) -> None:
    from diffusers import SanaVideoPipeline

    assert plan.validation is not None
    ours = validator(plan).latents(plan.validation.prompts["rabbit"])
    theirs, frames = generated(SanaVideoPipeline.from_pretrained(tiny, torch_dtype=torch.float32), plan)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < LATENT_TOLERANCE
    assert (decoded(plan, ours) - frames).abs().max() <= 1


def test_latents_and_frames_of_the_720p_checkpoint_equal_the_pipelines(
    write_720p: Callable[..., Path],
    tiny_720p: Path,
    generated: Callable[..., Any],
    decoded: Callable[..., torch.Tensor],
) -> None:
    """Its VAE is another one, whose mean and std of latents are in the module."""
    from diffusers import SanaVideoPipeline

    plan = make_plan(load(write_720p(), discover()))
    assert plan.validation is not None
    ours = validator(plan).latents(plan.validation.prompts["rabbit"])
    assert ours.shape == (1, 128, 2, 2, 3)
    theirs, frames = generated(SanaVideoPipeline.from_pretrained(tiny_720p, torch_dtype=torch.float32), plan)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < LATENT_TOLERANCE
    assert frames.float().std() > 10, "a picture, not a surface"
    assert (decoded(plan, ours) - frames).abs().max() <= 1


@pytest.mark.parametrize(("size", "warned"), [("1280x704", 1), ("832x480", 0)])
def test_720p_clips_with_the_480p_checkpoint_are_pointed_out(
    write_config: Callable[..., Path], size: str, warned: int
) -> None:
    config = write_config()
    config.write_text(config.read_text(encoding="utf-8").replace('"64x32"]', f'"{size}"]'), encoding="utf-8")
    found = [text for text in make_plan(load(config, discover())).warnings if "not been trained" in text]
    own = '2.2 times the area of 768x528, the largest size of this checkpoint\'s own, "480p"'
    assert found == [f"[[data]] clips: 1280x704 has {own}: it has not been trained on videos that large"] * warned


def test_sizes_that_the_720p_checkpoint_cannot_decode_are_problems_of_the_plan(write_720p: Callable[..., Path]) -> None:
    """On its stride, and yet a single row of latents, which its decoder does not take."""
    config = write_720p((('["96x64"]', '["96x64", "64x32"]'), ('size = "96x64"', 'size = "32x96"')))
    with pytest.raises(ConfigError) as caught:
        make_plan(load(config, discover()))
    lines = config.read_text(encoding="utf-8").splitlines()
    data, size = (lines.index(line) + 1 for line in ("[[data]]", 'size = "32x96"'))
    what = "the LTX-2 VAE: 32 pixels are one latent of its decoder, which takes two."
    assert [(problem.where, problem.what) for problem in caught.value.problems] == [
        (f"{config}:{data}", f"64x32@9: {what}"),
        (f"{config}:{size}", f"32x96@9: {what}"),
    ]


@pytest.mark.slow
def test_a_lora_run_on_the_720p_checkpoint_makes_the_video_that_plain_diffusers_makes(
    tmp_path: Path, write_720p: Callable[..., Path], run_here: Callable[[Path], None], tiny_720p: Path, generated: Any
) -> None:
    """Slow (a whole run): cache, LoRA with a share of image-to-video, validation from text and from a picture."""
    from diffusers import SanaVideoPipeline
    from PIL import Image

    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(tmp_path / "boat.png")
    more = (
        ("fps = 8", "fps = 8\nimage_to_video = 0.5"),
        ("prompts = { rabbit", 'images = { boat = "boat.png" }\nprompts = { boat = "A boat", rabbit'),
        ("[precision]", "[model.lora]\nrank = 4\nalpha = 32.0\n[precision]"),
    )
    config = write_720p(more, train="lora", steps=6)
    run_here(config)
    checkpoint, samples = (tmp_path / "out" / name / "step-000006" for name in ("checkpoints", "samples"))
    pipeline = SanaVideoPipeline.from_pretrained(tiny_720p, torch_dtype=torch.float32)
    plan = make_plan(load(config, discover()))
    _, before = generated(pipeline, plan)
    pipeline.load_lora_weights(checkpoint)
    _, theirs = generated(pipeline, plan)
    ours = torch.stack([torch.from_numpy(frame) for frame in read_frames(samples / "rabbit.mp4")])
    assert (samples / "boat.mp4").is_file()
    luma = torch.tensor([0.2126, 0.7152, 0.0722])  # the file's chroma has half the resolution
    errors = [((ours.float() - of) @ luma).abs().mean().item() for of in (theirs, before)]
    assert errors[0] < 6, "what H.264 at CRF 18 leaves"
    assert errors[1] > 1.5 * errors[0], "without what was learned it is another video"


def test_the_start_is_the_same_at_every_validation_and_depends_on_the_seed_alone(plan: Plan) -> None:
    first, second = validator(plan).start(), validator(plan).start()
    assert torch.equal(first, second)
    assert torch.equal(first, torch.randn(first.shape, generator=torch.Generator().manual_seed(11)))


def encoders(tokens: int) -> dict[str, TextEncoderSpec]:
    return {"words": TextEncoderSpec({"text": TextPartSpec(2, tokens)}, lambda _: "", lambda _: None)}


def test_text_is_padded_with_zeros_that_the_mask_leaves_out() -> None:
    short, long = ({"text": torch.ones(length, 2)} for length in (3, 9))
    text = pad([short, short], encoders(5))
    assert text.only.embeds[1, :, 0].tolist() == [1, 1, 1, 0, 0]
    assert text.only.mask[1].tolist() == [True, True, True, False, False]
    both = pad([short, long], encoders(300)).only
    assert both.masked[1].sum(dim=1).tolist() == [3, 9]
    assert both.embeds.shape == (2, 16, 2), "the longest's length, rounded up to eight"


def test_generation_stops_when_asked(plan: Plan) -> None:
    with pytest.raises(Interrupted):
        validator(plan, stop=True).latents("A big grey Rabbit in a meadow")


def test_a_video_has_the_size_that_was_asked_for_also_off_the_stride(plan: Plan, tmp_path: Path) -> None:
    assert plan.validation is not None
    asked = replace(plan, validation=replace(plan.validation, size=Size(70, 38), steps=1))
    files = validator(asked).videos(tmp_path, ["rabbit"])
    assert {frame.shape for frame in read_frames(files["rabbit"])} == {(38, 70, 3)}


def test_no_dropout_is_left_on_while_videos_are_generated(plan: Plan, tmp_path: Path) -> None:
    made = validator(plan)
    add_lora(made.denoiser, LoraTable(rank=4, dropout=0.5), 1, "")
    for name, parameter in made.denoiser.module.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    made.denoiser.module.train()
    generated = [made.videos(tmp_path / turn, ["rabbit"])["rabbit"].read_bytes() for turn in ("one", "two")]
    assert generated[0] == generated[1]
    assert made.denoiser.module.training, "training goes on as before"
    with torch.no_grad():
        in_training = [made.latents(made.plan.prompts["rabbit"]) for _ in range(2)]
    assert not torch.equal(*in_training), "with dropout the two would differ, so the check above can fail"


PLAIN = """
    import sys
    from pathlib import Path
    import av, numpy as np, torch
    from diffusers import SanaVideoPipeline, SanaVideoTransformer3DModel
    model, outputs = sys.argv[1], Path(sys.argv[2])
    for kind in "full", "lora":
        checkpoint = outputs / kind / "checkpoints" / "step-000008"
        pipeline = SanaVideoPipeline.from_pretrained(model, torch_dtype=torch.float32)
        before = {k: v.clone() for k, v in pipeline.transformer.state_dict().items()}
        if kind == "full":
            pipeline.transformer = SanaVideoTransformer3DModel.from_pretrained(checkpoint / "transformer")
            after = pipeline.transformer.state_dict()
            assert any(not torch.equal(before[k], after[k]) for k in before), "nothing was trained"
        else:
            pipeline.load_lora_weights(checkpoint)
            assert pipeline.transformer.peft_config["default_0"].lora_alpha == 32
        frames = pipeline("A big grey Rabbit in a meadow motion score: 30.", negative_prompt="Blurry, worst quality",
            height=32, width=64, frames=5, num_inference_steps=6, guidance_scale=5.0, use_resolution_binning=False,
            generator=torch.Generator().manual_seed(11), output_type="np").frames[0]
        with av.open(str(outputs / kind / "samples" / "step-000008" / "rabbit.mp4")) as container:
            ours = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
        luma = np.array([0.2126, 0.7152, 0.0722])
        error = (((ours / 255 - frames) @ luma) ** 2).mean()
        print("psnr", -10 * np.log10(error))
    assert "vtrain" not in sys.modules and "vtrain_sanavideo" not in sys.modules
"""


@pytest.mark.long
def test_a_runs_checkpoint_in_plain_diffusers_makes_the_video_that_the_run_made(
    tmp_path: Path, tiny: Path, write_config: Callable[..., Path], run_here: Callable[[Path], None]
) -> None:
    """Long (a process that imports diffusers): the whole way from `vtrain run` to another tool, for full and LoRA.

    Luma is compared: the file's chroma has half the resolution. What else separates the two is H.264 at CRF 18.
    """
    for train, more in (("full", ""), ("lora", "[model.lora]\nrank = 4\nalpha = 32.0\n")):
        config = write_config(train=train, steps=8)
        toml = config.read_text(encoding="utf-8").replace('output_dir = "out"', f'output_dir = "{train}"')
        config.write_text(toml.replace("[precision]", f"{more}[precision]"), encoding="utf-8")
        run_here(config)
    command = [sys.executable, "-c", textwrap.dedent(PLAIN), str(tiny), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [float(line.removeprefix("psnr ")) for line in done.stdout.splitlines() if line.startswith("psnr ")]
    assert len(found) == 2
    assert min(found) > 28, found
