"""`vtrain data list --truncated`, and the tokens in `vtrain data show` and `vtrain plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vtrain.contract import ConfigError

VALIDATION = """
[validation]
every = "1 steps"
frames = 9
negative_prompt = "{negative}"
[validation.prompts]
fox = "{fox}"
"""
TOO_LONG = " ".join(f"word{number}" for number in range(20))


@pytest.fixture
def config(tmp_path: Path, make_clip, file_text) -> Path:
    """Two clips with sidecars, one of which is longer than the toy's 16 words, and a prompt that is."""
    (tmp_path / "clips").mkdir()
    for name, words in (("short", {"caption": "a cat"}), ("long", {"caption": TOO_LONG, "mood": "calm", "pace": 2})):
        make_clip(tmp_path / "clips" / f"{name}.mp4")
        (tmp_path / "clips" / f"{name}.json").write_text(json.dumps(words))
    file = tmp_path / "config.toml"
    file.write_text(file_text("clips", 'captions = "json"') + VALIDATION.format(negative="blurry", fox=TOO_LONG))
    return file


def test_what_is_not_read_to_the_end_is_listed_with_tokens_and_limit(config: Path, vtrain) -> None:
    for _ in range(2):  # the second time from what is remembered
        text = vtrain("data", "list", config, "--truncated").stdout
        assert '    21     16  validation.prompts.fox  not read: text ("word15 word16 word17 word18 word19")\n' in text
        assert '    23     16  clips/long.mp4  not read: text and mood and pace ("word15' in text
        assert "short.mp4" not in text
        assert text.endswith("\n2 texts are not read to the end\n")
    rows = [json.loads(line) for line in vtrain("data", "list", config, "--truncated", "--json").stdout.splitlines()]
    assert [(row["name"], row["tokens"], row["limit"], row["lost"]) for row in rows] == [
        ("validation.prompts.fox", 21, 16, ["text"]),
        ("clips/long.mp4", 23, 16, ["text", "mood", "pace"]),
    ]
    assert rows[1]["text"] == TOO_LONG
    assert rows[0]["cut"] == "word15 word16 word17 word18 word19"
    one = vtrain("data", "list", config, "--truncated", "--json", "--limit", "1").stdout
    assert len(one.splitlines()) == 1
    for limit in (0, 1):
        some = vtrain("data", "list", config, "--truncated", "--limit", str(limit)).stdout
        assert some.endswith(f"\n2 texts are not read to the end, {limit} of them shown\n")
    assert "fox" not in vtrain("data", "list", config, "--truncated", "--dataset", "clips").stdout


def test_where_nothing_is_cut_that_is_said(config: Path, vtrain) -> None:
    config.write_text(config.read_text().replace(TOO_LONG, "a fox"))
    (config.parent / "clips" / "long.json").write_text('{"caption": "a dog"}')
    assert vtrain("data", "list", config, "--truncated").stdout.endswith("\nevery text is read whole\n")


def test_files_of_another_fate_are_no_truncated_ones(config: Path, vtrain) -> None:
    done = vtrain("data", "list", config, "--truncated", "--failed", "--used", error=SystemExit)
    assert done.exit_code == 2
    assert "--truncated lists files that are used, and goes without --used and --failed" in " ".join(
        done.stderr.replace("│", "").split()
    )


def test_a_family_that_cannot_count_says_so(config: Path, vtrain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtrain.cli.data_truncated.opened", lambda folder, family: None)
    done = vtrain("data", "list", config, "--truncated", error=ConfigError)
    assert 'the model family "toy" cannot count tokens without its text encoder' in str(done.exception)


def test_a_file_is_shown_with_tokens_limit_and_what_is_not_read(config: Path, vtrain, shown) -> None:
    text = vtrain("data", "show", config, "long.mp4", "--no-sheet").stdout
    assert "  tokens    23 tokens of 16\n" in text
    assert "  not read  text and mood and pace: word15 word16 word17 word18 word19 mood=calm pace=2.0\n" in text
    assert "caption extras\n  mood  text; a word for how the clip feels\n  pace  number from 0 to 10;" in text
    record: dict[str, Any] = shown(config, "short.mp4", "--no-sheet")
    assert record["text"][0]["counts"] == [{"encoder": "words", "tokens": 3, "limit": 16, "lost": [], "cut": ""}]
    assert [extra["name"] for extra in record["caption_extras"]] == ["mood", "pace"]


def test_the_plan_warns_of_lost_extras_and_prompts(config: Path, vtrain) -> None:
    plan = json.loads(vtrain("plan", config, "--json").stdout)
    assert plan["datasets"][0]["tokens"]["cut"] == 1
    assert plan["datasets"][0]["tokens"]["lost"] == {"text": 1, "mood": 1, "pace": 1}
    assert [each["name"] for each in plan["cut_prompts"]] == ["prompts.fox"]
    told = [warning for warning in plan["warnings"] if "loses" in warning]
    assert [warning.partition(" by ")[0].partition(",")[0] for warning in told] == [
        "1 caption loses mood", "1 caption loses pace", "validation.prompts.fox has 21 tokens of 16",
    ]  # fmt: skip
    text = vtrain("plan", config).stdout
    assert "1 of 2 captions are not read to the end: " in text
    assert "prompts.fox: 21 tokens of 16; not read: text" in text
