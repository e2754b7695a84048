"""Says whose code failed: an exception from inside a plugin leaves with a note that names it, and what a part did against the
contract as a PluginError that does."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile

from vtrain.contract import PROJECT, PluginError, Problem, Registered, VtrainError
from vtrain.contract.plugin_rules import package_of
from vtrain.contract.specs import NOUNS, origin


class PartFault(PluginError):
    """What a part did against the contract, raised where it is seen; `blame` adds whose part it is.

    kind, name: of the part, name "" for the only one of its kind in the run. what: faults, which follow the part's name.
    remedy: "" for that of every fault of a plugin. where: a line of the file, "step 3" or "".
    """

    def __init__(self, kind: str, name: str, what: str | Iterable[str], remedy: str = "", where: str = "") -> None:
        self.kind, self.name, self.remedy, self.where = kind, name, remedy, where
        self.what: tuple[str, ...] = tuple(each.rstrip(".") for each in ((what,) if isinstance(what, str) else what))
        super().__init__(self._problems(name, ""))

    def __reduce__(self) -> tuple[type[PartFault], tuple[object, ...]]:  # type: ignore[override]
        return type(self), (self.kind, self.name, self.what, self.remedy, self.where)

    def _problems(self, name: str, whose: str) -> Iterator[Problem]:
        """whose: distribution and version, "" where they are not known."""
        noun = NOUNS[self.kind][0]
        part = " ".join(("the", noun, *([f'"{name}"'] if name else []), *([f"of {whose}"] if whose else [])))
        mend = f"Report it to its author, or use another version of {whose.rpartition(' ')[0]}." if whose else ""
        fault = f"This is a fault of the {'model family' if self.kind == 'family' else noun}'s plugin."
        for each in self.what:
            yield Problem(self.where, f"{part}: {each}.", self.remedy or f"{fault} {mend}".rstrip())

    def of(self, parts: Sequence[Registered]) -> PluginError:
        """With the distribution and version of the part, where it is known which it is."""
        own = [part for part in parts if part.spec.kind == self.kind and self.name in ("", part.spec.name)]
        name, whose = (own[0].spec.name, origin(own[0])) if len(own) == 1 else (self.name, "")
        found = PluginError(self._problems(name, whose))
        found.reported = self.reported
        return found

    def at(self, where: str) -> PartFault:
        """The same at a place, unless it has one."""
        found = PartFault(self.kind, self.name, self.what, self.remedy, self.where or where)
        found.reported = self.reported
        return found


@contextmanager
def blame(parts: Sequence[Registered]) -> Iterator[None]:
    """Add a note with part, distribution and version to what is raised inside, if a plugin's code is on its way.

    Of several plugins on the way, the innermost is named, and those of its parts that the run uses. A PartFault is raised again
    as a PluginError with distribution and version.
    """
    try:
        yield
    except PartFault as error:
        raise error.of(parts) from error
    except VtrainError:
        raise
    except Exception as error:
        for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):  # the innermost first
            module = str(frame.f_globals.get("__name__", ""))
            if own := _owners(module, parts):
                names = ", ".join(dict.fromkeys(f"{part.spec.kind} {part.spec.name}" for part in own))
                error.add_note(f"in {origin(own[0])} ({names}), module {module}")
                break
        raise


@contextmanager
def at_step(step: int) -> Iterator[None]:
    """Add the optimizer step (1-based) to what is raised inside."""
    try:
        yield
    except PartFault as error:
        raise error.at(f"step {step}") from error
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


def _owners(module: str, parts: Sequence[Registered]) -> list[Registered]:
    """The parts of the distribution in whose package a module is; of several, of the one that shares most of the module's name."""
    found = [(part, home) for part in parts if (home := _module(part)).partition(".")[0] not in (PROJECT, "")]
    own = [(part, home) for part, home in found if f"{module}.".startswith(f"{package_of(home)}.")]
    nearest = max((_shared(module, home) for _, home in own), default=0)
    whose = {part.distribution for part, home in own if _shared(module, home) == nearest}
    return [part for part, _ in own if part.distribution in whose]


def _shared(module: str, home: str) -> int:
    """How many names two dotted ones begin with alike."""
    pairs = zip(module.split("."), home.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _module(part: Registered) -> str:
    """Where a part's code is. Of one whose options are the contract's own class, where its build is."""
    module = part.spec.options.__module__
    build: object = getattr(part.spec, "build", None)
    while module.partition(".")[0] == PROJECT and isinstance(build, partial):
        build = build.func
    return module if module.partition(".")[0] != PROJECT else str(getattr(build, "__module__", ""))
