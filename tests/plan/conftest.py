"""Plans of the toy family from config text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vtrain.config import load
from vtrain.plan.make import make_plan
from vtrain.plan.records import Plan
from vtrain.registry import discover

TABLES = {
    "run": 'output_dir = "out"',
    "model": 'use = "toy"\ntrain = "full"',
    "[data]": 'use = "folder"\npath = "clips"',
    "train": "steps = 10",
    "optimizer": 'use = "adamw"\nlr = 1e-3',
}


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    """Make a plan; tables given by name replace or join the smallest file that is valid."""

    def make(processes: int = 1, more: str = "", **tables: str) -> Plan:
        given = {**TABLES, **{name.replace("data", "[data]", 1): body for name, body in tables.items()}}
        text = "\n".join(f"[{name}]\n{body}" for name, body in given.items())
        file = tmp_path / "config.toml"
        file.write_text(text + "\n" + more, encoding="utf-8")
        return make_plan(load(file, discover()), processes)

    return make
