"""What processes that work together must have alike: one configuration, the same packages and files, folders that all see."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from vtrain.contract import ConfigError, DataBackend, DataError, Problem, SupportsShards
from vtrain.estimate.render import counted
from vtrain.plan.records import Plan

if TYPE_CHECKING:
    from vtrain.train.processes import Processes

PATIENCE = 15.0
"""Seconds that a file which another machine made may take to be seen: network file systems look again after a while."""

SEEN = ".seen-"
"""How the names of such files begin."""


@dataclass(frozen=True)
class _Facts:
    """Of one process. configuration: hash of its file's text. packages: what it trains with -> version. host: its machine.

    files: dataset's id -> what its machine has of it, in words; of the first process of each of several machines.
    """

    host: str
    configuration: str
    packages: Mapping[str, str]
    files: Mapping[str, str] | None = None


def check_alike(plan: Plan, processes: Processes, *, trains: bool = True) -> None:
    """Raises ConfigError on all, where one has another configuration, other packages or other data, or does not see the first one's
    folders. trains: or fills caches alone, and has no output."""
    if processes.count == 1:
        return
    found = processes.gathered([_facts(plan)])
    problems = [*_differences(found, str(plan.config.path)), *_other_files(found, plan)]
    problems += _unseen(found, processes, [plan.config.cache.dir, *([plan.config.run.output_dir] if trains else [])])
    if problems:
        error = ConfigError(problems)
        error.reported = not processes.first
        raise error


def _facts(plan: Plan) -> _Facts:
    import torch

    from vtrain.train.resume import versions

    configuration = hashlib.sha256(plan.config.text.encode()).hexdigest()
    packages = {**versions(plan.config), "torch": f"torch {torch.__version__}"}
    several = os.environ.get("LOCAL_WORLD_SIZE") not in (None, os.environ.get("WORLD_SIZE"))
    files = None
    if several and os.environ.get("LOCAL_RANK") == "0":
        files = {each.id: _files(each.backend) for each in plan.datasets if each.backend.location.startswith("/")}
    return _Facts(socket.gethostname(), configuration, packages, files)


def _files(backend: DataBackend) -> str:
    """How many files there are, and a hash of their names and sizes: copies on each machine's own disk have other times."""
    digest, count = hashlib.sha256(), 0
    try:
        for ref in backend.shards() if isinstance(backend, SupportsShards) else backend.refs():
            digest.update(f"{ref.id}\0{ref.size}\n".encode())
            count += 1
    except DataError as error:
        return "; ".join(problem.what for problem in error.problems)
    return f"{counted(count, 'file')} (names and sizes: {digest.hexdigest()[:8]})"


def _named(found: Sequence[_Facts], rank: int) -> str:
    return f"process {rank + 1} of {len(found)} (on {found[rank].host})"


def _differences(found: Sequence[_Facts], file: str) -> Iterator[Problem]:
    first = found[0]
    for rank, each in enumerate(found):
        if each.configuration != first.configuration:
            what = f"{_named(found, rank)} has another text in this file than {_named(found, 0)}."
            yield Problem(file, what, "Give all processes the same file.")
        for part in sorted(first.packages.keys() | each.packages.keys()):
            one, other = first.packages.get(part, "nothing"), each.packages.get(part, "nothing")
            if one != other:
                what = f"{_named(found, rank)} has {other} where {_named(found, 0)} has {one}."
                yield Problem("", what, "Install the same versions everywhere.")


def _other_files(found: Sequence[_Facts], plan: Plan) -> Iterator[Problem]:
    first = found[0].files or {}
    for rank, each in enumerate(found):
        for dataset in plan.datasets:
            one, other = first.get(dataset.id), (each.files or {}).get(dataset.id)
            if one is None or other is None or one == other:
                continue
            what = f"{_named(found, rank)} has in {dataset.backend.location}: {other}; {_named(found, 0)} has: {one}."
            yield Problem(
                dataset.where, what, "Give all machines the same files: a folder that they share, or whole copies."
            )


def _unseen(found: Sequence[_Facts], processes: Processes, folders: Sequence[Path]) -> list[Problem]:
    """Folders in which a process does not find what the first one has just put there."""
    name = f"{SEEN}{uuid4().hex}"

    def put() -> str:
        for folder in folders:
            with suppress(OSError):  # what cannot be written is refused elsewhere, with its reason
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
        return name

    def gone() -> None:
        for folder in folders:
            with suppress(OSError):
                (folder / name).unlink()

    mark = processes.from_first(put)
    there = processes.from_first(lambda: [folder for folder in folders if (folder / mark).exists()])
    blind = processes.gathered([(processes.rank, [str(each) for each in there if not _seen(each / mark)])])
    processes.from_first(gone)
    return [
        Problem(
            folder,
            f"{_named(found, rank)} does not see what {_named(found, 0)} writes there.",
            "Processes on several machines need one output folder and one cache: choose folders that all of them share.",
        )
        for rank, missing in blind
        for folder in missing
    ]


def _seen(path: Path) -> bool:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        with suppress(OSError):
            list(path.parent.iterdir())  # what is known of a folder on the network is renewed
        time.sleep(0.1)
    return True
