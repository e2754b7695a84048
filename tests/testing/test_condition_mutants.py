"""Every rule about conditions fails for a toy family that breaks it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vtrain_toy.codec import PictureEncoder
from vtrain_toy.denoiser import ToyDenoiser
from vtrain_toy.family import ToyFamily, ToyOptions
from vtrain_toy.pictures import ToyPicturesFamily, ToyPicturesOptions
from vtrain_toy.transformer import ToyTransformer

from vtrain.contract import ClipShape, Condition, ConditionSpec, NoiseLevel, Problem
from vtrain.testing import FamilyTests
from vtrain.testing.family_conditions import ConditionTests

CLIP = ClipShape(9, 32, 48)
counter = itertools.count()
Subject = dict[str, Any]
Made = dict[str, Tensor]


class Encoder(PictureEncoder):
    """Its tensors pass through a change in the end."""

    def __init__(self, change: Callable[[Made], Made]) -> None:
        super().__init__(None, "cpu")
        self.change = change

    def encode(self, pixels: Tensor, clip: ClipShape) -> Made:
        return self.change(super().encode(pixels, clip))


class Family(ToyPicturesFamily):
    """`toy-pictures` with members of its encoder's spec replaced."""

    def __init__(self, **members: object) -> None:
        super().__init__(ToyPicturesOptions())
        self._members = members

    def conditions(self) -> tuple[ConditionSpec, ...]:
        (condition,) = super().conditions()
        assert condition.encoder is not None
        members: dict[str, Any] = dict(self._members)
        return (replace(condition, encoder=replace(condition.encoder, **members)),)


def encoding(change: Callable[[Made], Made]) -> Subject:
    @contextmanager
    def opening(device: str) -> Iterator[Encoder]:
        yield Encoder(change)

    return {"family": Family(open=opening), "clip": CLIP}


def kept() -> Subject:
    """An encoder that stays in memory."""
    every: list[Encoder] = []

    @contextmanager
    def opening(device: str) -> Iterator[Encoder]:
        every.append(Encoder(dict))
        yield every[-1]

    return {"family": Family(open=opening), "clip": CLIP}


def unread(hash_file: Callable[[Path], str]) -> str:
    hash_file(Path(__file__))
    return "always the same"


class Ignoring(ToyDenoiser):
    """It sees the picture, and not its colours."""

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        return super().predict(noisy, level, Condition(condition.text, {"picture": condition.extras["picture"]}))


class Alone(ToyDenoiser):
    """What it makes of a frame does not depend on the frame before."""

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        each = [super(Alone, self).predict(frame, NoiseLevel(level.sigma[:, n], level.timestep[:, n]), condition)
                for n, frame in enumerate(noisy.split(1, 2))]  # fmt: skip
        return torch.cat(each, 2)


def twice(name: str) -> Subject:
    """Two conditions of one name, or with one tensor."""
    family = Family()
    (condition,) = family.conditions()
    both = (condition, replace(condition, name=name))
    family.conditions = lambda: both  # type: ignore[method-assign]
    return {"family": family, "clip": CLIP}


def mixed(made: Made) -> Made:
    return {name: each + each.mean(0, keepdim=True) for name, each in made.items()}


def later(made: Made) -> Made:
    return {**made, "colours": made["colours"] + next(counter)}


PLANTED: tuple[tuple[str, str, str, Callable[[], Subject]], ...] = (
    (
        "two conditions of one name",
        "test_conditions_are_declared_without_contradiction",
        "two conditions are called alike",
        lambda: twice("picture"),
    ),
    (
        "a condition in another type than declared",
        "test_encoded_conditions_are_what_was_declared",
        "colours is torch.float32",
        lambda: encoding(lambda made: {**made, "colours": made["colours"].float()}),
    ),
    (
        "an encoder of a condition with dropout on",
        "test_encoding_a_condition_is_deterministic",
        "differ: colours",
        lambda: encoding(later),
    ),
    (
        "a condition of zeros",
        "test_encoding_a_condition_sees_the_pixels",
        "picture ignores the pixels",
        lambda: encoding(lambda made: {name: torch.zeros_like(each) for name, each in made.items()}),
    ),
    (
        "conditions that are mixed over the batch",
        "test_conditions_in_a_batch_do_not_see_each_other",
        "picture differs by",
        lambda: encoding(mixed),
    ),
    (
        "an encoder of a condition that stays in memory",
        "test_the_encoders_of_conditions_are_released",
        "picture: still in memory",
        kept,
    ),
    (
        "a condition's fingerprint that forgets a file's hash",
        "test_fingerprints_of_conditions_follow_their_files_alone",
        "picture ignores the contents of",
        lambda: {"family": Family(fingerprint=unread)},
    ),
    (
        "a condition that predict does not hand on",
        "test_conditions_reach_the_denoiser",
        "its value of colours changes nothing",
        lambda: {
            "family": Family(),
            "denoiser": Ignoring(ToyTransformer(32, 3, pictures=True)),
            "example": FamilyTests.example_of(Family(), CLIP),
        },
    ),
    (
        "frames that do not see the given one",
        "test_clean_frames_reach_the_others",
        "the frames that are given change nothing in the others",
        lambda: {
            "family": ToyFamily(ToyOptions()),
            "denoiser": Alone(ToyTransformer(32, 3)),
            "example": FamilyTests.example_of(ToyFamily(ToyOptions()), CLIP),
        },
    ),
)
"""(the mistake, the rule that finds it, a piece of its message, the arguments with the mistake in them)."""


@pytest.mark.parametrize(("rule", "says", "subject"), [each[1:] for each in PLANTED], ids=[each[0] for each in PLANTED])
def test_the_rule_fails_for_a_family_that_breaks_it(
    rule: str, says: str, subject: Callable[..., Subject], breaks: Callable[..., None]
) -> None:
    breaks(FamilyTests(), rule, subject(), says)


def test_every_rule_about_conditions_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(ConditionTests) == {rule for _, rule, _, _ in PLANTED}


@pytest.mark.parametrize(
    ("rule", "subject", "words"),
    [
        ("conditions_are_declared_without_contradiction", lambda: twice("other"), "two tensors are called alike"),
        (
            "conditions_are_declared_without_contradiction",
            lambda: {"family": Family(check=lambda: (Problem("", "odd"),)), "clip": CLIP},
            r"check\(\) of picture finds something",
        ),
        (
            "encoded_conditions_are_what_was_declared",
            lambda: encoding(lambda made: {"picture": made["picture"]}),
            "instead of",
        ),
        (
            "fingerprints_of_conditions_follow_their_files_alone",
            lambda: {"family": Family(fingerprint=lambda hash_file: str(next(counter)))},
            "the second time",
        ),
    ],
)
def test_other_ways_to_break_a_rule_are_named(rule: str, subject: Callable[[], Subject], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        getattr(FamilyTests(), f"test_{rule}")(**subject())


def test_a_family_that_takes_text_alone_is_skipped_with_the_reason() -> None:
    family = ToyFamily(ToyOptions())
    family.conditions = lambda: ()  # type: ignore[method-assign]
    with pytest.raises(pytest.skip.Exception, match="SupportsConditions"):
        FamilyTests().test_conditions_are_declared_without_contradiction(family, CLIP)
