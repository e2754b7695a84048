"""Every rule of caption extras and token counts fails for a toy family that breaks it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from vtrain_toy.family import ToyFamily, ToyOptions, ToyTokenCounter
from vtrain_toy.text import ToyTextEncoder

from vtrain.contract import Caption, CaptionExtra, Text, TokenCount
from vtrain.testing.family_captions import CaptionTests

counter = itertools.count()
Subject = dict[str, Any]


def family(**members: object) -> ToyFamily:
    """A toy family with members of its class replaced."""
    made: ToyFamily = type("BrokenFamily", (ToyFamily,), members)(ToyOptions())
    return made


def of_family(**members: object) -> Subject:
    return kit(family=family(**members))


def kit(**subject: object) -> Subject:
    return subject


class Moodless(ToyTextEncoder):
    def encode(self, captions: Sequence[Caption], role: Any) -> Text:
        return super().encode([Caption(caption.text) for caption in captions], role)


def tokens(change: Callable[[TokenCount], TokenCount]) -> ToyFamily:
    """A family whose counts pass through `change`."""

    class Counter(ToyTokenCounter):
        def count(self, captions: Sequence[Caption], role: Any) -> list[tuple[TokenCount, ...]]:
            return [tuple(map(change, each)) for each in super().count(captions, role)]

    return family(open_token_counter=contextmanager(lambda self: iter([Counter()])))


PLANTED: tuple[tuple[str, str, str, Callable[[], Subject]], ...] = (
    (
        "an extra that is declared in vain",
        "test_every_extra_is_read",
        "mood changes nothing",
        lambda: kit(
            family=family(caption_extras=(CaptionExtra("mood", "text", "x"),)), text_encoders={"words": Moodless()}
        ),
    ),
    (
        "an extra without a meaning",
        "test_every_extra_says_what_it_means",
        "the summary of mood is blank",
        lambda: of_family(caption_extras=(CaptionExtra("mood", "text", " "),)),
    ),
    (
        "tokens that are counted with another limit than the encoder's",
        "test_tokens_are_counted_as_the_encoder_cuts",
        "16 tokens, counted as",
        lambda: kit(family=tokens(lambda count: replace(count, limit=17)), text_encoders={"words": ToyTextEncoder()}),
    ),
    (
        "a part of the caption that nobody declared",
        "test_what_is_lost_is_the_text_or_an_extra",
        "what is lost is called end",
        lambda: kit(family=tokens(lambda count: replace(count, lost=("end",)))),
    ),
    (
        "a fingerprint of tokens that is another one each time",
        "test_the_fingerprint_of_tokens_is_stable",
        "another one the second time",
        lambda: of_family(token_fingerprint=lambda self, hash_file: str(next(counter))),
    ),
)
"""(the mistake, the rule that finds it, a piece of its message, the arguments with the mistake in them)."""


@pytest.mark.parametrize(("rule", "says", "subject"), [each[1:] for each in PLANTED], ids=[each[0] for each in PLANTED])
def test_the_rule_fails_for_a_family_that_breaks_it(
    rule: str, says: str, subject: Callable[..., Subject], breaks: Callable[..., None]
) -> None:
    breaks(CaptionTests(), rule, subject(), says)


def test_every_rule_of_captions_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(CaptionTests) == {rule for _, rule, _, _ in PLANTED}
