# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import SanaVideoPipeline, schedulers

from vtrain.contract import Caption, ClipShape, Condition, ModelError, NoiseLevel, Predict, Size, Text
from vtrain_sanavideo.denoiser import SanaVideoDenoiser
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.flow import SOLVERS, SanaVideoFlow, scheduler_fault
from vtrain_sanavideo.options import SanaVideoFlowOptions, SanaVideoOptions

OFFICIAL = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
PROMPT, NEGATIVE = "A cat walks over the grass motion score: 30.", "blurry, distorted"


def flow(**options: object) -> SanaVideoFlow:
    return SanaVideoFlow(SanaVideoFlowOptions.model_validate(options), OFFICIAL | {"flow_shift": 8.0})


def padded(text: Text, tokens: int = 300) -> Text:
    short = tokens - text.only.mask.shape[1]
    embeds = torch.nn.functional.pad(text.only.embeds, (0, 0, 0, short))
    return Text.of(embeds, torch.nn.functional.pad(text.only.mask, (0, short)))


def guided(denoiser: SanaVideoDenoiser, prompt: Text, negative: Text, scale: float) -> Predict:
    """Classifier-free guidance in one call of twice the batch, negative first, as the pipeline has it."""
    both = Text.of(
        torch.cat([negative.only.embeds, prompt.only.embeds]), torch.cat([negative.only.mask, prompt.only.mask])
    )

    def predict(noisy: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        twice = NoiseLevel(level.sigma.repeat(2), level.timestep.repeat(2))
        with torch.no_grad():
            without, with_ = denoiser.predict(noisy.repeat(2, 1, 1, 1, 1), twice, Condition(both)).float().chunk(2)
        return without + scale * (with_ - without)

    return predict


def generated(family: SanaVideoFamily, clip: ClipShape, steps: int, scale: float) -> torch.Tensor:
    """Latents by our own path, from noise of seed 7."""
    with family.text_encoders()["gemma"].open("cpu") as encoder:
        prompt = encoder.encode([Caption(PROMPT.removesuffix(" motion score: 30."))], "prompt")
        negative = encoder.encode([Caption(NEGATIVE)], "negative")
    predict = guided(family.load_denoiser("cpu", "fp32"), padded(prompt), padded(negative), scale)
    noise = torch.randn((1, *family.latent_shape(clip)), generator=torch.Generator().manual_seed(7))
    return SanaVideoFlow(SanaVideoFlowOptions(), family.scheduler_config()).solve(predict, noise, steps)


def pipelines_own(checkpoint: Path, clip: ClipShape, steps: int, scale: float, output: str) -> torch.Tensor:
    pipeline = SanaVideoPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=clip.height,
        width=clip.width,
        frames=clip.frames,
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(7),
        use_resolution_binning=False,
        output_type=output,
    ).frames
    assert isinstance(made, torch.Tensor)
    return made


def test_training_levels_have_the_official_distribution() -> None:
    level = flow().draw(200_000, torch.Generator().manual_seed(0))
    sigma = level.sigma.double()
    found = [sigma.mean(), sigma.median(), *(sigma.quantile(share) for share in (0.1, 0.9))]
    assert [round(float(value), 3) for value in found] == pytest.approx([0.714, 0.75, 0.454, 0.915], abs=0.003)


