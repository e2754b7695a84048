"""Text of several encoders and parts: their entries, what of them is filled, and how they are padded."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from vtrain_toy.family import TOY

from vtrain.contract import Caption, Filling, PluginError, Text, TextEncoderSpec, TextPart, TextPartSpec
from vtrain.data.batches import Batches, pad
from vtrain.data.caching.caches import DROPPED, Caches, fill_caches
from vtrain.data.caching.entries import Entries, text_key
from vtrain.data.caching.inventory import Stores, take, wanted
from vtrain.data.scanning.scan import scan

TAIL = {"tail": TextPartSpec(4, 20), "gist": TextPartSpec(5, None, dtype="bf16")}


class TailEncoder:
    """Beside the words of the test family: numbers of each word's length, and of the whole text's."""

    def __init__(self, change=lambda text: text) -> None:
        self.change = change

    def encode(self, captions, role) -> Text:
        rows = [["", *caption.text.split()] for caption in captions]
        mask = torch.arange(max(map(len, rows))) < torch.tensor([[len(row)] for row in rows])
        embeds = torch.zeros(*mask.shape, 4)
        for number, row in enumerate(rows):
            embeds[number, : len(row)] = torch.tensor([[float(len(word))] * 4 for word in row])
        gist = torch.tensor([[float(len(caption.text))] * 5 for caption in captions]).bfloat16()
        return self.change(Text({"tail": TextPart(embeds, mask), "gist": TextPart(gist)}))


def with_tail(setup, change=lambda text: text, words=None, **members):
    """The test family with a second text encoder. change: of what it gives. words: members of the first's only part."""
    family, first = setup.family, type(setup.family).text_encoders(setup.family)["words"]

    @contextmanager
    def opened(device: str):
        family.opened.append("tail")
        yield TailEncoder(change)
        family.opened.append("tail closed")

    part = dataclasses.replace(first.parts["text"], **(words or {}))
    second = dataclasses.replace(TextEncoderSpec(TAIL, lambda _: "tail-1", opened), **members)
    family.text_encoders = lambda: {"words": dataclasses.replace(first, parts={"text": part}), "tail": second}
    return setup


def fill(setup, tell=lambda _: None):
    plan = setup.plan(caption_dropout=0.5)
    return fill_caches(plan, scan(plan).samples, [(Caption("blurry"), "negative")], "cpu", tell)


def text_files(setup):
    return sorted((setup.cache / "text").rglob("*.safetensors"))


KEYS = {
    ("prompt", "A red boat", 30): "b5281ddef9f3f36166b7f73f27260c7ca62bb0177002844ed2193520f033c87a",
    ("dropped", "", None): "2763ac478709997f5820677d0d2c24b116c10d12a2725f81d3db21655d6d449b",
    ("negative", "blurry", None): "df0a4b30a34c3358f7b1368522b08f1d5ff45534808f5a3f7e8ca3d521631d4e",
}
"""Of the toy family's captions, made when a family had one text encoder of one part."""


def test_entries_from_before_text_had_parts_are_still_found_and_read(setup) -> None:
    setup.family = TOY.build(TOY.options())
    stores = Stores(setup.plan())
    for (role, words, score), key in KEYS.items():
        caption = Caption(words, {} if score is None else {"motion_score": score})
        assert stores.text_keys(caption, role) == (key,)
        Entries(setup.cache, "text").write(key, {"embeds": torch.ones(3, 24)})
        assert torch.equal(Caches(stores).text(caption, role)["text"], torch.ones(3, 24))


