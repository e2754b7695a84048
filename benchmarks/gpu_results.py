"""What gpu_sana2b.py has measured: rows, their ratios, and a file that later calls complete.

The file keeps cards apart, and versions: a call adds to what was measured on the same card with the same driver and packages, in
the place of an older measurement of the same group, and leaves the figures of other cards as they are.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from report import Ratio, ratio, table

LIMITS = {"seconds": 1.02, "memory": 1.05}
"""vtrain by the bare loop."""
CREPA_LIMITS: dict[str, dict[str, float | None]] = {
    "CREPA cached": {"seconds": 1.05, "memory": 1.05},
    "CREPA decoded": {"seconds": None, "memory": None},
}
"""By vtrain without it."""
NO_LIMITS: dict[str, float | None] = {"seconds": None, "memory": None}
HEADS = ("row", "trained", "clip", "s/step", "by bare", "peak GiB (reserved)", "by bare", "estimate", "TFLOP/s", "how")
PEER = (
    "SimpleTuner 4, as published", "lora", "832x480x49", "0.599", "-", "59.15 (-)", "-", "-", "-",
    "H100, checkpointing said on",
)  # fmt: skip
PLAIN = ("bare", "vtrain")
"""Rows whose work in TFLOP is known."""


@dataclass
class Measured:
    """One row. tflop: of a step. seconds: per step, one for each block. Peaks and estimate in bytes, 0 on a CPU or not known.

    note: what went wrong. in_turn: whether it took turns with the others.
    """

    side: str
    mode: str
    clip: str
    tflop: float | None = None
    in_turn: bool = False
    seconds: list[float] = field(default_factory=list)
    allocated: int = 0
    reserved: int = 0
    estimate: int = 0
    note: str = ""


def ratios(found: Mapping[str, Measured]) -> dict[str, Ratio]:
    """Seconds in pairs of blocks, peak allocated bytes: of every row by the bare loop, and of all others by vtrain."""
    compared: dict[str, Ratio] = {}
    for below in PLAIN:
        for above in found:
            limits: Mapping[str, float | None] = NO_LIMITS
            if below == "vtrain":
                limits = CREPA_LIMITS.get(above, NO_LIMITS)
            elif above == "vtrain":
                limits = LIMITS
            if above not in ("bare", below):
                compared |= compare(above, found[above], below, found.get(below), limits)
    return compared


def compare(
    above: str, ours: Measured, below: str, theirs: Measured | None, limits: Mapping[str, float | None]
) -> dict[str, Ratio]:
    if theirs is None or ours.note or theirs.note:
        return {}
    pairs = {"seconds": (ours.seconds, theirs.seconds), "memory": ([ours.allocated], [theirs.allocated])}
    return {f"{above} / {below}, {name}": ratio(a, b, limits[name]) for name, (a, b) in pairs.items() if a and all(b)}


def row(each: Measured, compared: Mapping[str, Ratio] | None = None) -> tuple[str, ...]:
    """Cells of the table."""
    median = statistics.median(each.seconds) if each.seconds else None
    by = {name: (compared or {}).get(f"{each.side} / bare, {name}") for name in LIMITS}
    gib = f"{each.allocated / 2**30:.2f} ({each.reserved / 2**30:.2f})" if each.allocated else "-"
    reckoned = f"{each.estimate / 2**30:.2f}" if each.estimate else "-"
    if each.estimate and each.allocated:
        reckoned += f" ({each.estimate / each.allocated - 1:+.0%})"
    work = each.tflop if each.side in PLAIN else None
    return (
        each.side,
        each.mode,
        each.clip,
        f"{median:.3f}" if median else "-",
        f"{by['seconds'].median:.3f}" if by["seconds"] else "-",
        gib,
        f"{by['memory'].median:.3f}" if by["memory"] else "-",
        reckoned,
        f"{work / median:.0f}" if work and median else "-",
        each.note or ("in turn" if each.in_turn else "one after the other"),
    )


class Results:
    """What a file has of one card, and of others."""

    def __init__(self, path: Path | None, card: Mapping[str, str], machine: Mapping[str, str]) -> None:
        """path: None for no file. Raises SystemExit for one that this script has not written."""
        self.path, self.mine = path, {"card": dict(card), "machine": dict(machine), "groups": {}}
        self.cards: list[dict[str, Any]] = read(path) if path is not None and path.exists() else []
        same = [each for each in self.cards if all(each[key] == self.mine[key] for key in ("card", "machine"))]
        if same:
            self.mine = same[0]
        else:
            self.cards.append(self.mine)

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """Of this card, in the order in which they came."""
        found: dict[str, dict[str, Any]] = self.mine["groups"]
        return found

    @property
    def others(self) -> list[str]:
        """The other cards in the file, with what of them is another."""
        rest = [each for each in self.cards if each is not self.mine and each["groups"]]
        return [f"{each['card'].get('gpu', '?')}: {', '.join(differences(each, self.mine))}" for each in rest]

    def add(self, name: str, found: Mapping[str, Measured], how: Mapping[str, object]) -> None:
        """A group, in the place of an older one of that name, and the file anew. how: steps, blocks and the like."""
        sides = {side: asdict(each) for side, each in found.items()}
        numbers = {pair: asdict(each) for pair, each in ratios(found).items()}
        self.groups.pop(name, None)
        self.groups[name] = {**how, "sides": sides, "ratios": numbers}
        if self.path is not None:
            aside = self.path.with_name(f".{self.path.name}.partial")
            aside.write_text(json.dumps({"cards": self.cards}, indent=1) + "\n", encoding="utf-8")
            aside.replace(self.path)  # whole or not at all, whenever the machine goes away

    def text(self) -> str:
        """All groups of this card as a table, the ratios with their limits below it."""
        rows, told = [], []
        for name, group in self.groups.items():
            found = {side: Measured(**each) for side, each in group["sides"].items()}
            compared = {pair: Ratio(**each) for pair, each in group["ratios"].items()}
            rows += [row(each, compared) for each in found.values()]
            told += [f"{name}, {pair}: {each}" for pair, each in compared.items()]
        lines = [table(HEADS, [*rows, PEER]), "", *told]
        lines += [f"The file also has figures of {other}" for other in self.others]
        return "\n".join(lines)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterable[str]:
    for key in ("card", "machine"):
        for name, value in one[key].items():
            if other[key].get(name) != value:
                yield f"{name} {value}"


def read(path: Path) -> list[dict[str, Any]]:
    try:
        cards = json.loads(path.read_text(encoding="utf-8"))["cards"]
        assert all({"card", "machine", "groups"} <= set(each) for each in cards)
    except (ValueError, KeyError, TypeError, AssertionError, OSError) as error:
        raise SystemExit(
            f"{path} is no file of this script's results ({type(error).__name__}): name another one"
        ) from error
    found: list[dict[str, Any]] = cards
    return found
