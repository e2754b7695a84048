"""From a file's name to a priced plan: what `vtrain plan` shows and `vtrain run` starts with. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vtrain.config import load
from vtrain.data.scanning.scan import Scan, scan
from vtrain.plan.make import make_plan
from vtrain.plan.price import Prices, check_room, price
from vtrain.plan.records import Plan
from vtrain.registry import discover
from vtrain.registry.blame import blame


@dataclass(frozen=True)
class Prepared:
    """A plan, what was found in its data, and what it amounts to."""

    plan: Plan
    scan: Scan
    prices: Prices


def planned(path: Path) -> Plan:
    """Read and check the file. The number of processes is what the launcher (torchrun, accelerate) says."""
    return make_plan(load(path, discover()), int(os.environ.get("WORLD_SIZE", "1")))


def prepare(path: Path, on_file: Callable[[int], None] | None = None) -> Prepared:
    """Plan, scan, price. Raises ConfigError, ModelError, PluginError or DataError."""
    plan = planned(path)
    with blame(plan.config.parts()):
        found = scan(plan, on_file)
    prices = price(plan, found.survey)
    check_room(plan, prices)
    return Prepared(plan, found, prices)
