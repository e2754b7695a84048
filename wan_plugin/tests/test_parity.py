"""The same numbers as diffusers' own WanPipeline and WanImageToVideoPipeline: text, pictures, predictions, frames, adapters."""

# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image

from vtrain.contract import Caption, ClipShape, Condition, DType, NoiseLevel, Text, comfyui_names, timed
from vtrain.validate.generate import after, guided
from vtrain_builtin.flow import FLOW
from vtrain_wan.denoiser import ORIGINAL_NAMES, WanDenoiser
from vtrain_wan.family import Wan21Family
from vtrain_wan.text import wording

Families = Callable[..., Wan21Family]

PROMPTS = [
    "a cat walks over the wet grass",
    "  Tom &amp; Jerry &amp;quot;run&amp;quot;\n\ton the ﬁeld  ",
    "itâ€™s a boat — “wide” ﬂow…   ｆｕｌｌ　ｗｉｄｔｈ",
    "",
    "walks slowly over the wet grass " * 200,
]
"""HTML, broken encodings, ligatures, white space of every kind, nothing at all, and more than 512 tokens."""


MORE = pytest.mark.parametrize("checkpoint", ["wan21", pytest.param("ti2v", marks=pytest.mark.slow)], indirect=True)
"""Slow with TI2V (a second each), where both share all that is compared but sizes."""


def opened(checkpoint: Path, transformer: torch.dtype = torch.float32, kind: Any = WanPipeline) -> Any:
    found = kind.from_pretrained(checkpoint, dtype={"transformer": transformer, "default": torch.float32})
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def pipeline(checkpoint: Path) -> Any:
    return opened(checkpoint)


def encoded(family: Wan21Family, prompts: list[str], role: Any = "prompt") -> tuple[torch.Tensor, torch.Tensor]:
    """(embeds (B, L, D), mask) as the encoder gives them."""
    with family.text_encoders()["umt5"].open("cpu") as encoder:
        return encoder.encode([Caption(prompt) for prompt in prompts], role).only.masked


def conditioned(family: Wan21Family, prompts: list[str], role: Any = "prompt") -> Condition:
    """As a denoiser gets it: zeros up to 512."""
    embeds, mask = encoded(family, prompts, role)
    embeds = embeds.masked_fill(~mask[..., None], 0)
    return Condition(Text.of(torch.nn.functional.pad(embeds, (0, 0, 0, 512 - embeds.shape[1])), None))


def test_a_prompt_is_cleaned_as_the_pipeline_does() -> None:
    assert [wording(Caption(text), "prompt") for text in PROMPTS] == [prompt_clean(text) for text in PROMPTS]
    assert wording(Caption(PROMPTS[2]), "prompt") == 'it\'s a boat — "wide" flow… full width'


@MORE
def test_text_embeddings_are_bit_for_bit_the_pipelines(family: Wan21Family, pipeline: Any) -> None:
    negatives = ["bad quality &amp; text"] * len(PROMPTS)
    with torch.no_grad():
        theirs, negative = pipeline.encode_prompt(PROMPTS, negatives, max_sequence_length=512)
    embeds, mask = encoded(family, PROMPTS)
    ours = conditioned(family, PROMPTS).text.only.embeds
    assert torch.equal(ours, theirs)
    assert torch.equal(embeds[mask], theirs[:, : mask.shape[1]][mask])
    assert mask.sum(dim=1).tolist()[-2:] == [1, 512]
    assert torch.equal(conditioned(family, negatives, "negative").text.only.embeds, negative)


@MORE
def test_a_dropped_caption_is_the_pipelines_negative_prompt_when_none_is_given(
    family: Wan21Family, pipeline: Any
) -> None:
    with torch.no_grad():
        _, empty = pipeline.encode_prompt("a cat", max_sequence_length=512)
    assert torch.equal(conditioned(family, ["a cat"], "dropped").text.only.embeds, empty)


class Euler(FlowMatchEulerDiscreteScheduler):
    """On the grid of vtrain's `flow`: shifted once, from 1 to 0. The scheduler's own grid has its last level shifted twice."""

    def set_timesteps(self, steps: int, device: object = None) -> None:  # type: ignore[override]
        super().set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), device=device)


SIZE = {"height": 64, "width": 96, "num_frames": 9}


def recorded(pipeline: Any, **settings: Any) -> tuple[Any, list[tuple[dict[str, Any], torch.Tensor]]]:
    """The pipeline's frames, and every call of its transformer with what it gave."""
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []

    def keep(_: object, __: object, given: dict[str, Any], output: tuple[torch.Tensor]) -> None:
        calls.append((dict(given), output[0]))

    handle = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    frames = pipeline(**SIZE, **settings).frames
    handle.remove()
    return frames, calls


