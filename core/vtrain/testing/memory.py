"""Whether a model that was opened for the length of a with block is gone after it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from torch import nn

Opened = TypeVar("Opened")


def _weights() -> dict[int, nn.Parameter]:
    """Every living nn.Parameter. By type(): isinstance would wake lazily loaded modules."""
    return {id(item): item for item in gc.get_objects() if issubclass(type(item), nn.Parameter)}


def survivors(opening: Callable[[], AbstractContextManager[Opened]], use: Callable[[Opened], object]) -> list[str]:
    """Open, use and close; say what of it is still in memory, [] when all is gone."""
    gc.collect()
    before = set(_weights())
    with opening() as opened:
        use(opened)
        name = type(opened).__name__
        itself = weakref.ref(opened)
        weights = [weakref.ref(weight) for key, weight in _weights().items() if key not in before]
    del opened
    gc.collect()
    left = [name] if itself() is not None else []
    alive = [weight for weight in (reference() for reference in weights) if weight is not None]
    if alive:
        left.append(f"{len(alive)} weights of {sum(weight.nbytes for weight in alive):,} bytes")
    return left
