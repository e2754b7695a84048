"""The conformance kit on the family, its sampler and the plugin as a whole."""

# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLWan, SanaVideoPipeline, SanaVideoTransformer3DModel
from torch import Tensor

from vtrain.contract import Condition, Family, Sampler, Spec, Text
from vtrain.testing import FamilyTests, PluginTests, SamplerTests, SpecTests
from vtrain_sanavideo.plugin import FLOW, SANAVIDEO

Prediction = Callable[[Tensor, Tensor, Condition], Tensor]


class SanaKit(FamilyTests):
    """Against diffusers' own classes on the same folder, as SanaVideoPipeline calls them. More of it is in the other files."""

    expects = frozenset(
        {
            "SupportsBlockMemory",
            "SupportsCaptionExtras",
            "SupportsConditions",
            "SupportsDecayRule",
            "SupportsDecoderOnly",
        }
        | {"SupportsFrameLevels", "SupportsLora", "SupportsTokenCounts", "SupportsTokenGrid", "SupportsWording"}
    )

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls) -> Path:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, folder: Path) -> Family:
        return cls.build(folder)

    @classmethod
    def build(cls, folder: Path) -> Family:
        return SANAVIDEO.build(SANAVIDEO.options.model_validate({"path": str(folder)}))

    @pytest.fixture(scope="class")
    @classmethod
    def model_folder(cls, folder: Path) -> tuple[Path, Callable[[Path], Family]]:
        return folder, cls.build

    @classmethod
    def prediction(cls, transformer: Any) -> Prediction:
        def predict(noisy: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            embeds, mask = condition.text.only.masked
            inputs = {"encoder_hidden_states": embeds.float(), "encoder_attention_mask": mask.long()}
            return transformer(noisy, timestep=1000 * sigma, return_dict=False, **inputs)[0]

        return predict

    @pytest.fixture(scope="class")
    @classmethod
    def reference_predict(cls, folder: Path) -> Prediction:
        return cls.prediction(SanaVideoTransformer3DModel.from_pretrained(folder, subfolder="transformer"))

    @pytest.fixture(scope="class")
    @classmethod
    def reference_text(
        cls, folder: Path, text_pipeline: Callable[..., Any], encode_prompt: Callable[..., Any]
    ) -> Callable[[Sequence[str], str], Text]:
        """With the motion score that SanaVideoPipeline puts behind a prompt."""
        pipeline = text_pipeline(folder, torch.bfloat16)

        def encode(captions: Sequence[str], role: str) -> Text:
            if role == "negative":
                found = [encode_prompt(pipeline, "a cat", negative_prompt=caption)[2:] for caption in captions]
            else:
                found = [encode_prompt(pipeline, f"{caption} motion score: 30.")[:2] for caption in captions]
            embeds, mask = (torch.stack(part) for part in zip(*found, strict=True))
            return Text.of(embeds, mask.bool())

        return encode

    @classmethod
    def codec_of(cls, folder: Path) -> tuple[Any, Any, Any]:
        """The VAE, with mean and std of its latents."""
        vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae")
        return vae, torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)

    @pytest.fixture(scope="class")
    @classmethod
    def reference_latents(cls, folder: Path) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        vae, *numbers = cls.codec_of(folder)
        mean, std = (each.view(1, -1, 1, 1, 1) for each in numbers)
        return (
            lambda pixels: (vae.encode(pixels).latent_dist.mode() - mean) / std,
            lambda latents: vae.decode(latents * std + mean).sample,
        )

    @pytest.fixture(scope="class")
    @classmethod
    def reference_lora(cls, folder: Path) -> Callable[[Path], Prediction]:
        def load(adapter: Path) -> Prediction:
            pipeline = SanaVideoPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, vae=None)
            pipeline.load_lora_weights(adapter)
            return cls.prediction(pipeline.transformer)

        return load


class TestFamily(SanaKit):
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, checkpoint: Path) -> Path:
        return checkpoint


@pytest.mark.slow
class TestFamily720p(SanaKit):
    """Slow (the whole kit again): what differs of this checkpoint has its own tests."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, checkpoint_720p: Path) -> Path:
        return checkpoint_720p

    @classmethod
    def codec_of(cls, folder: Path) -> tuple[Any, Any, Any]:
        vae = AutoencoderKLLTX2Video.from_pretrained(folder, subfolder="vae").eval()
        return vae, vae.latents_mean, vae.latents_std


EXPECTED = frozenset({"SupportsStepwise"})
"""What its sampler is meant to be able to do, with every scheduler."""


class SamplerKit(SamplerTests):
    timesteps_of = FLOW.timesteps_of
    expects = EXPECTED

    @pytest.fixture(scope="class")
    @classmethod
    def reference_target(cls) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """v = e - x0 of rectified flow (Liu et al., arXiv 2209.03003), the target of NVlabs/Sana's training."""
        return lambda clean, noise, sigma: noise - clean


class TestSampler(SamplerKit):
    # diffusers' schedulers start pure noise at their first level, 0.99987 with shift 8, and not at 1.
    tolerance = 5e-4

    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls, checkpoint: Path) -> Sampler:
        family = SANAVIDEO.build(SANAVIDEO.options.model_validate({"path": str(checkpoint)}))
        return FLOW.build(FLOW.options(), family.scheduler_config())


def sampled_by(name: str, **settings: object) -> Sampler:
    """With another scheduler that a checkpoint may carry."""
    return FLOW.build(FLOW.options(), {"_class_name": name, **settings})


class TestEulerSampler(SamplerKit):
    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls) -> Sampler:
        return sampled_by("FlowMatchEulerDiscreteScheduler", shift=8.0)


class TestUniPCSampler(SamplerKit):
    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls) -> Sampler:
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0}
        return sampled_by("UniPCMultistepScheduler", **flow)


class TestFamilySpec(SpecTests):
    table: Mapping[str, object] = {"path": "owner/name"}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return SANAVIDEO


class TestSamplerSpec(SpecTests):
    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return FLOW


class TestPlugin(PluginTests):
    entry_module = "vtrain_sanavideo.plugin"
    tables: Mapping[tuple[str, str], Mapping[str, object]] = {("family", "sanavideo"): {"path": "owner/name"}}
