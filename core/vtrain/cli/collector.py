"""Python's cycle collector, kept out of the way while modules load."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No cycle is collected inside, and what is there at the end is left out of later collections.

    For imports and the building of what a run keeps to its end: torch and diffusers make so many objects that walking
    them again and again would be a quarter of the time until the first step. Garbage from before is collected first, so
    that none of it stays.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
