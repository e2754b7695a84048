"""The state of a cache entry in words."""

from __future__ import annotations

from vtrain.data.caching.entries import Entries

SOUND = "sound"


def state_of(entries: Entries, key: str) -> str:
    """All its bytes read. key: "" where the file that it is made of was not read yet."""
    if not key:
        return "unknown: the file was not read yet"
    try:
        fault = entries.damage(key)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return SOUND if fault is None else f"damaged: {fault}"
