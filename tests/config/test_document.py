"""The line of every value: the syntax tree and tomli see the same keys."""

from __future__ import annotations

from typing import Any

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from vtrain.config.document import paths, positions

TEXT = """\
top = 1
dotted."quoted key".last = [
  1,
  { inner = 2, "a.b" = 3 },
]

[table]  # a comment
'literal' = \"\"\"
two lines\"\"\"
after = { x = { y = 1 } }

[[list]]
a = 1
[list.sub]
b = 2
[[list.deep]]
[[list.deep]]
c = 3

[[list]]
"\\u00e9" = 4
[table.child.grandchild]
"""


def test_lines_of_every_form_a_key_can_take() -> None:
    lines = positions(TEXT)
    assert lines == {
        ("top",): 1,
        ("dotted",): 2,
        ("dotted", "quoted key"): 2,
        ("dotted", "quoted key", "last"): 2,
        ("dotted", "quoted key", "last", 0): 3,
        ("dotted", "quoted key", "last", 1): 4,
        ("dotted", "quoted key", "last", 1, "inner"): 4,
        ("dotted", "quoted key", "last", 1, "a.b"): 4,
        ("table",): 7,
        ("table", "literal"): 8,
        ("table", "after"): 10,
        ("table", "after", "x"): 10,
        ("table", "after", "x", "y"): 10,
        ("list",): 12,
        ("list", 0): 12,
        ("list", 0, "a"): 13,
        ("list", 0, "sub"): 14,
        ("list", 0, "sub", "b"): 15,
        ("list", 0, "deep"): 16,
        ("list", 0, "deep", 0): 16,
        ("list", 0, "deep", 1): 17,
        ("list", 0, "deep", 1, "c"): 18,
        ("list", 1): 20,
        ("list", 1, "é"): 21,
        ("table", "child"): 22,
        ("table", "child", "grandchild"): 22,
    }


def test_the_lines_have_the_key_paths_of_tomlis_tree() -> None:
    assert set(positions(TEXT)) == set(paths(tomli.loads(TEXT)))


@pytest.mark.parametrize("text", ["a = {\n x = 1,\n y = 2,\n}\nb = 3\n[c]\nd = 4\n", 'a = "\\e"\n[c]\nd = 1\n'])
def test_toml_1_1_which_the_grammar_lacks_still_gets_lines_inside_the_file(text: str) -> None:
    from vtrain.config.document import _lines

    tree = tomli.loads(text)
    lines = _lines(tree, positions(text))
    assert set(lines) == set(paths(tree))
    assert all(1 <= line <= text.count("\n") for line in lines.values())


KEYS = st.one_of(
    st.from_regex(r"[A-Za-z0-9_-]{1,6}", fullmatch=True),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=6),
)
SCALARS = st.one_of(
    st.integers(-(2**40), 2**40),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
TABLES = st.recursive(
    st.dictionaries(KEYS, VALUES, max_size=3),
    lambda inner: st.dictionaries(KEYS, VALUES | inner | st.lists(inner, min_size=1, max_size=3), max_size=3),
    max_leaves=8,
)


def quoted(text: str) -> str:
    escaped = "".join(char if char.isprintable() and char not in '"\\' else f"\\U{ord(char):08x}" for char in text)
    return f'"{escaped}"'


def key(text: str) -> str:
    return text if text.isascii() and text.replace("_", "a").replace("-", "a").isalnum() else quoted(text)


def inline(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return "[\n" + ",\n".join(inline(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key(name)} = {inline(item)}" for name, item in value.items()) + "}"
    return repr(value)


def is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def written(table: dict[str, Any], header: tuple[str, ...] = ()) -> str:
    """TOML text of a tree: scalars first, then tables and arrays of tables under headers."""
    lines = [
        f"{key(name)} = {inline(value)}"
        for name, value in table.items()
        if not isinstance(value, dict) and not is_tables(value)
    ]
    for name, value in table.items():
        path = ".".join(key(part) for part in (*header, name))
        if isinstance(value, dict):
            lines += [f"[{path}]", written(value, (*header, name))]
        elif is_tables(value):
            for item in value:
                lines += [f"[[{path}]]", written(item, (*header, name))]
    return "\n".join(lines)


@settings(max_examples=300, deadline=None)
@given(TABLES)
def test_any_file_has_a_line_for_exactly_the_keys_that_tomli_reads(tree: dict[str, Any]) -> None:
    text = written(tree)
    assert tomli.loads(text) == tree
    assert set(positions(text)) == set(paths(tree))


@settings(max_examples=100, deadline=None)
@given(st.lists(KEYS, min_size=1, max_size=4), st.integers(0, 5))
def test_a_dotted_key_stands_on_its_own_line(names: list[str], blank: int) -> None:
    text = "\n" * blank + " . ".join(key(name) for name in names) + " = 1\n"
    lines = positions(text)
    assert lines == {tuple(names[:end]): blank + 1 for end in range(1, len(names) + 1)}