def test_a_timestep_is_the_whole_part_of_a_thousand_levels() -> None:
    level = flow().draw(50_000, torch.Generator().manual_seed(1))
    assert torch.equal(level.timestep, level.timestep.floor())
    # The grid of 1000 levels, shifted, in exact fractions.
    grid = {(3 * k) / (1000 + 2 * k): (3000 * k) // (1000 + 2 * k) for k in range(1000)}
    nearest = {float(torch.tensor(sigma, dtype=torch.float32)): timestep for sigma, timestep in grid.items()}
    assert all(
        nearest[sigma] == timestep
        for sigma, timestep in zip(level.sigma.tolist(), level.timestep.tolist(), strict=True)
    )


def test_the_familys_timestep_of_a_level_is_the_one_it_was_trained_with(family: SanaVideoFamily) -> None:
    """At every level of the official grid, in whole numbers, though sigma is rounded to fp32; as (B, f) as well."""
    sigma = torch.tensor([3 * k / (1000 + 2 * k) for k in range(1001)], dtype=torch.float32)
    wanted = torch.tensor([float(3000 * k // (1000 + 2 * k)) for k in range(1001)])
    assert torch.equal(family.timestep(sigma), wanted)
    assert torch.equal(family.timestep(sigma[:1000].view(10, 100)), wanted[:1000].view(10, 100))
    level = flow().draw(10_000, torch.Generator().manual_seed(1))
    assert torch.equal(family.timestep(level.sigma), level.timestep)


def test_noise_is_mixed_in_fp32_whatever_comes_in() -> None:
    clean, noise = (torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    level = NoiseLevel(torch.tensor([0.25, 0.75]), torch.tensor([250.0, 750.0]))
    noisy, target = flow().corrupt(clean, noise, level)
    sigma = level.sigma.double().view(2, 1, 1, 1, 1)
    torch.testing.assert_close(noisy.double(), (1 - sigma) * clean.double() + sigma * noise.double(), rtol=0, atol=1e-5)
    assert torch.equal(target, noise - clean)
    half, _ = flow().corrupt(clean.bfloat16(), noise.bfloat16(), level)
    wanted = (1 - sigma) * clean.bfloat16().double() + sigma * noise.bfloat16().double()
    assert torch.equal(half, wanted.float().bfloat16())


@pytest.mark.parametrize(
    ("clip", "steps"),
    [(ClipShape(5, 64, 96), 1), (ClipShape(5, 64, 96), 2), (ClipShape(5, 64, 96), 20), (ClipShape(1, 96, 32), 5)],
)
def test_latents_equal_the_pipelines_with_guidance(
    family: SanaVideoFamily, checkpoint: Path, clip: ClipShape, steps: int
) -> None:
    """Bit for bit: fp32 on the CPU, one thread or more, the same calls in the same shapes."""
    ours = generated(family, clip, steps, 6.0)
    assert torch.equal(ours, pipelines_own(checkpoint, clip, steps, 6.0, "latent"))


def test_videos_equal_the_pipelines(family: SanaVideoFamily, checkpoint: Path) -> None:
    """Bit for bit, as above, through the codec's decode and the pipeline's own move to [0, 1]."""
    clip = ClipShape(9, 64, 96)
    with family.open_video_codec("cpu") as codec:
        pixels = codec.decode(generated(family, clip, 4, 4.5))
    theirs = pipelines_own(checkpoint, clip, 4, 4.5, "pt").transpose(1, 2)
    assert torch.equal((pixels * 0.5 + 0.5).clamp(0, 1), theirs)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_that_is_allowed_equals_the_pipelines(
    own_checkpoint: Path, family_of: Callable[..., SanaVideoFamily], name: str
) -> None:
    """Bit for bit, with the schedulers that other SANA-Video checkpoints may carry."""
    shift = {"shift": 8.0} if name.startswith("FlowMatch") else {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0,
    }  # fmt: skip
    getattr(schedulers, name)(**shift).save_pretrained(own_checkpoint / "scheduler")
    index = json.loads((own_checkpoint / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name]
    (own_checkpoint / "model_index.json").write_text(json.dumps(index))
    family = family_of(own_checkpoint)
    assert family.check() == []
    clip = ClipShape(5, 32, 64)
    assert torch.equal(generated(family, clip, 6, 6.0), pipelines_own(own_checkpoint, clip, 6, 6.0, "latent"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "not named"),
        ({"_class_name": "DDPMScheduler"}, "DDPMScheduler"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "epsilon"}, "flow_prediction"),
        ({**OFFICIAL, "algorithm_type": "sde-dpmsolver++"}, "noise of its own"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, "noise of its own"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "depends on the size"),
        ({**OFFICIAL, "_class_name": "DEISMultistepScheduler"}, "DEISMultistepScheduler"),
        ({**OFFICIAL, "final_sigmas_type": "sigma_min"}, "does not end at a clean video"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "does not end at a clean video"),
        ({**OFFICIAL, "use_karras_sigmas": True}, "other noise levels than a flow's with use_karras_sigmas"),
    ],
)
def test_a_scheduler_that_cannot_sample_a_flow_is_refused(config: dict[str, object], words: str) -> None:
    assert words in (scheduler_fault(config) or "")
    with pytest.raises(ModelError, match=words):
        SanaVideoFlow(SanaVideoFlowOptions(), config).solve(lambda noisy, level: noisy, torch.zeros(1, 16, 1, 2, 2), 2)


def test_a_shift_from_the_user_changes_nothing_and_is_warned_of() -> None:
    plain, shifted = flow(), flow(shift=7.0, auto_shift=True)
    draws = [one.draw(64, torch.Generator().manual_seed(0)).sigma for one in (plain, shifted)]
    assert torch.equal(*draws)
    assert plain.warnings() == ()
    assert [text.split()[1] for text in shifted.warnings()] == ["shift", "auto_shift"]
    assert all("no effect" in text and "shift 3" in text and "8" in text for text in shifted.warnings())


def test_the_plan_shows_both_shifts() -> None:
    rows = dict(flow().describe())
    assert "shift 3" in rows["training levels"]
    assert "shift 8" in rows["sampling"]


def test_a_solver_takes_at_least_one_step() -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        flow().solve(lambda noisy, level: noisy, torch.zeros(1, 16, 1, 2, 2), 0)


@pytest.fixture(scope="module")
def buckets_clean(checkpoint: Path) -> dict[Size, torch.Tensor]:
    """Latents generated at each official size: one frame, two guided steps."""
    family = SanaVideoFamily(SanaVideoOptions(path=str(checkpoint), text_precision="fp32"))
    with family.text_encoders()["gemma"].open("cpu") as encoder:
        prompt, negative = encoder.encode([Caption("a cat")], "prompt"), encoder.encode([Caption("")], "negative")
    predict = guided(family.load_denoiser("cpu", "fp32"), padded(prompt), padded(negative), 6.0)
    sampler = SanaVideoFlow(SanaVideoFlowOptions(), family.scheduler_config())
    made = {}
    for size in family.resolutions()["480p"]:
        latents = family.latent_shape(ClipShape(1, size.height, size.width))
        made[size] = sampler.solve(predict, torch.randn(1, *latents, generator=torch.Generator().manual_seed(0)), 2)
    return made


def test_all_official_buckets_generate(family: SanaVideoFamily, buckets_clean: dict[Size, torch.Tensor]) -> None:
    """The pipeline itself refuses 7 of the 11. One that it refuses is decoded here, and all in the slow test below."""
    assert len(buckets_clean) == 11
    assert all(latents.isfinite().all() for latents in buckets_clean.values())
    size = Size(768, 528)
    with family.open_video_codec("cpu") as codec:
        assert tuple(codec.decode(buckets_clean[size]).shape) == (1, 3, 1, 528, 768)


@pytest.mark.slow
def test_all_official_buckets_decode(family: SanaVideoFamily, buckets_clean: dict[Size, torch.Tensor]) -> None:
    """Slow (25 CPU-seconds): the VAE decodes 11 pictures of 0.4 megapixels. The test above decodes one."""
    with family.open_video_codec("cpu") as codec:
        for size, latents in buckets_clean.items():
            pixels = codec.decode(latents)
            assert tuple(pixels.shape) == (1, 3, 1, size.height, size.width)
            assert pixels.isfinite().all()
