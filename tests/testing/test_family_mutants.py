"""Every rule of the family kit about what a family says, its text encoders and its codec fails for a toy family that breaks it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vtrain_toy.codec import ToyCodec
from vtrain_toy.denoiser import build_denoiser
from vtrain_toy.family import ToyFamily, ToyOptions
from vtrain_toy.text import ToyTextEncoder

from vtrain.contract import (
    BlockMemory,
    Caption,
    ClipShape,
    Latents,
    LatentShape,
    Problem,
    Size,
    Text,
    TextEncoderSpec,
    TokenBytes,
    TokenGrid,
)
from vtrain.testing import FamilyTests
from vtrain.testing.family_captions import CaptionTests
from vtrain.testing.family_conditions import ConditionTests
from vtrain.testing.family_denoiser import DenoiserTests, LoraTests, TapTests

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


def cropped(self: ToyFamily, clip: ClipShape) -> LatentShape:
    return LatentShape(12, (clip.frames + 3) // 4, clip.height // 8, clip.width // 8)


def unread(self: ToyFamily, hash_file: Callable[[Path], str]) -> str:
    hash_file(Path(__file__))
    return "always the same"


MUTANTS: Mapping[str, Callable[[Path], Subject]] = {
    "test_the_default_frames_obey_the_frame_rule": lambda _: geometry(default_frames=10),
    "test_the_default_speed_is_a_number_of_frames_per_second": lambda _: geometry(default_fps=0.0),
    "test_every_bucket_is_a_multiple_of_the_pixel_stride": lambda _: geometry(default_size=Size(72, 64)),
    "test_bucket_sets_have_sizes_and_no_size_twice": lambda _: geometry(
        resolutions=lambda self: {"tiny": (Size(64, 64), Size(64, 64))}
    ),
    "test_tokens_divide_the_latents": lambda _: geometry(
        token_grid=lambda self, latents: TokenGrid(latents.frames, latents.height - 1, latents.width)
    ),
    "test_the_stored_memory_of_blocks_is_what_is_measured": lambda _: (
        geometry(block_memory=lambda self, **how: BlockMemory(TokenBytes(2360, 1400), TokenBytes(128, 1400)))
        | kit(weights="fp32", compute="fp32", frame_levels=True)
    ),
    "test_abilities_of_the_family_are_spelt_right": lambda _: geometry(wordings=lambda self, caption, role: ""),
    "test_abilities_of_the_codec_are_spelt_right": lambda _: kit(codec=WholeCodec()),
    "test_timesteps_follow_the_level": lambda _: geometry(timestep=lambda self, sigma: 1000 * (sigma - 0.5).abs()),
    "test_every_bucket_has_a_latent_shape": lambda _: geometry(
        latent_shape=lambda self, clip: LatentShape(12, 0, 8, 8)
    ),
    "test_latent_shape_refuses_what_the_codec_does_not_take": lambda _: shaped(latent_shape=cropped),
    "test_latent_frames_stand_for_every_pixel_frame_once": lambda _: shaped(
        pixel_frames=lambda self, frame: range(4 * frame, 4 * frame + 4)
    ),
    "test_counts_agree_with_the_denoiser": lambda _: (
        geometry(parameters=48_175) | kit(denoiser=build_denoiser(32, 3, 0, None))
    ),
    "test_a_sound_model_folder_has_no_problem": lambda _: geometry(check=lambda self: (Problem("", "odd"),)),
    "test_descriptions_are_pairs_of_texts": lambda _: geometry(describe=lambda self: (("blocks", 3),)),
    "test_fingerprints_are_stable_and_differ_from_each_other": lambda _: geometry(
        text_encoders=lambda self: encoder_of(self, fingerprint=lambda hash_file: str(next(counter)))
    ),
    "test_fingerprints_follow_the_files_they_hash": lambda _: geometry(video_fingerprint=unread),
    "test_each_encoder_gives_the_parts_that_it_promises": lambda _: text(
        lambda given, _: Text.of(given.only.embeds[..., :-1], given.only.mask), role="prompt"
    ),
    "test_masks_are_prefixes": lambda _: text(
        lambda given, _: Text.of(given.only.embeds, given.only.mask.flip(1)), role="prompt"
    ),
    "test_a_long_caption_keeps_to_the_token_limit": lambda _: text(long_text),
    "test_encoding_a_caption_is_deterministic": lambda _: text(
        lambda given, _: Text.of(given.only.embeds + next(counter), given.only.mask)
    ),
    "test_a_caption_does_not_depend_on_its_batch": lambda _: text(
        lambda given, _: Text.of(given.only.embeds - given.only.embeds.mean(0), given.only.mask)
    ),
    "test_different_captions_give_different_embeddings": lambda _: text(
        lambda given, _: Text.of(torch.ones_like(given.only.embeds), given.only.mask)
    ),
    "test_no_embedding_is_in_a_graph": lambda _: text(
        lambda given, _: Text.of(given.only.embeds.requires_grad_(), given.only.mask)
    ),
    "test_the_text_encoders_are_released": lambda _: geometry(
        text_encoders=lambda self: encoder_of(self, open=partial(keeping(ToyTextEncoder), self))
    ),
    "test_text_is_declared_in_parts": lambda _: declaring(parts={}),
    "test_latent_arithmetic_equals_a_real_encode": lambda _: kit(
        family=family(), codec=Codec(lambda latents: torch.cat([latents, latents[:, :, :1]], 2))
    ),
    "test_latents_are_finite_fp32_without_a_graph": lambda _: kit(codec=Codec(Tensor.half), clip=CLIP),
    "test_the_spread_is_given_when_asked": lambda _: kit(codec=SpreadlessCodec(), clip=CLIP),
    "test_encoding_a_clip_is_deterministic": lambda _: kit(codec=RememberingCodec(), clip=CLIP),
    "test_encoding_sees_the_pixels": lambda _: kit(codec=Codec(torch.zeros_like), clip=CLIP),
    "test_encoded_clips_in_a_batch_do_not_see_each_other": lambda _: kit(
        codec=Codec(lambda latents: latents - 0.01 * latents.mean(0)), clip=CLIP
    ),
    "test_decoding_gives_back_the_pixel_shape": lambda _: kit(
        codec=Codec(decoded=lambda pixels: pixels[:, :, :-1]), clip=CLIP
    ),
    "test_decoded_clips_in_a_batch_do_not_see_each_other": lambda _: kit(
        codec=Codec(decoded=lambda pixels: pixels - 0.01 * pixels.mean(0)), clip=CLIP
    ),
    "test_a_clip_off_the_rules_is_refused": lambda _: kit(family=family(), codec=CroppingCodec(), clip=CLIP),
    "test_the_codec_is_released": lambda _: shaped(open_video_codec=keeping(ToyCodec)),
}
"""Rule -> the arguments that break it."""


@pytest.mark.parametrize("rule", MUTANTS)
def test_the_rule_fails_for_a_family_that_breaks_it(rule: str, tmp_path: Path, breaks: Callable[..., None]) -> None:
    breaks(FamilyTests(), rule, MUTANTS[rule](tmp_path))


def test_every_rule_of_the_family_kit_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    """Those of captions, of conditions and of the denoiser are in files of their own."""
    elsewhere = (CaptionTests, ConditionTests, DenoiserTests, TapTests, LoraTests)
    assert rules_of(FamilyTests) - set().union(*map(rules_of, elsewhere)) == MUTANTS.keys()
