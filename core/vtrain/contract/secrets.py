"""Values that hold secrets: told without them, and refused without repeating them."""

from __future__ import annotations

import re

_WEB = ("http://", "https://")
_NAMES = ("github://", "git://")
"""Schemes whose "x:y@" names a repository."""

_URL = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<user>[^/?#]*@)?(?P<rest>[^?#]*)(?P<query>\?[^#]*)?(?P<fragment>#.*)?",
    re.IGNORECASE | re.DOTALL,
)


class HoldsSecret(ValueError):
    """A validator of options raises it for a value that holds a secret: its words are told, the value is not."""


def without_secrets(text: str) -> str:
    """A URL, or a chain of them with "::", with "***" for user, password, query and fragment; other texts as they are.

    Away from the web "?" and "#" may belong to a name or a pattern: there what follows is hidden if it has a "=".
    """
    return "::".join(map(_shown, text.split("::"))) if "://" in text else text


def _shown(part: str) -> str:
    found = _URL.fullmatch(part)
    if found is None:
        return part
    scheme, user, rest, query, fragment = (
        found[name] or "" for name in ("scheme", "user", "rest", "query", "fragment")
    )
    if user and scheme.lower() not in _NAMES:
        user = "***@"
    if scheme.lower() in _WEB or "=" in query + fragment:
        query, fragment = "?***" if query else "", "#***" if fragment else ""
    return f"{scheme}{user}{rest}{query}{fragment}"
