"""The family under test and what is opened from it once for each test class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from vtrain.contract import (
    Caption,
    ClipShape,
    Condition,
    Denoiser,
    Family,
    LatentShape,
    NoiseLevel,
    Text,
    TextEncoder,
    TextPart,
    VideoCodec,
    conditions_of,
    tensors_of,
    timed,
    torch_type,
)
from vtrain.testing.sampler import level_of, noise, padded, required

CAPTIONS = (Caption("a cat walks slowly over the wet grass"), Caption("a boat"))


@dataclass(frozen=True)
class Example:
    """One call of Denoiser.predict for two clips. latents: their shape; clip: in pixels."""

    noisy: Tensor
    level: NoiseLevel
    condition: Condition
    latents: LatentShape
    clip: ClipShape

    def run(self, denoiser: Denoiser) -> Tensor:
        return denoiser.predict(self.noisy, self.level, self.condition)

    def with_part(self, name: str, part: TextPart) -> Example:
        """With another part of its text."""
        text = Text({**self.condition.text.parts, name: part})
        return replace(self, condition=replace(self.condition, text=text))


def extras_of(family: Family, clip: ClipShape) -> dict[str, Tensor]:
    """What the denoiser gets beside text, of two clips: every tensor of the family's conditions, as noise in its type."""
    declared = tensors_of(conditions_of(family), clip).items()
    return {
        name: noise((2, *shape), seed).to(torch_type(dtype)) for seed, (name, (shape, dtype)) in enumerate(declared, 11)
    }


class FamilySubject:
    """Fixtures that a family's tests share.

    disturbance: the denoiser's weights are moved by this share of their own size before tests, plus the same absolutely,
    so that a layer that starts at zero hides no fault behind it.
    """

    disturbance: float = 0.02

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls) -> Family:
        """The family, built on a small model folder. Override it."""
        required("family", "the Family under test, built from its options on a small model folder, scope class")

    @pytest.fixture(scope="class")
    @classmethod
    def clip(cls, family: Family) -> ClipShape:
        """A small clip that is wider than high, of three latent frames or so."""
        stride, rule = family.pixel_stride, family.frame_rule
        return ClipShape(rule.offset + 2 * rule.stride, 2 * stride, 3 * stride)

    @pytest.fixture(scope="class")
    @classmethod
    def text_encoders(cls, family: Family) -> Iterator[Mapping[str, TextEncoder]]:
        """All of them, by name."""
        # No no_grad here: it would last for all tests of the class that come after the first that asks for this.
        with ExitStack() as stack:
            yield {name: stack.enter_context(spec.open("cpu")) for name, spec in family.text_encoders().items()}

    @pytest.fixture(scope="class")
    @classmethod
    def codec(cls, family: Family) -> Iterator[VideoCodec]:
        with family.open_video_codec("cpu") as codec:
            yield codec

    @pytest.fixture(scope="class")
    @classmethod
    def denoiser(cls, family: Family) -> Denoiser:
        return cls.disturbed(family.load_denoiser("cpu", "fp32"))

    @pytest.fixture(scope="class")
    @classmethod
    def example(cls, family: Family, clip: ClipShape) -> Example:
        return cls.example_of(family, clip)

    @classmethod
    def example_of(cls, family: Family, clip: ClipShape) -> Example:
        latents = family.latent_shape(clip)
        level = timed(family, level_of((0.3, 0.8)))
        return Example(
            noise((2, *latents)), level, Condition(cls.text_of(family), extras_of(family, clip)), latents, clip
        )

    @classmethod
    def text_of(cls, family: Family) -> Text:
        """CAPTIONS, as a denoiser gets them."""
        parts: dict[str, TextPart] = {}
        for spec in family.text_encoders().values():
            with spec.open("cpu") as encoder, torch.no_grad():
                parts |= padded(encoder.encode(CAPTIONS, "prompt"), spec).parts
        return Text(parts)

    @classmethod
    def by_frame(cls, family: Family, example: Example) -> Example:
        """The same with a level for each latent frame."""
        sigma = example.level.sigma[:, None].repeat(1, example.latents.frames)
        return replace(example, level=timed(family, NoiseLevel(sigma)))

    @classmethod
    def disturbed(cls, denoiser: Denoiser) -> Denoiser:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in denoiser.module.parameters():
                draw = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(cls.disturbance * (1 + weight.abs()) * draw)
        return denoiser
