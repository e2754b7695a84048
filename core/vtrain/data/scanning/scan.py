"""The scan: every file of every dataset becomes a sample, or is left out with its reason. Imports no torch.

It streams: a listing is merged with what the ledger knows of the place, what is new is looked at, what changed is
decided, and the counts are SQLite's. Nothing of it grows with the number of files but the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from vtrain.contract import DataError, Problem
from vtrain.data.decoding.worker import Workers, available_cpus
from vtrain.data.scanning.database import moved_aside
from vtrain.data.scanning.decisions import decide
from vtrain.data.scanning.ledger import Ledger
from vtrain.data.scanning.pictures import picture_faults
from vtrain.data.scanning.samples import Found, Samples
from vtrain.data.scanning.sources import refresh
from vtrain.data.scanning.surveys import DatasetSurvey, Survey, count_texts, problems, survey
from vtrain.plan.records import DatasetPlan, Plan

_LIMIT_S = 120.0
"""Seconds for a file where its dataset says nothing else."""


@dataclass(frozen=True)
class Scan:
    """samples: as the ledger gives them. survey: what was found. messages: about the ledger itself."""

    samples: Samples
    survey: Survey
    messages: tuple[str, ...]


def scan(plan: Plan, on_file: Callable[[int], None] | None = None) -> Scan:
    """Look at every file of the plan's datasets, opening only those that changed since the last scan.

    on_file: told the number of files done. Raises DataError with all problems of all datasets.
    """
    wrong = list(picture_faults(plan.config))
    found: list[tuple[Found, DatasetSurvey]] = []
    with Ledger(plan.config.cache.dir) as ledger:
        for place in decided(ledger, plan, wrong, on_file):
            dataset = plan.datasets[place.number]
            seen = survey(ledger, place.place, place.decision, dataset, plan.shares[place.number])
            wrong += problems(ledger, place.decision, dataset, seen)
            found.append((replace(place, count=sum(seen.samples.values())), seen))
        if wrong:
            raise DataError(wrong)
        texts = count_texts(ledger, [each.decision for each, _ in found])
        messages = told(ledger)
        samples_of_all = Samples(ledger.path, tuple(each for each, _ in found))
    return Scan(samples_of_all, Survey(tuple(seen for _, seen in found), texts), messages)


def told(ledger: Ledger) -> tuple[str, ...]:
    """What became of damaged files of the cache folder: of the ledger, and of the hashes of model files."""
    return tuple(filter(None, (ledger.message, moved_aside(ledger.path.parent))))


def decided(
    ledger: Ledger,
    plan: Plan,
    wrong: list[Problem],
    on_file: Callable[[int], None] | None = None,
    only: str | None = None,
) -> Iterator[Found]:
    """The plan's datasets, each brought up to date, its samples not counted. only: the id of the one that is wanted.

    wrong: takes the problems of those that could not be. on_file: told the number of files done.
    """
    count = _counting(on_file)
    with Workers(available_cpus(), _LIMIT_S) as workers:
        for number, dataset in enumerate(plan.datasets):
            if only not in (None, dataset.id):
                continue
            try:
                place = refresh(ledger, dataset, workers, count)
            except DataError as error:
                wrong += [_at(dataset, problem) for problem in error.problems]
                continue
            decision = decide(ledger, place, dataset, plan.family)
            yield Found(dataset.id, number, dataset.table.crop, place, decision, count=0)


def _counting(on_file: Callable[[int], None] | None) -> Callable[[], None] | None:
    if on_file is None:
        return None
    done = Counter[str]()

    def count() -> None:
        done["files"] += 1
        on_file(done["files"])

    return count


def _at(dataset: DatasetPlan, problem: Problem) -> Problem:
    """A backend's problem, at the dataset's place in the configuration file."""
    return Problem(dataset.where, f"{problem.where}: {problem.what}" if problem.where else problem.what, problem.remedy)
