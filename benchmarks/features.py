"""What each feature costs: vtrain's step with it against vtrain's step without, in CPU-seconds on one thread.

    python benchmarks/features.py [--model small] [--pairs 8] [--features ema ...] [--write]

In one process, blocks of steps of the two runs take turns, as in step.py, whose model, clips and base configuration these are; what
a feature is compared with is the same configuration without it. --write puts the table into benchmarks/README.md.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and numpy start their threads

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from measured import put
from report import Ratio, machine, ratio, say, say_machine, table, write_json
from step import STEPS, seconds_of, vtrain_block
from workload import MODELS, Model, fill, write_config

PAGE = Path(__file__).with_name("README.md")


@dataclass(frozen=True)
class Feature:
    """mode: of step.py's base configuration. changes: text of it -> what stands there with the feature; more: tables at its end.

    without: changes of the side without it, beside those of the base.
    """

    mode: str
    changes: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    without: Mapping[str, str] = field(default_factory=dict)


NO_CHECKPOINTING = "gradient_checkpointing = false"
FEATURES = {
    "gradient clipping by norm": Feature(
        "full", {"[train]": '[train]\ngradient_clip = { method = "norm", max = 1.0 }'}
    ),
    "gradient checkpointing, every block": Feature("full", {NO_CHECKPOINTING: "gradient_checkpointing = true"}),
    "layersync": Feature("full", more='\n[[regularizer]]\nuse = "layersync"\nstudent = 1\nteacher = 3\n'),
}
"""Name -> what turns it on."""


@dataclass(frozen=True)
class Cost:
    """CPU-seconds per step without and with a feature, medians over blocks, and their ratio in pairs."""

    feature: str
    mode: str
    without: float
    with_it: float
    ratio: Ratio


def measure(folder: Path, model: Model, name: str, pairs: int, steps: int) -> Cost:
    """Pairs of blocks in turn, after one block of each to warm up."""
    feature = FEATURES[name]
    sides = {"without": (feature.without, ""), "with": (feature.changes, feature.more)}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    with ExitStack() as stack:
        blocks = {}
        for side, (changes, more) in sides.items():
            place = f"{name}-{side}-{model.name}".replace(" ", "-").replace(",", "")
            config = write_config(folder, model, feature.mode, steps, place, more, changes)
            fill(config)
            blocks[side] = stack.enter_context(vtrain_block(config))
            blocks[side]()
        for pair in range(pairs):
            for side in sorted(blocks, reverse=pair % 2 == 1):
                seconds[side].append(seconds_of(blocks[side], time.process_time) / steps)
    gc.collect()
    without, with_it = (statistics.median(seconds[side]) for side in sides)
    return Cost(name, feature.mode, without, with_it, ratio(seconds["with"], seconds["without"], None))


def cost_table(found: list[Cost]) -> str:
    rows = [
        (each.feature, each.mode, f"{each.without:.4f}", f"{each.with_it:.4f}",
         f"{each.ratio.median:.3f} [{each.ratio.low:.3f}, {each.ratio.high:.3f}]")
        for each in found
    ]  # fmt: skip
    return table(("feature", "trained", "CPU-s/step without", "with", "ratio, 95% interval"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=list(FEATURES))
    parser.add_argument("--pairs", type=int, default=8, help="pairs of blocks for each feature (default: %(default)s)")
    parser.add_argument("--steps", type=int, help=f"steps of a block (default: {STEPS})")
    parser.add_argument("--folder", type=Path, help="where checkpoints and caches go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--write", action="store_true", help=f"put the table into benchmarks/{PAGE.name}")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model = MODELS[chosen.model]
    with ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vtrain-features-")))
        folder.mkdir(parents=True, exist_ok=True)
        say_machine()
        found = [
            measure(folder, model, name, chosen.pairs, chosen.steps or STEPS[model.name]) for name in chosen.features
        ]
    told = cost_table(found)
    say("\n" + told)
    write_json(chosen.json, {"features": [asdict(each) for each in found]})
    if chosen.write:
        known = "; ".join(f"{name} {value}" for name, value in machine().items())
        put(PAGE, "features", f"Measured on {datetime.now(UTC):%Y-%m-%d}, model {model.name}: {known}.\n\n{told}\n")


if __name__ == "__main__":
    main()
