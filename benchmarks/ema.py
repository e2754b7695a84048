"""What an average of the weights and rollout cost: a step with them against the same step without, in CPU-seconds on one thread.

Everything is as in step.py. `bare` is its bare loop with the same average kept by hand, against which vtrain's step with
[ema] has the limit of step.py; the other rows compare vtrain with itself and have no limit.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and numpy start their threads

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from report import Ratio, ratio, say, say_machine, table, write_json
from step import STEPS, TIME_LIMITS, bare_block, seconds_of, vtrain_block
from workload import MODELS, MODES, Model, fill, write_config

CASES = {
    "plain": "",
    "ema": "\n[ema]\n",
    "ema, every 10 steps": "\n[ema]\nupdate_every = 10\n",
    "rollout, 1 of 4, 2 steps": "\n[train.rollout]\nprobability = 0.25\nsteps = 2\nmin_level = 0.01\n",
}
BARE = "bare, with an average"


@dataclass(frozen=True)
class Compared:
    """CPU-seconds per step of a case and of what it is compared with, medians over blocks, and their ratio in pairs."""

    model: str
    mode: str
    case: str
    against: str
    seconds: float
    others: float
    ratio: Ratio


def measure(folder: Path, model: Model, mode: str, pairs: int, steps: int, cases: Sequence[str]) -> list[Compared]:
    """Blocks in turn, in another order each time, after one block of each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with ExitStack() as stack:
        blocks = {}
        for number, case in enumerate(name for name in cases if name != BARE):
            name = f"ema-{number}-{model.name}-{mode}"
            config = write_config(folder, model, mode, log_every=steps, name=name, more=CASES[case])
            fill(config)
            blocks[case] = stack.enter_context(vtrain_block(config))
        blocks[BARE] = stack.enter_context(bare_block(config, model, {"full": "ema", "lora": "lora-ema"}[mode], steps))
        for block in blocks.values():
            block()
        for pair in range(pairs):
            for case in sorted(cases, key=lambda each: (cases.index(each) + pair) % len(cases)):
                seconds[case].append(seconds_of(blocks[case], time.process_time) / steps)
    against = {case: "plain" for case in CASES if case != "plain"}
    found = [("ema", BARE, TIME_LIMITS[model.name]), *((case, other, 0.0) for case, other in against.items())]
    median = {case: statistics.median(each) for case, each in seconds.items()}
    return [
        Compared(
            model.name,
            mode,
            case,
            other,
            median[case],
            median[other],
            ratio(seconds[case], seconds[other], limit or None),
        )
        for case, other, limit in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16, help="blocks of each case (default: 16)")
    parser.add_argument("--steps", type=int, help=f"steps of a block (default: {STEPS})")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["small", "tiny"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--folder", type=Path, help="where checkpoints and caches go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vtrain-ema-")))
        folder.mkdir(parents=True, exist_ok=True)
        say_machine()
        found = [
            row
            for name in chosen.models
            for mode in chosen.modes
            for row in measure(folder, MODELS[name], mode, chosen.pairs, chosen.steps or STEPS[name], [*CASES, BARE])
        ]
    heads = ("model", "trained", "step", "against", "CPU-s", "CPU-s of the other", "ratio, 95% interval")
    rows = [(r.model, r.mode, r.case, r.against, f"{r.seconds:.4f}", f"{r.others:.4f}", str(r.ratio)) for r in found]
    say(table(heads, rows))
    write_json(chosen.json, {"steps": [asdict(row) for row in found]})


if __name__ == "__main__":
    main()