def test_each_encoder_has_an_entry_of_its_own_for_each_caption_and_role(three) -> None:
    filled = fill(with_tail(three))
    stores = filled.caches._stores
    assert len(text_files(three)) == 2 * 5
    words, tail = stores.text_keys(Caption("caption number 1"), "prompt")
    assert (words, tail) == tuple(
        text_key(Caption("caption number 1"), "prompt", fingerprint) for fingerprint in ("words-1", "tail-1")
    )
    assert {name: tuple(t.shape) for name, t in stores.text.read(words).items()} == {"embeds": (4, 6)}
    assert {name: tuple(t.shape) for name, t in stores.text.read(tail).items()} == {"tail": (4, 4), "gist": (5,)}
    text = filled.caches.text(Caption("caption number 1"), "prompt")
    assert list(text) == ["text", "tail", "gist"]
    assert text["tail"][:, 0].tolist() == [0, 7, 6, 1]
    assert text["gist"].tolist() == [16] * 5
    used = wanted(stores, list(scan(stores.plan).samples), [(Caption("blurry"), "negative")])
    found = take(stores.text, "text", used["text"])
    assert (found.wanted, found.missing, found.stale.count) == (10, 0, 0)


def test_encoders_are_opened_one_after_the_other_and_only_for_what_is_missing(three) -> None:
    told: list[Filling] = []
    fill(with_tail(three), told.append)
    assert three.family.opened[:4] == ["text", "text closed", "tail", "tail closed"]
    stages = list(dict.fromkeys(now.stage for now in told))
    assert stages == ["text (words)", "text (tail)", "video"]
    assert [(now.done, now.total) for now in told if now.stage == "text (tail)"][-1] == (5, 5)
    three.family.opened.clear()
    fill(three)
    assert three.family.opened == []
    fill(with_tail(three, fingerprint=lambda _: "tail-2"))
    assert three.family.opened == ["tail", "tail closed"]


def test_one_encoder_more_encodes_nothing_of_the_first_again(three) -> None:
    fill(three)
    three.family.opened.clear()
    three.family.encoded_texts.clear()
    fill(with_tail(three))
    assert three.family.opened == ["tail", "tail closed"]
    assert three.family.encoded_texts == []


def test_a_batch_has_all_parts_of_the_caption_that_it_draws(setup, make_video) -> None:
    for name in ("a", "b"):
        setup.add(f"{name}.mp4", make_video(), f"{name}\n{name} longer words\n{name * 9} x")
    plan = with_tail(setup).plan(setup.dataset(caption_per="line"), batch_size=2, caption_dropout=0.0)
    filled = fill_caches(plan, scan(plan).samples, (), "cpu", lambda _: None)
    batches, seen = Batches(plan, filled.caches, filled.index), set()
    alone = {caption.text: filled.caches.text(caption, "prompt") for s in scan(plan).samples for caption in s.captions}
    for number in range(20):
        text = batches[number].text
        for row in range(2):
            count = int(text.parts["text"].mask[row].sum())
            (words,) = (
                words
                for words, own in alone.items()
                if len(own["text"]) == count and torch.equal(own["text"], text.parts["text"].embeds[row, :count])
            )
            assert torch.equal(text.parts["tail"].embeds[row, :count], alone[words]["tail"])
            assert torch.equal(text.parts["gist"].embeds[row], alone[words]["gist"])
            seen.add(words)
    assert seen == alone.keys()


def test_padding_is_to_the_longest_with_a_mask_or_in_full_without_one(three) -> None:
    filled = fill(with_tail(three, words={"padding": "full"}))
    given = [filled.caches.text(caption, role) for caption, role in (
        (Caption("caption number 1"), "prompt"), (Caption("blurry"), "negative"), (DROPPED, "dropped"))]  # fmt: skip
    text = pad(given, three.family.text_encoders())
    full = text.parts["text"]
    assert full.mask is None
    assert full.embeds.shape == (3, 40, 6)
    for row, length in enumerate((4, 2, 1)):
        assert torch.equal(full.embeds[row, :length], given[row]["text"])
        assert not full.embeds[row, length:].any()
    tail = text.parts["tail"]
    assert tail.embeds.shape == (3, 8, 4), "the longest's length, rounded up to eight"
    assert tail.mask.sum(dim=1).tolist() == [4, 2, 1]
    assert not tail.embeds[~tail.mask].any()
    assert text.parts["gist"].embeds[:, 0].tolist() == [16, 6, 0]
    assert text.parts["gist"].mask is None


def changed(name: str, **members):
    """What changes one part of a text."""
    return lambda text: Text(
        {
            **text.parts,
            name: dataclasses.replace(text.parts[name], **{k: f(text.parts[name]) for k, f in members.items()}),
        }
    )


