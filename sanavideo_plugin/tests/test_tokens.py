"""What is counted without the text encoder is what the encoder cuts: against transformers' tokenizer and the encoder itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GemmaTokenizer

from vtrain.contract import Caption, ModelError, Role, SupportsTokenCounts, TokenCount
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.options import SanaVideoOptions
from vtrain_sanavideo.text import TEXT_TOKENS

Families = Callable[..., SanaVideoFamily]
WORDS = "a small dog runs along the beach while waves roll in, "


def counted(family: SanaVideoFamily, caption: Caption, role: Role = "prompt") -> TokenCount:
    with family.open_token_counter() as counter:
        ((count,),) = counter.count([caption], role)
    return count


def around_the_limit(family: SanaVideoFamily, role: Role) -> list[Caption]:
    """Captions of every number of tokens from a little below the limit to a little above."""
    captions = [Caption((WORDS * 40)[:letters]) for letters in range(400, 1500)]
    with family.open_token_counter() as counter:
        counts = counter.count(captions, role)
    found = {count.tokens: caption for caption, (count,) in zip(captions, counts, strict=True)}
    near = [caption for tokens, caption in sorted(found.items()) if -2 <= tokens - TEXT_TOKENS <= 7]
    assert len(near) >= 6
    return near


@pytest.mark.parametrize("role", ["prompt", "negative", "dropped"])
@pytest.mark.parametrize("instruction", [None, "", "x", "Describe a video of this: "])
def test_tokens_are_those_of_the_encoder_and_what_is_cut_is_what_it_does_not_read(
    checkpoint: Path, family_of: Families, role: Role, instruction: str | None
) -> None:
    family = family_of(checkpoint, instruction=instruction)
    tokenizer = GemmaTokenizer.from_pretrained(checkpoint / "tokenizer")
    captions = [
        Caption(""),
        Caption("a cat"),
        Caption("走る猫 <eos> — ÜBER 🐈\n", {"motion_score": 7}),
        Caption(WORDS * 40),
    ]
    captions += around_the_limit(family, role) if role != "dropped" else []
    with family.open_token_counter() as counter, family.text_encoders()["gemma"].open("cpu") as encoder:
        counts = [count for (count,) in counter.count(captions, role)]
        instructed = len(tokenizer.encode(encoder._instruction)) if role == "prompt" and encoder._instruction else 2
        for caption, count in zip(captions, counts, strict=True):
            words = family.wording(caption, role)
            ids = tokenizer.encode(words)
            assert count.tokens == len(ids) - (instructed - 2) if instructed >= 2 else len(ids)
            assert int(encoder.encode([caption], role).only.masked[1].sum()) == min(count.tokens, TEXT_TOKENS)
            assert bool(count.lost) == bool(count.cut) == (count.tokens > TEXT_TOKENS)
            kept = tokenizer(words, truncation=True, max_length=instructed - 2 + TEXT_TOKENS)["input_ids"]
            assert words.endswith(count.cut)
            if "<" not in words:
                assert tokenizer.decode(kept, skip_special_tokens=True) == words[: len(words) - len(count.cut)]
    assert {count.limit for count in counts} == {TEXT_TOKENS}


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=400))
def test_any_caption_is_counted_as_transformers_does(checkpoint: Path, text: str) -> None:
    family = SanaVideoFamily(SanaVideoOptions.model_validate({"path": str(checkpoint), "instruction": ""}))
    tokenizer = GemmaTokenizer.from_pretrained(checkpoint / "tokenizer")
    assert counted(family, Caption(text)).tokens == len(tokenizer.encode(family.wording(Caption(text), "prompt")))


def test_the_motion_score_goes_first_and_the_caption_after_it(family: SanaVideoFamily) -> None:
    lost = [counted(family, caption).lost for caption in around_the_limit(family, "prompt")]
    assert list(dict.fromkeys(lost)) == [(), ("motion_score",), ("text", "motion_score")]
    whole = counted(family, Caption(WORDS * 40))
    assert whole.lost == ("text", "motion_score")
    assert whole.cut.endswith("motion score: 30.")
    assert counted(family, Caption(WORDS * 40), "negative").lost == ("text",)


def test_without_a_score_only_text_is_lost(checkpoint: Path, family_of: Families) -> None:
    assert counted(family_of(checkpoint, motion_score="none"), Caption(WORDS * 40)).lost == ("text",)
    own = counted(family_of(checkpoint, motion_score="none"), Caption(WORDS * 40, {"motion_score": 5}))
    assert own.lost == ("text", "motion_score")


@pytest.mark.parametrize("said", [{"add_bos_token": False}, {"add_bos_token": True}, {"add_eos_token": True}])
def test_what_the_tokenizers_config_puts_around_a_text_is_counted(
    own_checkpoint: Path, family_of: Families, said: dict[str, bool]
) -> None:
    file = own_checkpoint / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    family = family_of(own_checkpoint, instruction="")
    tokenizer = GemmaTokenizer.from_pretrained(own_checkpoint / "tokenizer")
    for caption in (Caption("a cat"), Caption(WORDS * 40)):
        assert counted(family, caption).tokens == len(tokenizer.encode(family.wording(caption, "prompt")))


def test_a_folder_without_a_tokenizer_file_says_that_it_cannot_be_counted(
    own_checkpoint: Path, family_of: Families
) -> None:
    folder = own_checkpoint / "tokenizer"
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    family = family_of(own_checkpoint)
    assert isinstance(family, SupportsTokenCounts)
    with (
        pytest.raises(ModelError, match=r"no tokenizer.json, so tokens cannot be counted"),
        family.open_token_counter(),
    ):
        pass
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="no tokenizer can be read"), family.open_token_counter():
        pass


def test_the_fingerprint_follows_whatever_changes_a_count(
    own_checkpoint: Path, family_of: Families, sha256: Callable[[Path], str]
) -> None:
    known = {
        family_of(own_checkpoint, **options).token_fingerprint(sha256)
        for options in ({}, {"instruction": ""}, {"motion_score": 5}, {"text_precision": "bf16"})
    }
    assert len(known) == 3, "the storage type changes no count"
    file = own_checkpoint / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert family_of(own_checkpoint).token_fingerprint(sha256) not in known


COUNT = """
import sys
from vtrain.contract import Caption
from vtrain_sanavideo.plugin import SANAVIDEO
family = SANAVIDEO.build(SANAVIDEO.options.model_validate({"path": sys.argv[1], }))
with family.open_token_counter() as counter:
    counter.count([Caption("a cat")], "prompt")
print([name for name in ("torch", "transformers", "diffusers") if name in sys.modules])
"""


def test_counting_imports_no_torch(checkpoint: Path) -> None:
    done = subprocess.run([sys.executable, "-c", COUNT, str(checkpoint)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
