"""Paths with patterns: "shard-{000..011}.tar", "part-*/x.tar". Braces name files; wildcards search for them.

Braces are ours: the globs of fsspec and of Python know none. So are wildcards, which fsspec's `glob_translate` could read too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, islice

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILD = re.compile(r"[*?\[]")

MOST = 100_000
"""Names that the braces of one path may stand for."""


def expand(path: str) -> list[str]:
    """Every path that the braces stand for: "{000..011}" counts with leading zeros, "{a,b}" lists. Raises ValueError."""
    found = [path]
    while _BRACES.search(found[0]):
        found = list(islice(chain.from_iterable(map(_once, found)), MOST + 1))
        if len(found) > MOST:
            raise ValueError(f"the braces of {path} stand for more than {MOST:,} files")
    return found


def _once(path: str) -> Iterator[str]:
    """With its first pair of braces expanded."""
    match = _BRACES.search(path)
    if match is None:
        yield path
        return
    counted = _RANGE.fullmatch(match[1])
    if counted is None:
        words = match[1].split(",")
    else:
        low, high = int(counted[1]), int(counted[2])
        if high < low or high - low > MOST:
            raise ValueError(f"{match[0]} counts from {low} to {high}: write at most {MOST:,} files, upwards")
        width = len(counted[1])
        words = [f"{number:0{width}}" for number in range(low, high + 1)]
    for word in words:
        yield path[: match.start()] + word + path[match.end() :]


def is_wild(path: str) -> bool:
    return bool(_WILD.search(path))


def split(path: str) -> tuple[str, str]:
    """(folder, rest): the folder has no pattern in it, and the rest is all from the first part that has one, or the name."""
    scheme, mark, rest = path.rpartition("://")
    parts = rest.split("/")
    plain = next((n for n, part in enumerate(parts[:-1]) if is_wild(part) or "{" in part), len(parts) - 1)
    return scheme + mark + "/".join(parts[:plain]), "/".join(parts[plain:])


def matcher(pattern: str) -> re.Pattern[str]:
    """ "*" and "?" stay within a folder, "**/" goes through any number of them, "[abc]" is one of these characters."""
    out, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            out, at = out + "(?:.*/)?", at + 3
        elif pattern[at] == "*":
            out, at = out + "[^/]*", at + 1
        elif pattern[at] == "?":
            out, at = out + "[^/]", at + 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = pattern[at + 1 : end].replace("\\", "\\\\")
            out += f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
            at = end + 1
        else:
            out, at = out + re.escape(pattern[at]), at + 1
    return re.compile(out, re.DOTALL)
