"""The processes that fill the caches together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from vtrain.contract import VtrainError

T = TypeVar("T")
Y = TypeVar("Y")


class Peers(Protocol):
    """This process among those of its run."""

    @property
    def count(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def gathered(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other; each waits for all."""
        ...


@dataclass(frozen=True)
class Alone:
    """A run of one process."""

    count: int = 1
    rank: int = 0

    def gathered(self, values: list[Any]) -> list[Any]:
        return values


ALONE = Alone()


def is_share(peers: Peers, name: str) -> bool:
    """Whether what goes by this name falls to this process: by a hash, so that nobody need see the whole."""
    return digest64(name) % peers.count == peers.rank


def digest64(name: str) -> int:
    """64 bits that stand for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def together(peers: Peers, work: Callable[[], T]) -> list[T]:
    """Do this process's share of some work and wait for the others: what it gave on each, by rank.

    What went wrong for the user on any of them is raised on all, as one error with all problems; the first tells it.
    """
    result, failure = None, None
    try:
        result = work()
    except VtrainError as error:
        failure = error
    return _agreed(peers, result, failure)


def together_telling(peers: Peers, work: Generator[Y, None, T]) -> Generator[Y, None, list[T]]:
    """The same of work that tells how far it is."""
    result, failure = None, None
    try:
        result = yield from work
    except VtrainError as error:
        failure = error
    return _agreed(peers, result, failure)


def _agreed(peers: Peers, result: Any, failure: VtrainError | None) -> list[Any]:
    told = peers.gathered([(result, failure)])
    failures: list[VtrainError] = [failure for _, failure in told if failure is not None]
    if failures:
        problems = dict.fromkeys(problem for failure in failures for problem in failure.problems)
        one = failure if len(failures) == 1 and failure is not None else type(failures[0])(problems)
        one.told = peers.rank > 0
        raise one
    return [result for result, _ in told]
