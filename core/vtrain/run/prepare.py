"""From a file's name to a plan and what it amounts to: what `vtrain plan` shows and every run starts with. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vtrain.config import load
from vtrain.contract import Caption, ConfigError, Role
from vtrain.data.scanning.scan import Scan, scan
from vtrain.plan.make import make_plan
from vtrain.plan.price import Prices, check_room, price
from vtrain.plan.records import Plan
from vtrain.registry import discover
from vtrain.registry.blame import blame
from vtrain.run.collector import uncollected
from vtrain.validate import picture_files


@dataclass(frozen=True)
class Prepared:
    """A plan, what was found in its data, and what it amounts to."""

    plan: Plan
    scan: Scan
    prices: Prices


def planned(path: Path) -> Plan:
    """Read and check the file. The number of processes is what the launcher (torchrun, accelerate) says."""
    config = load(path, discover())
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    unseen = list(picture_files.problems(config))
    if not unseen:
        return make_plan(config, processes)
    try:
        make_plan(config, processes)
    except ConfigError as error:
        unseen = [*error.problems, *unseen]
    raise ConfigError(unseen)


def prepare(path: Path, on_file: Callable[[int], None] | None = None) -> Prepared:
    """Plan, scan, price. Raises ConfigError, ModelError, PluginError or DataError."""
    with uncollected(collect_first=False):
        plan = planned(path)
    with blame(plan.config.parts()):
        found = scan(plan, on_file)
    prices = price(plan, found.survey)
    check_room(plan, prices)
    return Prepared(plan, found, prices)


def extra_texts(plan: Plan) -> list[tuple[Caption, Role]]:
    """What a run encodes beside captions: validation's prompts. Imports torch."""
    if plan.validation is None:
        return []
    from vtrain.validate.generate import texts

    return texts(plan.validation)
