"""Words and tables at a terminal's width: no word is broken, nothing is lost."""

from __future__ import annotations

import pytest

from vtrain.cli.plan import section_lines
from vtrain.cli.report import folded, print_table, table_lines
from vtrain.contract import Section

HEADS = ("option", "type", "default", "meaning")
MEANING = "of the window that is taken of a clip that is longer than that, in frames after resampling"
ROWS = (
    ("frames", "whole number", "81", MEANING),
    ("window", '"start" or "random" or "all"', '"start"', ""),
    ("path", "text", "required", "such as /a/folder/of/a/very/long/name/that/is/not/broken/anywhere.mp4"),
)


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 160, 300])
def test_a_table_has_every_word_whole_at_any_width(width: int) -> None:
    titles, *rows = table_lines(HEADS, ROWS, width)
    assert sorted(" ".join(titles).split()) == sorted(HEADS)
    for row, lines in zip(ROWS, rows, strict=True):
        words = " ".join(lines).replace("type: ", "").replace("default: ", "").replace("meaning: ", "").split()
        assert sorted(words) == sorted(" ".join(row).split())
        assert all(len(line) < width or "/" in line for line in lines)


def test_a_table_that_fits_is_one_line_a_row_and_a_narrow_one_has_long_cells_below() -> None:
    assert [len(lines) for lines in table_lines(HEADS, ROWS, 300)] == [1, 1, 1, 1]
    _, frames, window, _ = table_lines(HEADS, ROWS, 70)
    assert frames[0] == "frames  whole number                  81"
    assert " ".join(line.strip() for line in frames[1:]) == MEANING
    assert len(window) == 1


def test_short_values_stay_beside_where_most_of_a_column_fits() -> None:
    rows = [*((f"key{number}", "true", "default") for number in range(5)), ("prompt", "a fox " * 20, "config.toml:3")]
    lines = list(table_lines(("key", "value", "origin"), rows, 40))
    assert lines[1] == ["key0    true              default"]
    assert lines[-1][0] == "prompt                    config.toml:3"
    assert len(lines[-1]) > 2


def test_one_long_value_pushes_what_follows_only_so_far_on_a_wide_terminal() -> None:
    rows = [("prompt", "a fox " * 40, "config.toml:3"), ("steps", "7", "default")]
    _, prompt, steps = table_lines(("key", "value", "origin"), rows, 300)
    assert len(prompt) == 4
    assert steps == [f"steps   7{' ' * 61}default"]


def test_into_a_file_a_long_cell_pushes_its_own_row_alone(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("key", "value", "origin"), [("a", "x" * 150, "default"), ("b", "true", "default")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"a    {'x' * 150}  default"
    assert lines[2] == f"b    true{' ' * 36}  default"


def test_a_text_is_folded_between_words_and_left_as_it_is_into_a_file() -> None:
    assert folded("one two three four five six", 21, "  ", "    ") == ["  one two three four", "    five six"]
    assert folded("one two", None, "  ") == ["  one two"]
    assert folded("", 30, "  ") == [""]


def test_a_section_goes_on_below_itself_and_its_tables_heads_take_several_lines() -> None:
    texts = Section("data", (("files", "8 scanned"), ("caption", "a fox jumps over the fence and back again")))
    table = Section("windows", (("window", "first frame", "part of the picture"), ("1", "0.000 s", "64x64+0+0")), True)
    lines = [line for line, _ in section_lines((texts, table), 34)]
    assert lines == [
        "data",
        "  files    8 scanned",
        "  caption  a fox jumps over the",
        "           fence and back again",
        "windows",
        "                     part of",
        "            first        the",
        "  window    frame    picture",
        "  1       0.000 s  64x64+0+0",
    ]
    assert [line for line, _ in section_lines((texts,), None)][2] == f"  caption  {texts.rows[1][1]}"
