"""Captions that the text encoder does not read to the end: known from the tokenizer alone, each text counted once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest

from vtrain.contract import Caption, HashFile, ModelError, PluginError, Problem, Role, Size, TokenCount
from vtrain.data.scanning.ledger import Ledger
from vtrain.data.scanning.scan import scan
from vtrain.data.scanning.token_counts import TOKENS, CutCaptions, TokenCounts
from vtrain.estimate.tokens import prompt_rows, token_rows, token_warnings, tokens_json
from vtrain.plan.records import ValidationPlan

LIMIT = 6


class Counting:
    """Two encoders: one reads 6 words, extras last, the other any number. It remembers what it was asked."""

    def __init__(self) -> None:
        self.version, self.asked = "1", list[tuple[str, Role]]()
        self.refuses = False

    def token_fingerprint(self, hash_file: HashFile) -> str:
        return f"words {self.version}"

    @contextmanager
    def open_token_counter(self) -> Iterator[Counting]:
        if self.refuses:
            raise ModelError(Problem("model/tokenizer", "it has no tokenizer.json.", "Save it."))
        yield self

    def count(self, captions: Sequence[Caption], role: Role) -> list[tuple[TokenCount, ...]]:
        self.asked += [(caption.text, role) for caption in captions]
        return [self._count(caption) for caption in captions]

    def _count(self, caption: Caption) -> tuple[TokenCount, ...]:
        words = [*caption.text.split(), *caption.extras]
        text = ("text",) if len(caption.text.split()) > LIMIT else ()
        lost = (*text, *caption.extras) if len(words) > LIMIT else ()
        first = TokenCount("words", len(words), LIMIT, lost, " ".join(words[LIMIT:]))
        return first, TokenCount("all", len(words), 1000)


@pytest.fixture
def counting(setup, monkeypatch) -> Counting:
    made = Counting()
    for name in ("token_fingerprint", "open_token_counter"):
        monkeypatch.setattr(setup.family, name, getattr(made, name), raising=False)
    return made


def captioned(setup, make_video, **captions: str) -> None:
    for name, caption in captions.items():
        setup.add(f"{name}.mp4", make_video(), caption)


def tokens_of(setup, *datasets) -> CutCaptions:
    return scan(setup.plan(*datasets)).survey.datasets[0].tokens


def test_captions_are_counted_once_and_cut_ones_are_named_with_what_they_lose(setup, make_video, counting) -> None:
    captioned(setup, make_video, a="one two", b="w " * 9, c="w " * 7 + "\nsecond caption", d="one two")
    found = tokens_of(setup)
    assert (found.captions, found.cut, found.lost) == (5, 2, {"text": 2})
    assert [(each.name, each.count.tokens, each.count.cut) for each in found.worst] == [
        ("b.mp4", 9, "w w w"),
        ("c.mp4", 7, "w"),
    ]
    assert {count.encoder: count.tokens for count in found.longest} == {"words": 9, "all": 9}
    assert sorted(text for text, _ in counting.asked) == sorted(
        {"one two", " ".join("w" * 9), " ".join("w" * 7), "second caption"}
    )
    before = list(counting.asked)
    assert tokens_of(setup) == found
    assert counting.asked == before, "a warm start cuts nothing into tokens"
    captioned(setup, make_video, e="new words", f="one two")
    assert tokens_of(setup).captions == 7
    assert [text for text, _ in counting.asked[len(before) :]] == ["new words"]


def test_counts_that_are_kept_with_the_decision_do_not_open_what_is_remembered(
    setup, make_video, counting, monkeypatch
) -> None:
    captioned(setup, make_video, a="w " * 9)
    found = tokens_of(setup)
    monkeypatch.setattr(TokenCounts, "of", lambda self, texts: pytest.fail("captions are looked at again"))
    assert tokens_of(setup) == found


def test_another_tokenizer_counts_again_and_the_first_is_still_known(setup, make_video, counting) -> None:
    captioned(setup, make_video, a="one two")
    tokens_of(setup)
    counting.version = "2"
    tokens_of(setup)
    assert len(counting.asked) == 2
    counting.version = "1"
    tokens_of(setup)
    assert len(counting.asked) == 2


def test_an_extra_makes_another_text_and_may_be_what_is_lost(setup, make_video, counting) -> None:
    for name, text in (("a", "w w w w w w"), ("b", "w w w w w")):
        setup.add(f"{name}.mp4", make_video(), None)
        (setup.folder / f"{name}.json").write_text(f'{{"caption": "{text}", "motion_score": 3}}')
    dataset = setup.dataset(captions="json")
    found = tokens_of(setup, dataset)
    assert (found.cut, found.lost, found.worst[0].name) == (1, {"motion_score": 1}, "a.mp4")
    plan = setup.plan(dataset)
    (warning,) = token_warnings(plan, scan(plan).survey)
    assert warning.startswith(
        "1 caption loses motion_score by being longer than the text encoder takes (6, 1000 tokens)"
    )


def test_a_file_that_is_used_no_more_is_counted_no_more(setup, make_video, counting) -> None:
    captioned(setup, make_video, a="w " * 9, b="one")
    plan = setup.plan()
    assert scan(plan).survey.datasets[0].tokens.cut == 1
    (setup.folder / "a.mp4").unlink()
    found = scan(plan).survey.datasets[0].tokens
    assert (found.captions, found.cut, found.worst) == (1, 0, ())


def test_prompts_and_the_negative_one_are_counted_with_their_roles(setup, make_video, counting) -> None:
    captioned(setup, make_video, a="one")
    made = ValidationPlan({"fox": "w " * 8, "cat": "a cat"}, "v " * 7, None, Size(8, 8), 8.0, 4.0, 10, 0)
    plan = replace(setup.plan(), validation=made)
    found = scan(plan).survey
    assert [(each.name, each.count.tokens) for each in found.prompts] == [("prompts.fox", 8), ("negative_prompt", 7)]
    assert ("v " * 7, "negative") in counting.asked
    told = list(token_warnings(plan, found))
    assert told == [
        'validation.prompts.fox has 8 tokens of 6, and loses text ("w w"): shorten it',
        'validation.negative_prompt has 7 tokens of 6, and loses text ("v"): shorten it',
    ]
    assert next(prompt_rows(found)) == ("cut off", 'prompts.fox: 8 tokens of 6; not read: text ("w w")')
    unguided = replace(plan, validation=replace(made, guidance=1.0))
    assert [each.name for each in scan(unguided).survey.prompts] == ["prompts.fox"]


def test_what_cannot_be_counted_is_said(setup, make_video, counting) -> None:
    captioned(setup, make_video, a="w " * 9)
    counting.refuses = True
    plan = setup.plan()
    survey = scan(plan).survey
    why = "model/tokenizer: it has no tokenizer.json. Save it."
    assert survey.datasets[0].tokens == CutCaptions(why_not=why)
    assert list(token_rows(survey.datasets[0])) == [("tokens", f"not counted: {why}")]
    assert list(token_warnings(plan, survey)) == [f"captions that are too long are cut, and which is not known: {why}"]
    counting.refuses = False
    assert tokens_of(setup).cut == 1


def test_of_a_family_that_cannot_count_that_is_said(setup, make_video) -> None:
    captioned(setup, make_video, a="w " * 9)
    survey = scan(setup.plan()).survey
    assert survey.datasets[0].tokens is None
    (row,) = token_rows(survey.datasets[0])
    assert row[0] == "tokens"
    assert row[1].startswith("not counted: the model family needs its text encoder for it")
    assert tokens_json(None) is None
    assert not (setup.cache / TOKENS).exists()


def test_rows_name_the_longest_or_those_that_are_cut(setup, make_video, counting) -> None:
    captioned(setup, make_video, a="one two")
    rows = dict(token_rows(scan(setup.plan()).survey.datasets[0]))
    assert rows == {"tokens": "the longest caption has 2 tokens of 6 (words), 2 tokens of 1000 (all)"}
    captioned(setup, make_video, b="w " * 9)
    rows = dict(token_rows(scan(setup.plan()).survey.datasets[0]))
    assert rows["cut off"] == "1 of 2 captions are not read to the end: 1 in text; the longest: b.mp4 9 tokens of 6"
    assert rows["all of them"] == "`vtrain data list CONFIG --truncated`"
    packed = tokens_json(scan(setup.plan()).survey.datasets[0].tokens)
    assert packed is not None
    assert packed["worst"] == [
        {"name": "b.mp4", "encoder": "words", "tokens": 9, "limit": 6, "lost": ["text"], "cut": "w w w"}
    ]


def test_a_counter_that_gives_another_number_of_counts_is_a_fault_of_the_plugin(
    setup, make_video, counting, monkeypatch
) -> None:
    captioned(setup, make_video, a="one")
    monkeypatch.setattr(counting, "count", lambda captions, role: [])
    with pytest.raises(PluginError, match="0 counts for 1 captions"):
        scan(setup.plan())


def test_a_damaged_file_of_counts_is_moved_aside_and_made_again(setup, make_video, counting) -> None:
    captioned(setup, make_video, a="one")
    setup.cache.mkdir()
    (setup.cache / TOKENS).write_bytes(b"no database" * 100)
    found = scan(setup.plan())
    assert found.survey.datasets[0].tokens.captions == 1
    assert any(TOKENS in message and "moved to" in message for message in found.messages)


def test_a_file_that_fails_while_caches_are_filled_is_counted_no_more(setup, make_video, counting) -> None:
    from vtrain.data.sample import Skipped
    from vtrain.data.scanning.decisions import settings_key

    captioned(setup, make_video, a="w " * 9, b="one")
    plan = setup.plan()
    found = scan(plan)
    with Ledger(setup.cache) as ledger:
        settings = settings_key(plan.datasets[0], plan.family)
        ledger.record_skipped(settings, next(iter(found.samples)), Skipped("failed", "decoding", "torn"))
    assert scan(plan).survey.datasets[0].tokens.cut == 0
