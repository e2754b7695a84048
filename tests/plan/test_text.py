"""What of a family's declared text encoders is not as the contract says, told before anything is encoded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from vtrain_toy.duo import TOY_DUO
from vtrain_toy.family import TOY

from vtrain.contract import PluginError, TextEncoderSpec, TextPartSpec
from vtrain.plan.text import check_text, text_marks

WORDS = TextPartSpec(8, 16)


def encoder(**parts: TextPartSpec) -> TextEncoderSpec:
    return TextEncoderSpec(parts, lambda _: "mark", lambda _: None)


def family(**encoders: TextEncoderSpec) -> SimpleNamespace:
    return SimpleNamespace(text_encoders=lambda: encoders)


@pytest.mark.parametrize(
    ("encoders", "what"),
    [
        ({}, "0 text encoders; it needs 1 to 3"),
        ({name: encoder(**{name: WORDS}) for name in "abcd"}, "4 text encoders"),
        ({"a": encoder()}, 'the text encoder "a" declares no part'),
        ({"a": encoder(text=WORDS), "b": encoder(text=WORDS)}, '"b" gives a part "text", as the text encoder "a" does'),
        ({"a": encoder(text=replace(WORDS, width=0))}, 'the part "text" with width = 0'),
        ({"a": encoder(text=replace(WORDS, tokens=0))}, 'the part "text" with tokens = 0'),
        ({"a": encoder(text=replace(WORDS, padding="none"))}, 'the part "text" with padding = "none"'),
        ({"a": encoder(text=TextPartSpec(8, None, "full"))}, 'padding = "full", which a pooled vector cannot have'),
        ({"a": encoder(text=replace(WORDS, dtype="fp16"))}, 'the part "text" with dtype = "fp16"'),
    ],
)
def test_a_declaration_that_is_none_is_a_fault_of_the_plugin(encoders: dict[str, TextEncoderSpec], what: str) -> None:
    with pytest.raises(PluginError, match=what):
        check_text(family(**encoders))


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(PluginError) as caught:
        check_text(family(a=encoder(), b=encoder(text=replace(WORDS, width=0, tokens=0))))
    assert len(caught.value.problems) == 3


def test_the_text_encoder_is_recorded_as_text_and_several_by_their_names() -> None:
    one, two = (spec.build(spec.options()) for spec in (TOY, TOY_DUO))
    check_text(one)
    check_text(two)
    assert list(text_marks(one, lambda _: "")) == ["text"]
    assert list(text_marks(two, lambda _: "")) == ["text (words)", "text (letters)"]
