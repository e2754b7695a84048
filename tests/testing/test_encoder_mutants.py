"""Every rule about text encoders and video codecs fails for a toy family that breaks it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from vtrain_toy.codec import ToyCodec
from vtrain_toy.family import ToyFamily, ToyOptions
from vtrain_toy.text import ToyTextEncoder

from vtrain.contract import (
    Caption,
    ClipShape,
    Latents,
    Text,
    TextEncoderSpec,
)
from vtrain.testing import FamilyTests
from vtrain.testing.family_encoders import TextEncoderTests, VideoCodecTests

CLIP = ClipShape(9, 32, 48)
counter = itertools.count()
Subject = dict[str, Any]


def family(**members: object) -> ToyFamily:
    """A toy family with members of its class replaced."""
    broken = type("BrokenFamily", (ToyFamily,), members)
    made: ToyFamily = broken(ToyOptions())
    for name, value in members.items():
        if not callable(value):
            setattr(made, name, value)
    return made


def kit(**subject: object) -> Subject:
    return subject


def geometry(**members: object) -> Subject:
    return kit(family=family(**members))


def shaped(**members: object) -> Subject:
    return kit(family=family(**members), clip=CLIP)


class Encoder(ToyTextEncoder):
    """A text encoder whose result passes through `change`."""

    def __init__(self, change: Callable[[Text, Sequence[Caption]], Text]) -> None:
        super().__init__()
        self.change = change

    def encode(self, captions: Sequence[Caption], role: Any) -> Text:
        return self.change(super().encode(captions, role), captions)


def text(change: Callable[[Text, Sequence[Caption]], Text], **more: object) -> Subject:
    return kit(family=family(), text_encoders={"words": Encoder(change)}, **more)


def encoder_of(made: ToyFamily, **members: object) -> dict[str, TextEncoderSpec]:
    """The text encoders of a toy family, with members of the one replaced."""
    return {"words": replace(ToyFamily.text_encoders(made)["words"], **members)}


def declaring(**members: object) -> Subject:
    return geometry(text_encoders=lambda self: encoder_of(self, **members))


def long_text(given: Text, captions: Sequence[Caption]) -> Text:
    return Text.of(given.only.embeds.repeat(1, 9, 1), given.only.mask.repeat(1, 9))


class Codec(ToyCodec):
    """A codec whose latents or pixels pass through a change."""

    def __init__(
        self, encoded: Callable[[Tensor], Tensor] | None = None, decoded: Callable[[Tensor], Tensor] | None = None
    ):
        self.encoded = encoded or (lambda latents: latents)
        self.decoded = decoded or (lambda pixels: pixels)

    def encode(self, pixels: Tensor, *, std: bool = False) -> Latents:
        latents = super().encode(pixels, std=std)
        return Latents(self.encoded(latents.mean), latents.std)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoded(super().decode(latents))


class RememberingCodec(ToyCodec):
    """Its latents keep something of the clip before."""

    before: float = 0.0

    def encode(self, pixels: Tensor, *, std: bool = False) -> Latents:
        latents = super().encode(pixels, std=std)
        result = Latents(latents.mean + self.before, latents.std)
        self.before = float(latents.mean.sum())
        return result


class CroppingCodec(ToyCodec):
    def encode(self, pixels: Tensor, *, std: bool = False) -> Latents:
        _, _, frames, height, width = pixels.shape
        return super().encode(
            pixels[:, :, : frames - (frames - 1) % 4, : height - height % 16, : width - width % 16], std=std
        )


class SpreadlessCodec(ToyCodec):
    def encode(self, pixels: Tensor, *, std: bool = False) -> Latents:
        return super().encode(pixels)


class WholeCodec(ToyCodec):
    def drop_encoders(self) -> None:
        """Of drop_encoder."""


def keeping(opened: Callable[[], object]) -> Callable[..., Any]:
    """An open_... method that never lets go of what it opened."""

    @contextmanager
    def opening(self: ToyFamily, device: str) -> Iterator[object]:
        self.kept = opened()  # type: ignore[attr-defined]
        yield self.kept  # type: ignore[attr-defined]

    return opening


def undone(codec: ToyCodec) -> Subject:
    return kit(codec=codec, clip=CLIP, attributes={"least_psnr": 15.0})


PLANTED: tuple[tuple[str, str, str, Callable[[], Subject]], ...] = (
    (
        "`drop_encoders` for `drop_encoder`",
        "test_abilities_of_the_codec_are_spelt_right",
        "for drop_encoder of SupportsDecoderOnly?",
        lambda: kit(codec=WholeCodec()),
    ),
    (
        "embeddings of another width than is promised",
        "test_each_encoder_gives_the_parts_that_it_promises",
        'the part "text" is (2, 9, 23) where (2, 1 to 16, 24) is promised',
        lambda: text(lambda given, _: Text.of(given.only.embeds[..., :-1], given.only.mask), role="prompt"),
    ),
    (
        "text padded on the left",
        "test_masks_are_prefixes",
        "a real token of text after padding",
        lambda: text(lambda given, _: Text.of(given.only.embeds, given.only.mask.flip(1)), role="prompt"),
    ),
    (
        "a long caption that is not cut",
        "test_a_long_caption_keeps_to_the_token_limit",
        "144 tokens of text",
        lambda: text(long_text),
    ),
    (
        "a text encoder with dropout on",
        "test_encoding_a_caption_is_deterministic",
        "text is another the second time",
        lambda: text(lambda given, _: Text.of(given.only.embeds + next(counter), given.only.mask)),
    ),
    (
        "embeddings that are centred over the batch",
        "test_a_caption_does_not_depend_on_its_batch",
        "text differs by",
        lambda: text(lambda given, _: Text.of(given.only.embeds - given.only.embeds.mean(0), given.only.mask)),
    ),
    (
        "embeddings that ignore the caption",
        "test_different_captions_give_different_embeddings",
        "text is the same for two captions",
        lambda: text(lambda given, _: Text.of(torch.ones_like(given.only.embeds), given.only.mask)),
    ),
    (
        "embeddings in a graph",
        "test_no_embedding_is_in_a_graph",
        "words: in a graph",
        lambda: text(lambda given, _: Text.of(given.only.embeds.requires_grad_(), given.only.mask)),
    ),
    (
        "a text encoder that stays in memory",
        "test_the_text_encoders_are_released",
        "of words still in memory: ToyTextEncoder",
        lambda: geometry(text_encoders=lambda self: encoder_of(self, open=partial(keeping(ToyTextEncoder), self))),
    ),
    (
        "a codec with one latent frame more than latent_shape says",
        "test_latent_arithmetic_equals_a_real_encode",
        "48x32@1: encode gave (1, 12, 2, 4, 6)",
        lambda: kit(family=family(), codec=Codec(lambda latents: torch.cat([latents, latents[:, :, :1]], 2))),
    ),
    (
        "latents in half precision",
        "test_latents_are_finite_fp32_without_a_graph",
        "latents are torch.float16",
        lambda: kit(codec=Codec(Tensor.half), clip=CLIP),
    ),
    (
        "a codec that ignores std=True",
        "test_the_spread_is_given_when_asked",
        "std=True gives no spread",
        lambda: kit(codec=SpreadlessCodec(), clip=CLIP),
    ),
    (
        "a codec whose cache keeps something of the clip before",
        "test_encoding_a_clip_is_deterministic",
        "the same clip has other latents the second time",
        lambda: kit(codec=RememberingCodec(), clip=CLIP),
    ),
    (
        "latents of zeros",
        "test_encoding_sees_the_pixels",
        "two clips have the same latents",
        lambda: kit(codec=Codec(torch.zeros_like), clip=CLIP),
    ),
    (
        "latents that are centred over the batch",
        "test_encoded_clips_in_a_batch_do_not_see_each_other",
        "latents of a clip in a batch differ by",
        lambda: kit(codec=Codec(lambda latents: latents - 0.01 * latents.mean(0)), clip=CLIP),
    ),
    (
        "a decoder that loses the last frame",
        "test_decoding_gives_back_the_pixel_shape",
        "pixels (2, 3, 9, 32, 48) come back as (2, 3, 8, 32, 48)",
        lambda: kit(codec=Codec(decoded=lambda pixels: pixels[:, :, :-1]), clip=CLIP),
    ),
    (
        "pixels that are centred over the batch",
        "test_decoded_clips_in_a_batch_do_not_see_each_other",
        "pixels of a clip in a batch differ by",
        lambda: kit(codec=Codec(decoded=lambda pixels: pixels - 0.01 * pixels.mean(0)), clip=CLIP),
    ),
    (
        "a codec that crops in silence",
        "test_a_clip_off_the_rules_is_refused",
        "gave latents (1, 12, 3, 4, 6)",
        lambda: kit(family=family(), codec=CroppingCodec(), clip=CLIP),
    ),
    (
        "a codec that stays in memory",
        "test_the_codec_is_released",
        "still in memory: ToyCodec",
        lambda: shaped(open_video_codec=keeping(ToyCodec)),
    ),
    (
        "a decoder that plays the clip backwards",
        "test_decoding_undoes_encoding",
        "dB where 15 are asked for",
        lambda: undone(Codec(decoded=lambda pixels: pixels.flip(2))),
    ),
    (
        "a decoder that forgets the scale of latents",
        "test_decoding_undoes_encoding",
        "dB where 15 are asked for",
        lambda: undone(Codec(decoded=lambda pixels: pixels * 2)),
    ),
)
"""(the mistake, the rule that finds it, a piece of its message, the arguments with the mistake in them)."""


@pytest.mark.parametrize(("rule", "says", "subject"), [each[1:] for each in PLANTED], ids=[each[0] for each in PLANTED])
def test_the_rule_fails_for_an_encoder_that_breaks_it(
    rule: str, says: str, subject: Callable[..., Subject], breaks: Callable[..., None]
) -> None:
    breaks(FamilyTests(), rule, subject(), says)


def test_every_rule_of_encoders_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(TextEncoderTests) | rules_of(VideoCodecTests) == {rule for _, rule, _, _ in PLANTED}
