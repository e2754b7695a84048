"""Says whose code failed: an exception from inside a plugin leaves with a note that names the part and its distribution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vtrain.contract import Registered, VtrainError


@contextmanager
def blame(part: Registered, doing: str) -> Iterator[None]:
    """Add "in family sanavideo (vtrain-sanavideo 0.1.0) while <doing>" to whatever is raised inside."""
    try:
        yield
    except VtrainError:
        raise
    except Exception as error:
        error.add_note(f"in {part.spec.kind} {part.spec.name} ({part.distribution} {part.version}) while {doing}")
        raise
