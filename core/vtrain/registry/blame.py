"""Says whose code failed: an exception that comes from inside a plugin leaves with a note that names it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vtrain.contract import Registered, VtrainError


@contextmanager
def blame(parts: Sequence[Registered]) -> Iterator[None]:
    """Add a note with part, distribution and version to what is raised inside, if a plugin's code is on its way.

    Of several plugins on the way, the innermost is named, and those of its parts that the run uses.
    """
    try:
        yield
    except VtrainError:
        raise
    except Exception as error:
        packages = {_package(part): part for part in parts}
        for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):  # the innermost first
            module = str(frame.f_globals.get("__name__", ""))
            if module.partition(".")[0] in packages:
                own = [part for part in parts if _package(part) == module.partition(".")[0]]
                names = ", ".join(dict.fromkeys(f"{part.spec.kind} {part.spec.name}" for part in own))
                error.add_note(f"in {own[0].distribution} {own[0].version} ({names}), module {module}")
                break
        raise


@contextmanager
def at_step(step: int) -> Iterator[None]:
    """Add the optimizer step (1-based) to what is raised inside."""
    try:
        yield
    except VtrainError:
        raise
    except Exception as error:
        error.add_note(f"at step {step}")
        raise


@contextmanager
def in_background(where: str) -> Iterator[None]:
    """Work of another thread, whose failure is raised again in the one that waits for it. where: "in the prefetcher, ...".

    What a plugin raises to end a process (SystemExit) becomes an error like any other: a thread pool would lose it, and
    whoever waits would wait for ever, or the run would end without a word.
    """
    try:
        yield
    except VtrainError:
        raise
    except Exception as error:
        error.add_note(where)
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__} ({error}) was raised {where}") from error


def _package(part: Registered) -> str:
    return part.spec.options.__module__.partition(".")[0]
