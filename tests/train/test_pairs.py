"""Every feature of a run beside every other: the plan refuses a pair, or the two train together."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vtrain.registry import discover

MOST_RUNS = 60
QUICK = 6
"""Runs of the covering ones that the fast suite has; the others are slow."""


Refused = dict[tuple[tuple[str, str], tuple[str, str]], str]


@pytest.fixture(scope="session")
def pairs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pairs", Path(__file__).with_name("pairs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["pairs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, toy_clips: Path, pairs: ModuleType) -> Path:
    """A model, clips with masks, and a cache for all runs."""
    made: Path = pairs.lay_out(tmp_path_factory.mktemp("pairs"), toy_clips / "clips")
    return made


@pytest.fixture(scope="session")
def refused(place: Path, pairs: ModuleType) -> Refused:
    found: Refused = pairs.refused(place)
    return found


def test_every_choice_is_accepted_alone(place: Path, pairs: ModuleType) -> None:
    catalog = discover()
    alone = [(axis, choice) for axis, choices in pairs.AXES.items() for choice in choices]
    assert {each: why for each in alone if (why := pairs.planned(place, dict([each]), catalog))} == {}


def test_the_refused_pairs_are_those_of_the_page(refused: Refused, pairs: ModuleType) -> None:
    assert pairs.told(refused) in pairs.PAGE.read_text(encoding="utf-8"), "python tests/train/pairs.py --write"


def test_few_runs_cover_every_allowed_pair(refused: Refused, pairs: ModuleType) -> None:
    rows = pairs.covering(refused)
    covered = {frozenset(pair) for row in rows for pair in combinations(row.items(), 2)}
    assert {frozenset(pair) for pair in pairs.pairs()} - covered == {frozenset(pair) for pair in refused}
    assert len(rows) <= MOST_RUNS


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n < QUICK else pytest.mark.slow) for n in range(MOST_RUNS)]
)
def test_a_combination_trains_for_three_steps_and_is_done(
    number: int,
    place: Path,
    refused: Refused,
    pairs: ModuleType,
    within: Callable[..., Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Those that offload do so between main memory and a card that is main memory, too: on a CPU alone nothing would move."""
    rows = pairs.covering(refused)
    if number >= len(rows):
        pytest.skip(f"{len(rows)} combinations cover every pair")
    if rows[number]["offload"] != "none":
        request.getfixturevalue("card_in_ram")
    config = tmp_path / "config.toml"
    config.write_text(pairs.text(place, rows[number]), encoding="utf-8")
    for name in ("model", "clips"):
        (tmp_path / name).symlink_to(place / name)
    within("run", config)
    assert (tmp_path / "out" / "checkpoints" / "step-000003" / "MANIFEST.json").is_file(), rows[number]
    assert "nothing" in within("run", config).stdout  # it is found again, and whole