FAULTS = [
    (lambda text: Text({"tail": text.parts["tail"]}), 'the part "gist" is missing'),
    (lambda text: Text({**text.parts, "more": text.parts["gist"]}), 'the part "more" is not declared'),
    (changed("tail", embeds=lambda part: part.embeds[..., :3]), r'the part "tail" is \(3, 4, 3\) where \(3, 1 to 20, 4\)'),
    (changed("tail", embeds=lambda part: part.embeds.repeat(1, 9, 1)), r'the part "tail" is \(3, 36, 4\)'),
    (changed("tail", embeds=lambda part: part.embeds[:2]), r'the part "tail" is \(2, 4, 4\)'),
    (changed("tail", embeds=lambda part: part.embeds.half()), 'the part "tail" is float16 where fp32 is promised'),
    (changed("tail", mask=lambda part: None), r'the part "tail" has no mask of bool \(3, 4\)'),
    (changed("tail", mask=lambda part: part.mask.int()), r'the part "tail" has no mask of bool \(3, 4\)'),
    (changed("tail", mask=lambda part: part.mask & (torch.arange(4) != 1)), 'real tokens of the part "tail" do not come first'),
    (changed("tail", mask=lambda part: torch.zeros_like(part.mask)), 'a caption has no real token of the part "tail"'),
    (changed("gist", embeds=lambda part: part.embeds[:, None]), r'the part "gist" is \(3, 1, 5\) where \(3, 5\) is promised'),
    (changed("gist", embeds=lambda part: part.embeds.float()), 'the part "gist" is float32 where bf16 is promised'),
    (changed("gist", mask=lambda part: torch.ones(3, 5)), 'the part "gist" is a pooled vector and has a mask'),
]  # fmt: skip


@pytest.mark.parametrize(("change", "what"), FAULTS)
def test_text_that_its_encoder_did_not_promise_is_a_fault_of_the_plugin_and_is_not_stored(three, change, what) -> None:
    plan = with_tail(three, change).plan(caption_dropout=0.0)
    with pytest.raises(PluginError, match=f'the text encoder "tail": .*{what}'):
        fill_caches(plan, scan(plan).samples, (), "cpu", lambda _: None)
    assert not any(key in {path.stem for path in text_files(three)} for key in tail_keys(three))


def tail_keys(setup):
    stores = Stores(setup.plan())
    return [stores.text_key("tail", Caption(f"caption number {k}"), "prompt") for k in range(3)]


def test_shapes_that_change_without_the_fingerprint_are_a_fault_of_the_plugin(three) -> None:
    fill(with_tail(three))
    wider = {**TAIL, "gist": TextPartSpec(6, None, dtype="bf16")}
    filled = fill(with_tail(three, parts=wider))
    with pytest.raises(PluginError, match=r'encoder "tail": the part "gist" is \(1, 5\) where \(1, 6\) is promised'):
        Batches(filled.caches._stores.plan, filled.caches, filled.index)[0]
    more = {**TAIL, "second": TextPartSpec(6, None)}
    with_tail(three, parts=more)
    with pytest.raises(PluginError, match='encoder "tail": the part "second" is missing in its cache entry'):
        Caches.open(three.plan()).text(Caption("caption number 1"), "prompt")


def test_two_encoders_with_one_fingerprint_are_a_fault_of_the_plugin(three) -> None:
    with pytest.raises(PluginError, match='the text encoders "words" and "tail" have the same fingerprint'):
        fill(with_tail(three, fingerprint=lambda _: "words-1"))


def test_a_text_of_several_parts_has_no_only_one() -> None:
    one = Text.of(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    assert one.only is one.parts["text"]
    two = Text({**one.parts, "gist": TextPart(torch.zeros(1, 3))})
    with pytest.raises(ValueError, match="2 parts"):
        two.only  # noqa: B018
    with pytest.raises(ValueError, match="no mask"):
        two.parts["gist"].masked  # noqa: B018
    assert [part.embeds.dtype for part in two.map(torch.Tensor.double).parts.values()] == [torch.float64] * 2
