"""Puts a measured table into a page, between `<!-- measured: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from pathlib import Path


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks. Raises ValueError where the page has none of that name."""
    marked = re.compile(rf"(<!-- measured: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    changed, count = marked.subn(lambda match: match[1] + text + match[2], page.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{page} has {count} parts <!-- measured: {name} -->")
    page.write_text(changed, encoding="utf-8")
