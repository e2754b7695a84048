"""What a clip's caption file says, or why it cannot be used; and which captions a dataset's settings make of it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtrain.config.data_tables import DataTable
from vtrain.contract import Caption, CaptionExtra, Size, Words
from vtrain.data.decoding.video import FileFault
from vtrain.data.sample import Skipped
from vtrain.data.scanning.captions import choose, from_file, from_name, from_sidecar, looks_like, read
from vtrain.data.scanning.extras import own_extras
from vtrain.data.scanning.ledger import words_of, words_text
from vtrain.plan.records import DatasetPlan


def dataset(**table: Any) -> DatasetPlan:
    backend: Any = SimpleNamespace(location="/clips")
    return DatasetPlan("clips", "", backend, DataTable.model_validate(table), (Size(64, 64),), 9, 9, 16.0)


SCORE = CaptionExtra("motion_score", "int", "how much moves", minimum=0, default="30")


def sidecar(data: object, *extras: CaptionExtra) -> Words:
    """As a family with these extras, or a motion score, reads it."""
    text = data if isinstance(data, str) else json.dumps(data)
    stored = words_of(words_text(from_sidecar(io.BytesIO(text.encode()))))
    assert stored is not None
    read = own_extras(stored, replace(dataset(), extras=extras or (SCORE,)))
    if isinstance(read, FileFault):
        raise read
    return read


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"one\ntwo\n", ("one", "two")),
        (b"\n\n  one \n\n", ("one",)),
        (b"\xef\xbb\xbf  one \r\n\r\n\t\ntwo", ("one", "", "two")),
        (b"", ()),
        (b" \n\t\n", ()),
        ("ein Mädchen".encode(), ("ein Mädchen",)),
    ],
)
def test_each_line_of_a_text_file_that_is_not_blank_is_a_caption(data: bytes, texts: tuple[str, ...]) -> None:
    found = from_file(io.BytesIO(data))
    assert found == Words(texts), "with what tells paragraphs"
    chosen = choose("a.mp4", found, dataset(missing_caption="empty"))
    assert chosen == (tuple(Caption(text) for text in texts if text) or (Caption(""),))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"A ball rolls\nover   the lawn.\n\nIt is red.\n", "A ball rolls over the lawn. It is red."),
        (b'{\n  "a": 1\n}', '{ "a": 1 }'),
        (b"a\n" * 2000, " ".join("a" * 2000)),
        (b"one", "one"),
        (b" \n ", None),
    ],
)
def test_a_text_file_is_one_caption_where_the_settings_say_so(data: bytes, text: str | None) -> None:
    chosen = choose("a.mp4", from_file(io.BytesIO(data)), dataset(caption_per="file", caption_prefix="film: "))
    assert chosen == (Caption(f"film: {text}"),) if text is not None else isinstance(chosen, Skipped)


RUNS_ON = "A woman in a red coat walks along the pier while the sun\nsets behind the harbour and gulls circle above."
LONG = "The camera moves slowly over a table with an old map on it. " * 3


@pytest.mark.parametrize(
    ("text", "looks"),
    [
        (RUNS_ON, "prose"),
        (f"{LONG}\n\n{LONG}", "prose"),
        (f"{LONG}\n{LONG}", "prose"),
        ('{\n "caption": "a cat"\n}', "json"),
        ('{"caption": "a cat"}', "json"),
        ('["a cat", "a dog"]', "json"),
        ("a cat", ""),
        ("a cat\na dog", ""),
        ("A cat sleeps.\n\nA cat lies in the sun.", ""),
        ("[sks] a cat", ""),
        ("{a|b} cat}", ""),
        (LONG, ""),
        # Captions of one long sentence each.
        ("\n".join([f"a wide shot of a harbour {'with boats ' * 12}at dawn"] * 3), "prose"),
        ("\n".join([f"A wide shot of a harbour {'with boats ' * 12}at dawn"] * 3), ""),
        ("", ""),
    ],
)
def test_text_that_looks_like_one_caption_over_several_lines_is_known(text: str, looks: str) -> None:
    lines = from_file(io.BytesIO(text.encode())).texts
    assert looks_like(lines, dataset()) == looks
    for said in ({"caption_per": "line"}, {"caption_per": "file"}, {"captions": "json"}):
        assert looks_like(lines, dataset(**said)) == "", "somebody said what it is"


@given(lines=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]))))
def test_a_text_file_gives_back_the_lines_that_were_written(lines: list[str]) -> None:
    found = from_file(io.BytesIO("\n".join(lines).encode()))
    first = lines[:1] and lines[0].removeprefix("\ufeff")
    told = tuple(line.strip() for line in ([first, *lines[1:]] if lines else []) if line.strip())
    assert tuple(filter(None, found.texts)) == told


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"x" * (1 << 20) + b"y", "its caption file is larger than 1 MiB"),
        (b"caf\xe9", "its caption file is not UTF-8 (byte 3): save it as UTF-8"),
    ],
)
def test_a_text_file_that_cannot_be_used_has_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(FileFault) as caught:
        from_file(io.BytesIO(data))
    assert caught.value.reason == reason
    assert caught.value.lasting


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"caption": "a cat"}, Words(("a cat",))),
        ({"caption": " a\n cat  ", "fps": 16, "motion_score": 30}, Words(("a cat",), {"motion_score": 30})),
        ({"captions": ["a cat", "", "a dog"], "motion_score": 3.0}, Words(("a cat", "a dog"), {"motion_score": 3})),
        ({"captions": ["a cat"], "caption": None, "motion_score": None}, Words(("a cat",))),
        ({"motion_score": "12"}, Words((), {"motion_score": 12})),
        ({}, Words(())),
        ({"caption": ""}, Words(())),
        ({"captions": []}, Words(())),
    ],
)
def test_a_sidecar_has_captions_and_a_motion_score(data: object, words: Words) -> None:
    assert sidecar(data) == words


def test_a_whole_motion_score_is_the_same_however_it_is_written() -> None:
    scores = [sidecar({"motion_score": score}).extras["motion_score"] for score in (30, 30.0, "30", "30.0", 3e1)]
    assert [repr(score) for score in scores] == ["30"] * 5


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("", "its caption file is not JSON: Expecting value (line 1)"),
        ('{"caption":\n "a', "its caption file is not JSON: Unterminated string starting at (line 2)"),
        ("[" * 100_000, "its caption file is not JSON that can be read"),
        (f'{{"motion_score": {"9" * 5000}}}', "its caption file is not JSON that can be read"),
        ("[]", "its caption file is a list: write a JSON object with the key caption or captions"),
        ("null", "its caption file is null: write a JSON object with the key caption or captions"),
        ('"a cat"', "its caption file is a text: write a JSON object with the key caption or captions"),
        ({"caption": 3}, "caption in its caption file is a number: write a text"),
        ({"caption": ["a"]}, "caption in its caption file is a list: write a text"),
        ({"captions": "a"}, "captions in its caption file is a text: write a list of texts"),
        ({"captions": ["a", None]}, "captions in its caption file is a list with null in it: write a list of texts"),
        ({"captions": ["a", ["b"]]}, "captions in its caption file is a list with a list in it: write a list of texts"),
        ({"captions": {"a": 1}}, "captions in its caption file is an object: write a list of texts"),
        ({"caption": "a", "captions": ["b"]}, "its caption file has both caption and captions: keep one of them"),
        ({"caption": "\ud800"}, "a caption in its caption file has half a character (a lone surrogate)"),
        ({"motion_score": True}, "its motion score 'True' is no whole number from 0 on: write one such as 30"),
        ({"motion_score": 1.5}, "its motion score '1.5' is no whole number from 0 on: write one such as 30"),
        ({"motion_score": -1}, "its motion score '-1' is no whole number from 0 on: write one such as 30"),
        ({"motion_score": [3]}, "its motion score '[3]' is no whole number from 0 on: write one such as 30"),
        ({"motion_score": "fast"}, "its motion score 'fast' is no whole number from 0 on: write one such as 30"),
        ('{"motion_score": NaN}', "its motion score 'nan' is no whole number from 0 on: write one such as 30"),
        ('{"motion_score": 1e999}', "its motion score 'inf' is no whole number from 0 on: write one such as 30"),
    ],
)
def test_a_sidecar_that_cannot_be_used_has_its_reason(data: object, reason: str) -> None:
    with pytest.raises(FileFault) as caught:
        sidecar(data)
    assert caught.value.reason == reason


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["caption", "captions", "motion_score", "x"]), inner)
    ),
    max_leaves=8,
)


@given(data=JSON)
def test_any_json_is_words_or_a_reason(data: object) -> None:
    try:
        found = sidecar(data)
    except FileFault as fault:
        assert fault.reason  # noqa: PT017 (either is right)
        return
    assert all(text and text == text.strip() for text in found.texts)
    assert all(type(score) is int and score >= 0 for score in found.extras.values())


@given(data=st.binary(max_size=60))
def test_any_bytes_are_words_or_a_reason(data: bytes) -> None:
    for name in ("a.txt", "a.json"):
        try:
            assert isinstance(read(name, io.BytesIO(data)), Words)
        except FileFault as fault:
            assert fault.reason  # noqa: PT017 (either is right)


def test_the_suffix_says_how_a_caption_file_is_read() -> None:
    assert read("a.JSON", io.BytesIO(b'{"caption": "x"}')) == Words(("x",))
    assert read("a.Txt", io.BytesIO(b'{"caption": "x"}')) == Words(('{"caption": "x"}',))


@pytest.mark.parametrize(
    ("extra", "given", "value"),
    [
        (CaptionExtra("pace", "float", "x"), 3, 3.0),
        (CaptionExtra("pace", "float", "x"), " 2.5 ", 2.5),
        (CaptionExtra("pace", "float", "x", minimum=-1, maximum=1), -1, -1.0),
        (CaptionExtra("pace", "int", "x", maximum=9), -4, -4),
        (CaptionExtra("pace", "int", "x"), 10**300, 10**300),
        (CaptionExtra("pace", "text", "x"), " very \n slow", "very slow"),
        (CaptionExtra("pace", "text", "x"), "", None),
        (CaptionExtra("pace", "int", "x"), "  ", None),
        (CaptionExtra("pace", "int", "x"), None, None),
    ],
)
def test_an_extra_is_read_as_the_family_declares_it(extra: CaptionExtra, given: object, value: object) -> None:
    found = sidecar({"caption": "a cat", "pace": given, "fps": 16}, extra)
    assert found == Words(("a cat",), {} if value is None else {"pace": value})
    assert [type(each) for each in found.extras.values()] == ([] if value is None else [type(value)])


@pytest.mark.parametrize(
    ("extra", "given", "reason"),
    [
        (CaptionExtra("pace", "float", "x", maximum=2), 3, "its pace '3' is no number up to 2"),
        (
            CaptionExtra("pace", "float", "x", minimum=1, maximum=2, default="9"),
            0,
            "its pace '0' is no number from 1 to 2",
        ),
        (CaptionExtra("pace", "text", "x", default="slow"), 3, "its pace '3' is no text"),
        (CaptionExtra("pace", "text", "x"), ["slow"], "its pace \"['slow']\" is no text"),
        (CaptionExtra("pace", "text", "x"), "\ud800", "its pace '\\\\ud800' is no text"),
    ],
)
def test_an_extra_of_another_type_or_range_has_its_reason(extra: CaptionExtra, given: object, reason: str) -> None:
    with pytest.raises(FileFault) as caught:
        sidecar({"caption": "a cat", "pace": given}, extra)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("declaration", "what"),
    [
        ({"name": "Pace"}, "is no name"),
        ({"name": "caption"}, "is no name"),
        ({"name": "pace", "type": "text", "minimum": 0}, "is a text"),
        ({"name": "pace", "minimum": 2, "maximum": 1}, "2 is more than 1"),
    ],
)
def test_an_extra_that_could_not_be_read_cannot_be_declared(declaration: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        CaptionExtra(**{"type": "int", "summary": "x", **declaration})


def test_a_name_is_words_between_its_separators() -> None:
    assert from_name("x/a_red-ball  rolls_.mp4") == "a red ball rolls"
    assert from_name("__.mp4") == ""


SCORED = Words(("a cat", "a dog"), {"motion_score": 5})


@pytest.mark.parametrize(
    ("table", "found", "captions"),
    [
        ({}, Words(("a", "b")), (Caption("a"), Caption("b"))),
        ({"captions": "json"}, SCORED, (Caption("a cat", {"motion_score": 5}), Caption("a dog", {"motion_score": 5}))),
        ({"caption_prefix": "film: "}, Words(("a",)), (Caption("film: a"),)),
        ({"captions": "filename", "caption_prefix": "film of "}, None, (Caption("film of a red ball"),)),
        ({"captions": "filename"}, Words(("not asked for",)), (Caption("a red ball"),)),
        ({"captions": "instance_prompt", "caption": "a film"}, None, (Caption("a film"),)),
        ({"missing_caption": "empty", "caption_prefix": "film"}, None, (Caption(""),)),
        ({"missing_caption": "empty"}, Words((), {"motion_score": 5}), (Caption("", {"motion_score": 5}),)),
    ],
)
def test_what_is_found_becomes_captions_as_the_settings_say(
    table: dict[str, Any], found: Words | None, captions: tuple[Caption, ...]
) -> None:
    assert choose("sub/a_red-ball.mp4", found, dataset(**table)) == captions


@pytest.mark.parametrize(
    ("table", "found", "lack"),
    [
        ({}, None, "no caption: .txt file of the same name is missing"),
        ({}, Words(()), "no caption: its caption file is empty"),
        ({"captions": "json"}, None, "no caption: .json file of the same name is missing"),
        ({"captions": "json"}, Words(()), "no caption: its caption file has none"),
        ({"captions": "csv", "captions_file": Path("/x/all.csv")}, None, "no caption: all.csv has no row for it"),
        (
            {"captions": "csv", "captions_file": Path("/x/all.csv")},
            Words(()),
            "no caption: all.csv has only an empty one for it",
        ),
        ({"captions": "backend"}, None, "no caption: the data backend has none"),
        ({"captions": "backend"}, Words(()), "no caption: the data backend has only an empty one"),
    ],
)
def test_what_lacks_is_said(table: dict[str, Any], found: Words | None, lack: str) -> None:
    reason = f'{lack}; add one, or set data.missing_caption = "empty"'
    assert choose("a.mp4", found, dataset(**table)) == Skipped("dropped", "no caption", reason)


def test_a_bad_caption_file_is_told_and_not_taken_for_a_missing_one() -> None:
    bad = Skipped("dropped", "bad caption", "its caption file is not JSON")
    assert choose("a.mp4", bad, dataset(captions="json", missing_caption="empty")) == bad


@pytest.mark.parametrize(
    ("captions", "remedy"),
    [
        ("textfile", 'put a caption on one line, or set data.caption_per = "file" for one caption of all lines'),
        ("json", "keep fewer"),
    ],
)
def test_too_many_captions_of_a_clip_are_a_bad_caption_with_what_to_do(captions: str, remedy: str) -> None:
    chosen = choose("a.mp4", Words(("a",) * 1001), dataset(captions=captions))
    reason = f"its caption file has 1001 captions, more than 1000: {remedy}"
    assert chosen == Skipped("dropped", "bad caption", reason)
