"""A TOML file: its values, read by tomli, and the line of each, found in a syntax tree (tomli gives values without places)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli
import tree_sitter_toml
from tree_sitter import Language, Node, Parser

from vtrain.config.foreign import language_problem, problem_of
from vtrain.config.keys import KeyPath
from vtrain.contract import ConfigError, Problem

_KEYS = ("bare_key", "quoted_key", "dotted_key")


@dataclass(frozen=True)
class Document:
    """path: as the user gave it; text: verbatim; tree: tomli's; lines: of every key path in the tree, 1-based."""

    path: Path
    text: str
    tree: Mapping[str, Any]
    lines: Mapping[KeyPath, int]
    base: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the file start from: its own, or `base`."""
        return self.path.absolute().parent if self.base is None else self.base

    def line(self, key: KeyPath) -> int:
        """Line of the value, or of the nearest table around it that the file has; 0 if there is none."""
        return next((self.lines[key[:end]] for end in range(len(key), 0, -1) if key[:end] in self.lines), 0)


def read(path: Path, base: Path | None = None) -> Document:
    """Read a TOML file. base: where its relative paths start, if not in its folder.

    Raises ConfigError: no such file, a folder, not UTF-8, empty, not TOML (with the line), not ours."""
    text = _read_text(path)
    try:
        tree = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise ConfigError(language_problem(str(path), text) or _fault(path, text, error)) from None
    except RecursionError:
        raise ConfigError(Problem(str(path), "arrays or tables are nested too deeply to read.")) from None
    if not tree:
        raise ConfigError(
            Problem(
                str(path), "the file has no tables.", "A run needs [run], [model], [[data]], [train] and [optimizer]."
            )
        )
    foreign = problem_of(str(path), [str(key[-1]) for key in paths(tree) if isinstance(key[-1], str)])
    if foreign is not None:
        raise ConfigError(foreign)
    return Document(path, text, tree, _lines(tree, positions(text)), base)


def _fault(path: Path, text: str, error: tomli.TOMLDecodeError) -> Problem:
    """What is wrong on a line, with the key that stands there; values, which may be secret, are not repeated, paths apart."""
    where, line = f"{path}:{error.lineno}", "".join(text.split("\n")[error.lineno - 1 : error.lineno])
    again = repeated(text, error.lineno) if error.msg.startswith(("Cannot overwrite", "Cannot declare")) else None
    if again is not None:
        twice = ".".join(key for key in again[0] if isinstance(key, str))
        return Problem(where, f'not TOML: "{twice}" is already on line {again[1]}.')
    key = re.match(r"\s*([A-Za-z0-9_.-]+)\s*=", line)
    name = f' at "{key[1]}"' if key else ""
    beside = f"{name} (column {error.colno})"
    open_ended = error.msg == r"Illegal character '\n'"
    if error.msg in _BAD_ESCAPES or (open_ended and re.search(r'\\"\s*(#.*)?$', line)):
        what = f"not TOML: a backslash in double quotes begins an escape{beside}."
        return Problem(where, what, _without_escapes(line, error.colno))
    what = "a text in quotes does not end on its line" if open_ended else error.msg
    return Problem(where, f"not TOML: {what}{beside}.")


_BAD_ESCAPES = ("Unescaped '\\' in a string", "Invalid hex value", "Escaped character is not a Unicode scalar value")


def _without_escapes(line: str, column: int) -> str:
    """How to write the text in double quotes around a column (1-based) of a line, or before it, if it is a path."""
    key = re.match(r'\s*([A-Za-z0-9_.-]+)\s*=\s*"', line)
    start = f"{key[1]} = " if key else ""
    found = [each[1] for each in re.finditer(r'"([^"]*)"', line) if each.start() < column and "\\" in each[1]]
    text = found[-1] if found else ""
    if not re.search(r"(path|dir|file|folder) = $", start) and not re.match(r"[A-Za-z]:|\.{0,2}[\\/]|~", text):
        text = ""
    if not text or "'" in text:
        return "Write the text in single quotes, which keep backslashes, or each backslash twice."
    meant = text.replace("\\\\", "\\")
    if text.startswith("\\\\"):  # of a server, where two are meant
        meant = "\\\\" + meant.lstrip("\\")
    return f"Single quotes keep backslashes: {start}'{meant}'"


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(Problem(str(path), "there is no such file.")) from None
    except IsADirectoryError:
        raise ConfigError(Problem(str(path), "this is a folder.", "Name the TOML file itself.")) from None
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(str(path), f"the file cannot be read: {error}.")) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(Problem(f"{path}:{line}", "the file is not UTF-8.", "Save it as UTF-8.")) from None


def _lines(tree: Mapping[str, Any], found: Mapping[KeyPath, int]) -> dict[KeyPath, int]:
    """A line for every path in the tree; where the syntax tree lacks one, that of the value around it.

    tomli reads a little more than the grammar of the syntax tree knows (TOML 1.1's escapes, for example).
    """
    lines: dict[KeyPath, int] = {}
    for path in paths(tree):
        lines[path] = found.get(path) or lines.get(path[:-1], 1)
    return lines


def paths(value: object, at: KeyPath = ()) -> Iterator[KeyPath]:
    """Key paths of everything in a TOML tree, outer before inner."""
    inner: list[tuple[str | int, object]] = []
    if isinstance(value, Mapping):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    for key, child in inner:
        yield (*at, key)
        yield from paths(child, (*at, key))


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
        # Its escapes by TOML's own rules.
        yield next(iter(tomli.loads(f"{_node_text(key)} = 0")), "")
    else:
        yield _node_text(key)


def _node_text(node: Node) -> str:
    return (node.text or b"").decode()


def _line(node: Node) -> int:
    return node.start_point.row + 1
