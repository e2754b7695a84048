"""The rules of what a family says of captions before its text encoder is loaded: extras, and counts of tokens."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from vtrain.contract import (
    Caption,
    CaptionExtra,
    Family,
    SupportsCaptionExtras,
    SupportsTokenCounts,
    TextEncoder,
    TokenCount,
)
from vtrain.testing.sampler import digest
from vtrain.testing.subject import CAPTIONS, FamilySubject


def values_of(extra: CaptionExtra) -> tuple[float | int | str, float | int | str]:
    """Two that are allowed."""
    if extra.type == "text":
        return "one", "another"
    low = extra.minimum if extra.minimum is not None else (extra.maximum or 1) - 1
    high = extra.maximum if extra.maximum is not None else low + 1
    return (int(low), int(high)) if extra.type == "int" else (float(low), float(high))


def extras_of(family: Family) -> tuple[CaptionExtra, ...]:
    if not isinstance(family, SupportsCaptionExtras) or not family.caption_extras:
        pytest.skip("this family reads nothing beside captions (SupportsCaptionExtras)")
    return family.caption_extras


def longest(family: Family) -> int:
    """Tokens of the family's longest part of text."""
    return max(part.tokens or 1 for encoder in family.text_encoders().values() for part in encoder.parts.values())


def counting(family: Family) -> SupportsTokenCounts:
    if not isinstance(family, SupportsTokenCounts):
        pytest.skip("this family counts no tokens without its text encoder (SupportsTokenCounts)")
    return family


class CaptionTests(FamilySubject):
    """Extras, and tokens."""

    def test_every_extra_is_read(self, family: Family, text_encoders: Mapping[str, TextEncoder]) -> None:
        """Both ends of a declared extra's range are taken, and each gives other embeddings: nothing is declared in vain."""
        for extra in extras_of(family):
            one, two = (
                [
                    part.embeds
                    for encoder in text_encoders.values()
                    for part in encoder.encode((Caption("a cat", {extra.name: value}),), "prompt").parts.values()
                ]
                for value in values_of(extra)
            )
            same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, two, strict=True))
            assert not same, f"{extra.name} changes nothing"

    def test_every_extra_says_what_it_means(self, family: Family) -> None:
        """A summary is one line; no name is there twice."""
        extras = extras_of(family)
        assert len({extra.name for extra in extras}) == len(extras), "an extra is there twice"
        for extra in extras:
            assert len(extra.summary.splitlines()) == 1, f"the summary of {extra.name} is not one line"
            assert extra.summary.strip(), f"the summary of {extra.name} is blank"

    def test_tokens_are_counted_as_the_encoder_cuts(
        self, family: Family, text_encoders: Mapping[str, TextEncoder]
    ) -> None:
        """A prompt has as many real tokens as were counted, and at most the limit; beyond it something is lost."""
        part = counting(family)
        words = " ".join(f"word{number}" for number in range(2 * longest(family)))
        captions = [
            *CAPTIONS,
            Caption(""),
            *(Caption(words[:length]) for length in range(40, len(words), len(words) // 12)),
        ]
        with part.open_token_counter() as counter:
            counts = list(counter.count(captions, "prompt"))
        assert len(counts) == len(captions)
        for caption, count in zip(captions, counts, strict=True):
            assert {each.encoder for each in count} <= text_encoders.keys()
            for single in count:
                text = text_encoders[single.encoder].encode((caption,), "prompt")
                real = max(int(each.mask.sum()) for each in text.parts.values() if each.mask is not None)
                assert real == min(single.tokens, single.limit), (
                    f"{caption.text[:40]}: {real} tokens, counted as {single}"
                )
                assert bool(single.lost) == (single.tokens > single.limit), f"{caption.text[:40]}: {single}"
        assert any(each.lost for count in counts for each in count), "no caption was too long"

    def test_what_is_lost_is_the_text_or_an_extra(self, family: Family) -> None:
        """`lost` names declared extras and "text", the words that are cut stand beside it, and counting is deterministic."""
        part = counting(family)
        names = {
            "text",
            *(e.name for e in (family.caption_extras if isinstance(family, SupportsCaptionExtras) else ())),
        }
        long = Caption("a cat walks over the wet grass " * longest(family))
        with part.open_token_counter() as counter:
            first, again = ([*counter.count([long, *CAPTIONS], role)] for role in ("prompt", "prompt"))
        assert first == again, "counted twice, there are other numbers"
        counts: list[TokenCount] = [count for each in first for count in each]
        odd = {name for count in counts for name in count.lost} - names
        assert not odd, f"what is lost is called {', '.join(sorted(odd))}"
        assert all(bool(count.cut) == bool(count.lost) for count in counts)

    def test_the_fingerprint_of_tokens_is_stable(self, family: Family) -> None:
        """Asked twice, it is the same text."""
        part = counting(family)
        assert part.token_fingerprint(digest) == part.token_fingerprint(digest), "another one the second time"
