"""Every rule about what a family says before anything is loaded fails for a toy family that breaks it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from vtrain_toy.codec import ToyCodec
from vtrain_toy.denoiser import ToyDenoiser, build_denoiser
from vtrain_toy.family import ToyFamily, ToyOptions
from vtrain_toy.transformer import ToyTransformer

from vtrain.contract import (
    BlockMemory,
    ClipShape,
    LatentShape,
    Problem,
    Size,
    TextEncoderSpec,
    TokenBytes,
    TokenGrid,
)
from vtrain.testing import FamilyTests
from vtrain.testing.family import AbilityTests, GeometryTests, MemoryTests

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


def encoder_of(made: ToyFamily, **members: object) -> dict[str, TextEncoderSpec]:
    """The text encoders of a toy family, with members of the one replaced."""
    return {"words": replace(ToyFamily.text_encoders(made)["words"], **members)}


def declaring(**members: object) -> Subject:
    return geometry(text_encoders=lambda self: encoder_of(self, **members))


def cropped(self: ToyFamily, clip: ClipShape) -> LatentShape:
    return LatentShape(12, (clip.frames + 3) // 4, clip.height // 8, clip.width // 8)


class Renamed(ToyDenoiser):
    """Its load_lora has another name."""

    read_lora = ToyDenoiser.load_lora
    load_lora = None  # type: ignore[assignment]  # as if there were none


def expecting(ability: str, **parts: object) -> Subject:
    """A toy family of which an ability is expected."""
    found = {"family": family(), "codec": ToyCodec(), "denoiser": build_denoiser(32, 3, 0, None)} | parts
    return found | {"attributes": {"expects": frozenset({ability})}}


PLANTED: tuple[tuple[str, str, str, Callable[[], Subject]], ...] = (
    (
        "default_frames that the codec does not take",
        "test_the_default_frames_obey_the_frame_rule",
        "default_frames = 10 is not 4k+1",
        lambda: geometry(default_frames=10),
    ),
    (
        "a default speed of 0",
        "test_the_default_speed_is_a_number_of_frames_per_second",
        "default_fps = 0.0",
        lambda: geometry(default_fps=0.0),
    ),
    (
        "a default size off the stride",
        "test_every_bucket_is_a_multiple_of_the_pixel_stride",
        "not multiples of 16: 72x64",
        lambda: geometry(default_size=Size(72, 64)),
    ),
    (
        "a bucket that is listed twice",
        "test_bucket_sets_have_sizes_and_no_size_twice",
        "tiny lists a size twice",
        lambda: geometry(resolutions=lambda self: {"tiny": (Size(64, 64), Size(64, 64))}),
    ),
    (
        "a grid of tokens that does not divide the latents",
        "test_tokens_divide_the_latents",
        "TokenGrid(frames=3, height=11",
        lambda: geometry(token_grid=lambda self, latents: TokenGrid(latents.frames, latents.height - 1, latents.width)),
    ),
    (
        "bytes of memory of another version of the model",
        "test_the_stored_memory_of_blocks_is_what_is_measured",
        "stored is BlockMemory",
        lambda: (
            geometry(block_memory=lambda self, **how: BlockMemory(TokenBytes(2360, 1400), TokenBytes(128, 1400)))
            | kit(weights="fp32", compute="fp32", frame_levels=True)
        ),
    ),
    (
        "`wordings` for `wording`",
        "test_abilities_of_the_family_are_spelt_right",
        "for wording of SupportsWording?",
        lambda: geometry(wordings=lambda self, caption, role: ""),
    ),
    (
        "a timestep that is the same for noise and for a clean clip",
        "test_timesteps_follow_the_level",
        "the timestep is the same for a clean clip and for noise",
        lambda: geometry(timestep=lambda self, sigma: 1000 * (sigma - 0.5).abs()),
    ),
    (
        "an official size without latents",
        "test_every_bucket_has_a_latent_shape",
        "64x64: LatentShape(channels=12, frames=0",
        lambda: geometry(latent_shape=lambda self, clip: LatentShape(12, 0, 8, 8)),
    ),
    (
        "latent_shape that crops in silence",
        "test_latent_shape_refuses_what_the_codec_does_not_take",
        "it must raise ValueError",
        lambda: shaped(latent_shape=cropped),
    ),
    (
        "pixel_frames that forgets that the first frame stands alone",
        "test_latent_frames_stand_for_every_pixel_frame_once",
        "latent frames stand for the frames [0, 1, 2, 3, 4",
        lambda: shaped(pixel_frames=lambda self, frame: range(4 * frame, 4 * frame + 4)),
    ),
    (
        "a number of parameters that is off by one",
        "test_counts_agree_with_the_denoiser",
        "parameters is 48175, and the denoiser has 48176",
        lambda: geometry(parameters=48_175) | kit(denoiser=build_denoiser(32, 3, 0, None)),
    ),
    (
        "check() that refuses a sound folder",
        "test_a_sound_model_folder_has_no_problem",
        "check() finds: odd",
        lambda: geometry(check=lambda self: (Problem("", "odd"),)),
    ),
    (
        "a number where describe() gives text",
        "test_descriptions_are_pairs_of_texts",
        "describe() gives [('blocks', 3)]",
        lambda: geometry(describe=lambda self: (("blocks", 3),)),
    ),
    (
        "a text encoder without a part",
        "test_text_is_declared_in_parts",
        "words has no part",
        lambda: declaring(parts={}),
    ),
    (
        "load_lora that was renamed",
        "test_it_has_the_abilities_that_its_author_expects",
        "the denoiser has lost SupportsLora: it has no load_lora",
        lambda: expecting("SupportsLora", denoiser=Renamed(ToyTransformer(32, 3))),
    ),
    (
        "an ability that there is not",
        "test_it_has_the_abilities_that_its_author_expects",
        '`expects` names SupportsLoras, which is no ability here. Did you mean "SupportsLora"?',
        lambda: expecting("SupportsLoras"),
    ),
    (
        "levels by frame that a change turned off",
        "test_it_has_the_abilities_that_its_author_expects",
        "the members of SupportsFrameLevels, and they say that it has nothing",
        lambda: expecting("SupportsFrameLevels", family=family(frame_levels=False)),
    ),
)
"""(the mistake, the rule that finds it, a piece of its message, the arguments with the mistake in them)."""


@pytest.mark.parametrize(("rule", "says", "subject"), [each[1:] for each in PLANTED], ids=[each[0] for each in PLANTED])
def test_the_rule_fails_for_a_family_that_breaks_it(
    rule: str, says: str, subject: Callable[..., Subject], breaks: Callable[..., None]
) -> None:
    breaks(FamilyTests(), rule, subject(), says)


def test_every_rule_about_what_a_family_says_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    rules = set().union(*map(rules_of, (GeometryTests, AbilityTests, MemoryTests)))
    assert rules == {rule for _, rule, _, _ in PLANTED}
