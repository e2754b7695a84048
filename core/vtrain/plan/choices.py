"""The sets of savings that a plan may choose from, each reckoned with the plan's own estimate. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from vtrain.config.keys import key_text
from vtrain.contract import Catalog
from vtrain.plan.adapter import adapter_problems, resumes
from vtrain.plan.memory import MemoryEstimate, Workload, estimate_of
from vtrain.plan.offload import offload_problems
from vtrain.plan.optimizer import optimizer_problems
from vtrain.plan.parallel import parallel_problems
from vtrain.plan.places import PLAN, resume_path
from vtrain.plan.precision import layer_problems, precision_problems, storage_of
from vtrain.plan.records import Plan
from vtrain.plan.savings import PLAIN, SAVINGS, Key, Saving
from vtrain.plan.workload import memory_settings


@dataclass(frozen=True)
class Limit:
    """What there is. size: bytes for each process, of its card, or of the machine's memory where the CPU trains (on_cpu); where:
    whose they are. host: bytes of the machine's memory beside a card, None: not known. given: whether somebody chose that
    size; else it is what there is."""

    size: int
    where: str
    host: int | None
    on_cpu: bool
    given: bool = False

    def amount(self, estimate: MemoryEstimate) -> int:
        """Bytes of what it is for."""
        return estimate.on_cpu if self.on_cpu else estimate.on_device

    def holds(self, estimate: MemoryEstimate) -> bool:
        host = self.on_cpu or self.host is None or estimate.on_host <= self.host
        return host and self.amount(estimate) <= self.size


@dataclass(frozen=True)
class Choice:
    """Some savings at once, and what a run then takes. time: of a step by that without any."""

    savings: tuple[Saving, ...]
    plan: Plan
    estimate: MemoryEstimate
    time: float

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(saving.words for saving in self.savings)


class Options:
    """The sets of savings of one plan, each reckoned. work: what the run works on. given: whether keys of the file stay."""

    def __init__(
        self, plan: Plan, work: Workload, catalog: Catalog | None, *, on_cpu: bool, given: bool = True
    ) -> None:
        self.plan, self.work, self.catalog, self.on_cpu, self.given = plan, work, catalog, on_cpu, given
        self._earlier = _earlier(plan)
        self._fixed = {key: value for key in FIXED if (value := self._was(key)) is not None}

    def choices(self, may: Sequence[str]) -> list[Choice]:
        """All that `may` allows and that work, the fastest first."""
        plan = self._plain(may)
        axes: dict[str, list[Saving | None]] = {}
        for saving in SAVINGS:
            if saving.may in may and not self.why_not(saving):
                # What a resumed run was begun with, it keeps.
                must = not saving.exact and self._recorded(saving)
                axes.setdefault(saving.axis, [] if must else [None]).append(saving)
        found = (
            self._reckoned(plan, [each for each in chosen if each is not None]) for chosen in product(*axes.values())
        )
        return sorted((each for each in found if each is not None), key=lambda each: (each.time, len(each.savings)))

    def _plain(self, may: Sequence[str]) -> Plan:
        """The plan without any saving that may be chosen."""
        config = self.plan.config
        for (table, key), value in PLAIN:
            if "checkpointing" in may and ((table, key) not in config.lines or not self.given):
                config = replace(config, **{table: vars(config)[table].model_copy(update={key: value})})
        return replace(self.plan, config=config)

    def _reckoned(self, plan: Plan, savings: Sequence[Saving]) -> Choice | None:
        """None for a set that does not work together."""
        config, time = plan.config, 1.0
        for saving in savings:
            config = saving.set(config, self.catalog)
            time += saving.time(plan, self.work)
        if any(offload_problems(config, plan.family, plan.processes)) or any(parallel_problems(config, None)):
            return None
        settings = memory_settings(config, plan.family, plan.processes, on_cpu=self.on_cpu)
        changed = replace(plan, config=config, base=storage_of(config).name)
        return Choice(tuple(savings), changed, estimate_of(self.work, settings), time)

    def why_not(self, saving: Saving) -> str:
        """Why a saving cannot be chosen; "" where it can."""
        config = self.plan.config
        for key in saving.keys:
            if key in config.lines and self.given:
                return f"the file sets {key_text(key)}"
        if not saving.applies(self.plan) or (self.on_cpu and not saving.on_cpu):
            return "there is nothing to save by it in this run"
        if saving.axis == "recompute" and saving.values[0][1] == "feed_forward" and _no_feed_forward(self.work):
            return "what it saves of this model was not measured"
        if not saving.exact and not self._recorded(saving) and any(key in self._fixed for key in saving.keys):
            return "the run resumes, and was begun without it"
        return self._problem(saving)

    def _problem(self, saving: Saving) -> str:
        """Why it would be refused by itself. Rows of groups have rules with others, which `choices` goes by."""
        if saving.exact:
            return ""
        config, family = saving.set(self.plan.config, self.catalog), self.plan.family
        if config is self.plan.config:
            return "it is not installed"
        problems = [
            *precision_problems(config), *optimizer_problems(config, self.catalog), *layer_problems(config, family),
            *adapter_problems(config, family, storage_of(config).name),
        ]  # fmt: skip
        return problems[0].what.rstrip(".") if problems else ""

    def begun_with(self, card: str) -> tuple[str, ...] | None:
        """What was chosen for the run that is resumed, if the limit is the same and the card has the same name; None otherwise."""
        promise = (self._earlier.get("memory") or {}).get("promise") or {}
        table = self.plan.config.memory
        if table is None or self._was(("memory", "limit")) != table.limit or promise.get("card") != card:
            return None
        return tuple(promise.get("chosen", ()))

    def _was(self, key: Key) -> object:
        """A setting of the run that is resumed; None where there is no such run."""
        return self._earlier.get("settings", {}).get(key_text(key))

    def _recorded(self, saving: Saving) -> bool:
        """Whether a run that resumes was begun with it."""
        return all(self._fixed.get(key) == value for key, value in saving.values)


def _no_feed_forward(work: Workload) -> bool:
    return work.kept is None or work.kept.feed_forward is None


FIXED: tuple[Key, ...] = (("precision", "base"), ("optimizer", "use"))
"""What a saving sets and a resumed run may not change."""


def _earlier(plan: Plan) -> Mapping[str, Any]:
    """plan.json of the run that is resumed; {} for a new run."""
    config = plan.config
    if not resumes(config):
        return {}
    folder = config.run.output_dir if config.run.resume == "latest" else resume_path(config).parents[1]
    try:
        found = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # resuming says what is wrong with it
    return found if isinstance(found, dict) else {}
