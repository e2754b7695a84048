"""The conformance kit on both families, one of them for either task, and the plugin as a whole."""

# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from torch import Tensor

from vtrain.contract import Condition, Family, Spec, Text
from vtrain.testing import FamilyTests, PluginTests, SpecTests
from vtrain_wan.plugin import WAN21, WAN22_TI2V

Prediction = Callable[[Tensor, Tensor, Condition], Tensor]


class WanKit(FamilyTests):
    """Against diffusers' own pipeline on the same folder. Other prompts, schedules and frames are in test_parity."""

    kind: Any = WanPipeline
    expects = frozenset(
        {"SupportsBlockMemory", "SupportsDecayRule", "SupportsDecoderOnly", "SupportsLora", "SupportsTokenCounts"}
        | {"SupportsTokenGrid", "SupportsWording"}
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
        return WAN21.build(WAN21.options.model_validate({"path": str(folder)}))

    @pytest.fixture(scope="class")
    @classmethod
    def model_folder(cls, folder: Path) -> tuple[Path, Callable[[Path], Family]]:
        return folder, cls.build

    @classmethod
    def pipeline(cls, folder: Path) -> Any:
        """Texts in the type that the family's options have, all else in fp32."""
        return cls.kind.from_pretrained(folder, dtype={"text_encoder": torch.bfloat16, "default": torch.float32})

    @classmethod
    def prediction(cls, transformer: Any) -> Prediction:
        def predict(noisy: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            given = {name: condition.extras.get(name) for name in ("image_latents", "image_embeds")}
            if given["image_latents"] is not None:
                noisy = torch.cat([noisy, given["image_latents"]], 1)
            text = condition.text.only.embeds.float()
            return transformer(noisy, 1000 * sigma, text, given["image_embeds"], return_dict=False)[0]

        return predict

    @pytest.fixture(scope="class")
    @classmethod
    def original(cls, folder: Path) -> Any:
        return cls.pipeline(folder)

    @pytest.fixture(scope="class")
    @classmethod
    def reference_predict(cls, original: Any) -> Prediction:
        return cls.prediction(original.transformer)

    @pytest.fixture(scope="class")
    @classmethod
    def reference_text(cls, original: Any) -> Callable[[Sequence[str], str], Text]:
        def encode(captions: Sequence[str], role: str) -> Text:
            both = original.encode_prompt(list(captions), list(captions), max_sequence_length=512)
            return Text.of(both[role == "negative"], None)

        return encode

    @pytest.fixture(scope="class")
    @classmethod
    def reference_latents(cls, original: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """As prepare_latents of WanImageToVideoPipeline and the end of WanPipeline have them."""
        vae = original.vae
        mean, std = (
            torch.tensor(each).view(1, -1, 1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (
            lambda pixels: (vae.encode(pixels).latent_dist.mode() - mean) / std,
            lambda latents: vae.decode(latents * std + mean).sample,
        )

    @pytest.fixture(scope="class")
    @classmethod
    def reference_lora(cls, folder: Path) -> Callable[[Path], Prediction]:
        def load(adapter: Path) -> Prediction:
            pipeline = cls.pipeline(folder)
            pipeline.load_lora_weights(adapter)
            return cls.prediction(pipeline.transformer)

        return load


@pytest.mark.slow
class TestWan21(WanKit):
    """Slow (10 s): image-to-video is the same family, and asks for all of it."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, wan21: Path) -> Path:
        return wan21


class TestImageToVideo(WanKit):
    kind = WanImageToVideoPipeline
    expects = WanKit.expects | {"SupportsConditions"}

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, i2v: Path) -> Path:
        return i2v


@pytest.mark.slow
class TestTI2V(WanKit):
    """Slow (10 s): what it has of its own is in test_parity and test_run too."""

    expects = WanKit.expects | {"SupportsConditions", "SupportsFrameLevels"}

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, ti2v: Path) -> Path:
        return ti2v

    @classmethod
    def build(cls, folder: Path) -> Family:
        return WAN22_TI2V.build(WAN22_TI2V.options.model_validate({"path": str(folder)}))


class TestWan21Spec(SpecTests):
    table: Mapping[str, object] = {"path": "owner/name"}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return WAN21


class TestTI2VSpec(SpecTests):
    table: Mapping[str, object] = {"path": "owner/name"}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return WAN22_TI2V


class TestPlugin(PluginTests):
    entry_module = "vtrain_wan.plugin"
    tables: Mapping[tuple[str, str], Mapping[str, object]] = {
        ("family", "wan21"): {"path": "owner/name"},
        ("family", "wan22-ti2v"): {"path": "owner/name"},
    }
