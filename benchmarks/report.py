"""Numbers to words: ratios with their interval, tables, and the machine they were measured on."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path

import numpy as np

RESAMPLES = 10_000
OURS = ("vtrain", "vtrain-sanavideo", "vtrain-wan")
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")


@dataclass(frozen=True)
class Ratio:
    """Median of ratios, its bootstrap 95% interval, and the limit it is held to, if any.

    at_least: whether the limit is the least that will do, not the most.
    """

    median: float
    low: float
    high: float
    pairs: int
    limit: float | None
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the interval reaches the limit."""
        if self.limit is None:
            return True
        return self.high >= self.limit if self.at_least else self.low <= self.limit

    def __str__(self) -> str:
        word = "at least" if self.at_least else "limit"
        held = "no limit" if self.limit is None else f"{word} {self.limit:.2f}: {'met' if self.met else 'MISSED'}"
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}] over {self.pairs}, {held}"


def ratio(above: Sequence[float], below: Sequence[float], limit: float | None, *, at_least: bool = False) -> Ratio:
    """Of pairs above / below: the median of their ratios, and percentiles of the medians of resampled pairs."""
    ratios = np.asarray(above) / np.asarray(below)
    random = np.random.default_rng(0)
    medians = np.median(random.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios), limit, at_least)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    lines.insert(1, ["-" * width for width in widths])
    cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cpu = names[0].partition(":")[2].strip() if names else platform.processor()
    return (
        {"cpu": f"{os.cpu_count()} x {cpu}", "python": platform.python_version()}
        | {name: install(name) for name in OURS}
        | {package: version(package) for package in PACKAGES}
    )


def install(name: str) -> str:
    """ "0.1.0, editable install" or "0.1.0, normal install", as the distribution's direct_url.json (PEP 610) says."""
    found = distribution(name)
    editable = json.loads(found.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable", False)
    return f"{found.version}, {'editable' if editable else 'normal'} install"


def say(text: str = "") -> None:
    """A line on stdout, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say_machine() -> None:
    say("; ".join(f"{name} {value}" for name, value in machine().items()))


def write_json(path: Path | None, content: dict[str, object]) -> None:
    """To `path`, if there is one, with the machine."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n", encoding="utf-8")
