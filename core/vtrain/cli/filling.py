"""Filling the caches, for `vtrain run` and `vtrain cache fill`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from vtrain.cli.collector import uncollected
from vtrain.cli.moved import tell_moved
from vtrain.cli.prepare import planned
from vtrain.cli.report import one_line
from vtrain.contract import Caption, ConfigError, DataError, Problem, Role
from vtrain.data.sample import Sample
from vtrain.plan.records import Plan
from vtrain.plan.residents import Doing, remedies

if TYPE_CHECKING:
    from vtrain.data.caching.caches import Filled
    from vtrain.train.processes import Processes

_NAMED, _REASONS = 20, 10
"""Files that are told by name, and reasons that are told with their number, where there are more."""

KEPT = "interrupted; what is cached or saved is whole, and the same command goes on from it"


@contextmanager
def together(path: Path) -> Iterator[tuple[Plan, Processes, Console]]:
    """The plan of a configuration file, the processes that work on it, and where the first of them prints.

    Raises ConfigError if there are not as many as the launcher announced. Says what is kept at Ctrl-C.
    """
    with uncollected():
        plan = planned(path)
        from vtrain.train.processes import Processes

        processes = Processes(plan.config.precision.mixed, plan.base)
        if plan.config.run.deterministic:
            processes.device.deterministic()
    console = Console(quiet=not processes.first, soft_wrap=True, highlight=False)
    if processes.count != plan.processes:
        what = f"the launcher announced {plan.processes} processes in WORLD_SIZE, and {processes.count} work together."
        raise ConfigError(Problem("", what, "Start it with torchrun, or unset WORLD_SIZE."))
    for notice in dict.fromkeys(processes.gathered(list(processes.notices))):
        console.print(f"WARNING: {escape(notice)}", style="bold red")
    try:
        yield plan, processes, console
    except KeyboardInterrupt:
        console.print(KEPT)
        raise
    processes.close()


def extra_texts(plan: Plan) -> list[tuple[Caption, Role]]:
    """What a run encodes beside captions: validation's prompts."""
    if plan.validation is None:
        return []
    from vtrain.validate.generate import texts

    return texts(plan.validation)


def tell_left_out(left_out: Mapping[str, str], console: Console) -> None:
    """Files that could not be decoded or encoded: by name, and where they are many, how many there are of each reason.

    left_out: file -> why.
    """
    files = sorted(left_out.items())
    for file, reason in files[:_NAMED]:
        console.print(escape(one_line(f"left out: {file}: {reason}")))
    if len(files) > _NAMED:
        console.print(f"left out: {len(files) - _NAMED} more; `vtrain data list CONFIG --failed` names them. Of all:")
        for reason, count in Counter(left_out.values()).most_common(_REASONS):
            console.print(escape(one_line(f"  {count}  {reason}")))


def fill(plan: Plan, samples: Iterable[Sample], processes: Processes, console: Console) -> Filled:
    """Encode what is missing, each process its share, with progress. Raises DataError."""
    from vtrain.cli.progress import Filling
    from vtrain.data.caching.caches import fill_caches
    from vtrain.validate.pictures import fill_pictures

    doing: Doing = "filling the caches"
    with Filling(console, processes.count) as filling, processes.device.explained(doing, remedies(plan, doing)):
        try:
            filled = fill_caches(plan, samples, extra_texts(plan), str(processes.device), filling.report, processes)
        except DataError:
            if processes.first:  # what was found bad goes also where nothing is left to train on
                tell_moved(plan, console)
            raise
        processes.from_first(lambda: fill_pictures(plan, str(processes.device)))
    if filled.truncated:
        console.print(f"captions too long for the text encoder, which lost their end: {filled.truncated}")
    return filled