@MORE
@pytest.mark.parametrize("name", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_prediction_of_a_unipc_sampling_is_the_pipelines(
    family: Wan21Family, checkpoint: Path, name: DType
) -> None:
    """The checkpoint's own UniPC chooses states and timesteps; the denoiser is asked at each of them, with either text."""
    pipeline = opened(checkpoint, {"fp32": torch.float32, "bf16": torch.bfloat16}[name])
    _, calls = recorded(pipeline, prompt="a boat", num_inference_steps=2, output_type="latent")
    assert len(calls) == 4
    denoiser = family.load_denoiser("cpu", name)
    sides = [conditioned(family, ["a boat"]), conditioned(family, [""], "negative")]
    for (given, theirs), condition in zip(calls, sides * 2, strict=True):
        timestep = given["timestep"].float()
        whole = timestep if timestep.ndim == 1 else timestep[:, 0]
        with torch.no_grad():
            ours = denoiser.predict(given["hidden_states"], NoiseLevel(whole / 1000, whole), condition)
        if timestep.ndim == 1:
            assert torch.equal(ours, theirs)
        else:  # the pipeline hands each token the clip's level: the same up to the order of sums
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 if name == "fp32" else 2e-2)


def test_levels_by_frame_are_the_timesteps_by_token_that_the_pipeline_gives(ti2v: Path, family_of: Families) -> None:
    """WanImageToVideoPipeline keeps the first latent frame clean: level 0 for its tokens. Bit for bit."""
    family = family_of(ti2v)
    denoiser = family.load_denoiser("cpu", "fp32")
    noisy = torch.randn((1, 48, 3, 4, 6), generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([[0.0, 700.0, 700.0]])
    text = conditioned(family, ["a boat"])
    mask = torch.ones(3, 4, 6)
    mask[0] = 0
    by_token = (mask[:, ::2, ::2] * 700.0).flatten()[None]  # as pipeline_wan_i2v.py makes them
    with torch.no_grad():
        ours = denoiser.predict(noisy, NoiseLevel(timestep / 1000, timestep), text)
        theirs = denoiser.module(noisy, by_token, text.text.only.embeds, return_dict=False)[0]
    assert torch.equal(ours, theirs)


@MORE
def test_frames_are_the_pipelines_within_one_of_255(family: Wan21Family, pipeline: Any, checkpoint: Path) -> None:
    """From the same noise, Euler steps on the same grid: vtrain's `flow` here, FlowMatchEulerDiscreteScheduler there."""
    pipeline.scheduler = Euler(shift=3.0)
    noise = torch.randn((1, *family.latent_shape(ClipShape(9, 64, 96))), generator=torch.Generator().manual_seed(3))
    theirs, calls = recorded(
        pipeline, prompt="a cat", num_inference_steps=3, guidance_scale=5.0, latents=noise, output_type="np"
    )
    sides = [conditioned(family, ["a cat"]), conditioned(family, [""], "negative")]
    denoiser = family.load_denoiser("cpu", "fp32")

    def predict(noisy: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        found = denoiser.predict(noisy, level, sides[0])
        other = denoiser.predict(noisy, level, sides[1])
        return other + 5.0 * (found - other)

    assert len(calls) == 6
    frames_are(family, predict, noise, theirs, steps=3)


@pytest.mark.slow
def test_latents_are_the_vaes_mode_normalised_as_the_pipeline_undoes_it(family: Wan21Family, pipeline: Any) -> None:
    """Slow (3 s): encoding is compared with a picture, decoding in frames."""
    pixels = torch.rand((1, 3, 9, 64, 96), generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = pipeline.vae.config
    mean, std = (torch.tensor(each)[None, :, None, None, None] for each in (config.latents_mean, config.latents_std))
    with torch.no_grad(), family.open_video_codec("cpu") as codec:
        wanted = pipeline.vae.encode(pixels).latent_dist
        found = codec.encode(pixels, std=True)
        assert torch.equal(found.mean, (wanted.mode() - mean) / std)
        assert found.std is not None
        torch.testing.assert_close(found.std, wanted.std / std)
        decoded = pipeline.vae.decode(found.mean / (1 / std) + mean).sample
        assert torch.equal(codec.decode(found.mean), decoded)


CLIP = ClipShape(9, 64, 96)


def picture() -> tuple[Image.Image, torch.Tensor]:
    """As the pipeline is given it, and as an encoder of a condition is: (1, 3, 1, H, W) in [-1, 1]."""
    y, x = np.mgrid[:64, :96]
    shades = np.stack([np.sin(x / 7 + channel) + np.cos(y / 5 - channel) for channel in range(3)], -1) * 60 + 128
    found = Image.fromarray(shades.astype(np.uint8))
    return found, torch.from_numpy(shades.astype(np.uint8)).permute(2, 0, 1)[None, :, None] / 127.5 - 1


def extras(family: Wan21Family) -> dict[str, torch.Tensor]:
    """What the family's encoders make of the picture."""
    found: dict[str, torch.Tensor] = {}
    for condition in family.conditions():
        assert condition.encoder is not None
        with condition.encoder.open("cpu") as encoder:
            found |= encoder.encode(picture()[1], CLIP)
    return found


def test_a_picture_is_encoded_as_prepare_latents_and_encode_image_do(i2v: Path, family_of: Families) -> None:
    """A white patch, a black one and colours; the embedding bit for bit, the latents but for the order of a product."""
    pipeline = opened(i2v, kind=WanImageToVideoPipeline)
    shown, pixels = picture()
    with torch.no_grad():
        _, latents = pipeline.prepare_latents(pixels[:, :, 0], 1, 16, 64, 96, 9, torch.float32, torch.device("cpu"))
        embeds = pipeline.encode_image(shown)
    found = extras(family_of(i2v))
    assert found.keys() == {"image_latents", "image_embeds"}
    assert torch.equal(found["image_embeds"], embeds)
    assert torch.equal(found["image_latents"][:, :4], latents[:, :4])
    torch.testing.assert_close(found["image_latents"], latents, rtol=1e-6, atol=1e-6)


def test_predictions_and_frames_from_a_picture_are_the_image_to_video_pipelines(i2v: Path, family_of: Families) -> None:
    """From the same noise, with guidance; every prediction is asked again at the states that the pipeline chose."""
    family, pipeline = family_of(i2v), opened(i2v, kind=WanImageToVideoPipeline)
    pipeline.scheduler = Euler(shift=3.0)
    noise = torch.randn((1, *family.latent_shape(CLIP)), generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np", "image": picture()[0]}
    theirs, calls = recorded(pipeline, prompt="a cat", latents=noise, **settings)
    denoiser, given = family.load_denoiser("cpu", "fp32"), extras(family)
    sides = [conditioned(family, ["a cat"]), conditioned(family, [""], "negative")]
    assert len(calls) == 4
    for number, (asked, wanted) in enumerate(calls):
        side, timestep = sides[number % 2].text, asked["timestep"].float()
        noisy = asked["hidden_states"]
        with torch.no_grad():
            ours = denoiser.predict(noisy[:, :16], NoiseLevel(timestep / 1000, timestep), Condition(side, given))
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    both = Text.of(torch.cat([side.text.only.embeds for side in reversed(sides)]), None)
    frames_are(family, guided(denoiser, Condition(both, given), 4.0), noise, theirs, steps=2)


def frames_are(
    family: Wan21Family, guess: Any, noise: torch.Tensor, theirs: Any, steps: int, clean: Any = None, shift: float = 3.0
) -> None:
    """The frames that vtrain's `flow` makes from this noise are within one of 255 of the pipeline's."""
    flow = FLOW.build(FLOW.options(shift=shift), family.scheduler_config())
    with torch.no_grad(), family.open_video_codec("cpu") as codec:
        solved = flow.solve(lambda noisy, level: guess(noisy, timed(family, level)), noise, steps=steps)
        ours = codec.decode(solved if clean is None else torch.cat([clean, solved], 2))
    found = (ours[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).numpy() * 255
    assert found.std() > 1
    assert np.abs(found - theirs[0] * 255).max() < 1


def test_frames_after_a_clean_first_one_are_the_image_to_video_pipelines(ti2v: Path, family_of: Families) -> None:
    """Wan 2.2 TI2V: expand_timesteps. The picture's latents stay, at timestep 0 in every call; with guidance and its own shift."""
    family, pipeline, shift = family_of(ti2v), opened(ti2v, kind=WanImageToVideoPipeline), 5.0
    pipeline.scheduler = Euler(shift=shift)
    noise = torch.randn((1, *family.latent_shape(CLIP)), generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np", "image": picture()[0]}
    theirs, calls = recorded(pipeline, prompt="a cat", latents=noise, **settings)
    with family.open_video_codec("cpu") as codec:
        clean = codec.encode(picture()[1]).mean
    denoiser = family.load_denoiser("cpu", "fp32")
    sides = [conditioned(family, ["a cat"]).text, conditioned(family, [""], "negative").text]
    assert len(calls) == 4
    for number, (asked, wanted) in enumerate(calls):
        assert asked["timestep"].unflatten(1, (3, -1))[:, 0].abs().max() == 0
        torch.testing.assert_close(asked["hidden_states"][:, :, :1], clean, rtol=1e-6, atol=1e-6)
        timestep = asked["timestep"][:, -1].float()
        guess = after(family, clean, guided(denoiser, Condition(sides[number % 2]), 1.0))
        with torch.no_grad():
            ours = guess(asked["hidden_states"][:, :, 1:], NoiseLevel(timestep / 1000, timestep))
        torch.testing.assert_close(ours, wanted[:, :, 1:], rtol=1e-5, atol=1e-5)
    both = Text.of(torch.cat([side.only.embeds for side in reversed(sides)]), None)
    guess = after(family, clean, guided(denoiser, Condition(both), 4.0))
    frames_are(family, guess, noise[:, :, 1:], theirs, 2, clean, shift)


def adapted(denoiser: WanDenoiser) -> dict[str, torch.Tensor]:
    """The state of an adapter that does something."""
    denoiser.module.requires_grad_(False)
    targets = list(denoiser.lora_targets)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=targets), denoiser.module)
    for number, (name, parameter) in enumerate(denoiser.module.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return get_peft_model_state_dict(denoiser.module)


SETTINGS: dict[str, object] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@MORE
def test_an_adapter_loads_in_the_pipeline_with_no_unmatched_key_and_predicts_the_same(
    family: Wan21Family, pipeline: Any, tmp_path: Path
) -> None:
    denoiser = family.load_denoiser("cpu", "fp32")
    state = adapted(denoiser)
    assert len(state) == 2 * family.block_count * 10
    denoiser.save_lora(tmp_path, state, SETTINGS | {"target_modules": list(denoiser.lora_targets)})
    pipeline.load_lora_weights(tmp_path)
    there = {name.replace(".default_0", "") for name in pipeline.transformer.state_dict() if "lora_" in name}
    assert there == set(state)
    text = conditioned(family, ["a boat"])
    noisy = torch.randn((1, *family.latent_shape(ClipShape(9, 64, 96))), generator=torch.Generator().manual_seed(0))
    level = NoiseLevel(torch.tensor([0.5]), torch.tensor([500.0]))
    with torch.no_grad():
        ours = denoiser.predict(noisy, level, text)
        theirs = pipeline.transformer(noisy, torch.tensor([500.0]), text.text.only.embeds, return_dict=False)[0]
        plain = family.load_denoiser("cpu", "fp32").predict(noisy, level, text)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, plain, atol=1e-2)


def test_an_adapter_of_image_to_video_loads_in_its_pipeline_with_no_unmatched_key(
    i2v: Path, family_of: Families, tmp_path: Path
) -> None:
    """The keys and values of pictures are adapted too; ComfyUI's names come back through diffusers' own converter."""
    denoiser, pipeline = family_of(i2v).load_denoiser("cpu", "fp32"), opened(i2v, kind=WanImageToVideoPipeline)
    state = adapted(denoiser)
    assert len(state) == 2 * 4 * 12
    denoiser.save_lora(tmp_path, state, SETTINGS | {"target_modules": list(denoiser.lora_targets)})
    pipeline.load_lora_weights(tmp_path)
    there = {name.replace(".default_0", ""): value for name, value in pipeline.transformer.state_dict().items()}
    assert {name for name in there if "lora_" in name} == set(state)
    assert all(torch.equal(there[name], value) for name, value in state.items())
    comfy = {name: state[own] for own, name in comfyui_names(state, ORIGINAL_NAMES).items()}
    assert "diffusion_model.blocks.3.cross_attn.k_img.lora_down.weight" in comfy
    back = _convert_non_diffusers_wan_lora_to_diffusers(comfy)
    assert back.keys() == {f"transformer.{name}" for name in state}


@MORE
def test_original_names_are_those_that_diffusers_itself_translates_back(family: Wan21Family, tmp_path: Path) -> None:
    """ComfyUI reads Wan's own names behind `diffusion_model.`; diffusers' converter of such files is the witness."""
    denoiser = family.load_denoiser("cpu", "fp32")
    state = adapted(denoiser)
    names = comfyui_names(state, ORIGINAL_NAMES)
    comfy = {names[name]: value for name, value in state.items()}
    assert "diffusion_model.blocks.0.self_attn.q.lora_down.weight" in comfy
    assert "diffusion_model.blocks.3.ffn.2.lora_up.weight" in comfy
    back = _convert_non_diffusers_wan_lora_to_diffusers(comfy)
    assert back.keys() == {f"transformer.{name}" for name in state}
    assert all(torch.equal(back[f"transformer.{name}"], value) for name, value in state.items())


@MORE
def test_a_saved_denoiser_loads_with_from_pretrained(family: Wan21Family, tmp_path: Path) -> None:
    denoiser = family.load_denoiser("cpu", "bf16")
    denoiser.save(tmp_path, denoiser.module.state_dict())
    module, report = WanTransformer3DModel.from_pretrained(
        tmp_path / "transformer", torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    own = denoiser.module.state_dict()
    assert all(
        torch.equal(value, own[name]) and value.dtype == own[name].dtype for name, value in module.state_dict().items()
    )
    assert own["blocks.0.scale_shift_table"].dtype == torch.float32
