"""A TOML file: its values, read by tomli, and the line of each, found in a syntax tree."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from vtrain.config.positions import positions, repeated
from vtrain.config.record import KeyPath
from vtrain.contract import ConfigError, Problem


@dataclass(frozen=True)
class Document:
    """path: as the user gave it; text: verbatim; tree: tomli's; lines: of every key path in the tree, 1-based."""

    path: Path
    text: str
    tree: Mapping[str, Any]
    lines: Mapping[KeyPath, int]

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the file start from."""
        return self.path.absolute().parent

    def line(self, key: KeyPath) -> int:
        """Line of the value, or of the nearest table around it that the file has; 0 if there is none."""
        return next((self.lines[key[:end]] for end in range(len(key), 0, -1) if key[:end] in self.lines), 0)


def read(path: Path) -> Document:
    """Read a TOML file. Raises ConfigError: no such file, a folder, not UTF-8, empty, or not TOML (with the line)."""
    text = _text(path)
    try:
        tree = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise ConfigError(Problem(f"{path}:{error.lineno}", f"not TOML: {_fault(text, error)}.")) from None
    except RecursionError:
        raise ConfigError(Problem(str(path), "arrays or tables are nested too deeply to read.")) from None
    if not tree:
        raise ConfigError(
            Problem(str(path), "the file has no tables.", "A run needs [run], [model], [[data]] and [train].")
        )
    return Document(path, text, tree, _lines(tree, positions(text)))


def _fault(text: str, error: tomli.TOMLDecodeError) -> str:
    """What is wrong on a line, with the key that stands there; values, which may be secret, are not repeated."""
    again = repeated(text, error.lineno) if error.msg.startswith(("Cannot overwrite", "Cannot declare")) else None
    if again is not None:
        name = ".".join(key for key in again[0] if isinstance(key, str))
        return f'"{name}" stands already on line {again[1]}'
    what = "a text in quotes does not end on its line" if error.msg == r"Illegal character '\n'" else error.msg
    key = re.match(r"\s*([A-Za-z0-9_.-]+)\s*=", "".join(text.split("\n")[error.lineno - 1 : error.lineno]))
    beside = f' at "{key[1]}"' if key else ""
    return f"{what}{beside} (column {error.colno})"


def _text(path: Path) -> str:
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
