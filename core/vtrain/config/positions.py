"""Lines of the values in a TOML text, from its concrete syntax tree: tomli gives values without places."""

from __future__ import annotations

from collections.abc import Iterator

import tomli
import tree_sitter_toml
from tree_sitter import Language, Node, Parser

from vtrain.config.record import KeyPath

_KEYS = ("bare_key", "quoted_key", "dotted_key")


def positions(text: str) -> dict[KeyPath, int]:
    """Key path -> 1-based line where it first stands, of every table, key and array element of a valid TOML text.

    A table's line is its header's, or that of the first dotted key through it.
    """
    lines: dict[KeyPath, int] = {}
    for _ in _entries(text, lines):
        pass
    return lines


def repeated(text: str, line: int) -> tuple[KeyPath, int] | None:
    """The key or table on a line that stands further up too, and where; None if there is none. The text need not be valid."""
    lines: dict[KeyPath, int] = {}
    found = [path for node, path in _entries(text, lines) if _stands_on(node, line)]
    for path in reversed(found):
        name = path[:-1] if path and isinstance(path[-1], int) else path
        if lines.get(name, line) < line:
            return name, lines[name]
    return None


def _stands_on(node: Node, line: int) -> bool:
    last = node.end_point.row + 1 if node.type == "pair" else _line(node)
    return _line(node) <= line <= last


def _entries(text: str, lines: dict[KeyPath, int]) -> Iterator[tuple[Node, KeyPath]]:
    """Every header and pair, and its path; `lines` grows by what is in each, the first of a path counting."""
    tree = Parser(Language(tree_sitter_toml.language())).parse(text.encode())
    lengths: dict[KeyPath, int] = {}  # of arrays of tables, so far
    for node in tree.root_node.named_children:
        if node.type == "pair":
            yield node, _pair(node, (), lines)
        elif node.type in ("table", "table_array_element"):
            table = _header(node, lines, lengths)
            yield node, table
            for child in node.named_children:
                if child.type == "pair":
                    yield child, _pair(child, table, lines)


def _header(node: Node, lines: dict[KeyPath, int], lengths: dict[KeyPath, int]) -> KeyPath:
    """Path of the table that [a.b] or [[a.b]] opens. A name on the way that is an array of tables means its last one."""
    keys = [key for child in node.named_children if child.type in _KEYS for key in _parts(child)]
    path: KeyPath = ()
    for depth, key in enumerate(keys, 1):
        path = (*path, key)
        lines.setdefault(path, _line(node))
        if depth == len(keys) and node.type == "table_array_element":
            lengths[path] = lengths.get(path, 0) + 1
        if path in lengths:
            path = (*path, lengths[path] - 1)
            lines.setdefault(path, _line(node))
    return path


def _pair(node: Node, table: KeyPath, lines: dict[KeyPath, int]) -> KeyPath:
    """Path of the key."""
    named = [child for child in node.named_children if child.type not in ("comment", "ERROR")]
    if len(named) < 2:
        return ()  # a region that the grammar could not read
    path = table
    for key in _parts(named[0]):
        path = (*path, key)
        lines.setdefault(path, _line(named[0]))
    _value(named[-1], path, lines)
    return path


def _value(node: Node, path: KeyPath, lines: dict[KeyPath, int]) -> None:
    if node.type == "inline_table":
        for child in node.named_children:
            if child.type == "pair":
                _pair(child, path, lines)
    elif node.type == "array":
        elements = [child for child in node.named_children if child.type not in ("comment", "ERROR")]
        for index, child in enumerate(elements):
            lines[(*path, index)] = _line(child)
            _value(child, (*path, index), lines)


def _parts(key: Node) -> Iterator[str]:
    """The names in a key, dotted or not, unquoted."""
    if key.type == "dotted_key":
        for child in key.named_children:
            if child.type in _KEYS:
                yield from _parts(child)
    elif key.type == "quoted_key":
        yield next(iter(tomli.loads(f"{_text(key)} = 0")), "")
    else:
        yield _text(key)


def _text(node: Node) -> str:
    return (node.text or b"").decode()


def _line(node: Node) -> int:
    return node.start_point.row + 1
