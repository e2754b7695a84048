"""Python's cycle collector, kept out of the way while modules load."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected(*, collect_first: bool = True) -> Iterator[None]:
    """No cycle is collected inside, and what is there at the end is skipped of later collections and of that at exit.

    For imports and the building of what a process keeps to its end: torch and diffusers make so many objects that walking
    them again and again would be a quarter of the time until the first step, and pydantic and the plugins so many that it
    would be a fifth of `vtrain plugins list`. collect_first: whether garbage from before is collected, so that none of it
    stays; a command that ends at once does not need to.
    """
    if collect_first:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
