"""What each feature costs: vtrain's step with it against vtrain's step without, in CPU-seconds on one thread.

    python benchmarks/features.py [--model small] [--pairs 8] [--features ema ...] [--write] [--json FILE]

In one process, blocks of steps of the two runs take turns, as in step.py, whose model, clips and base configuration these are; what
a feature is compared with is the same configuration without it. --write puts the table into benchmarks/README.md. A file of --json
is completed by later calls with other features. A feature whose library is not installed is named, and not measured.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and numpy start their threads

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import torch
from measured import put
from report import Ratio, machine, ratio, say, say_machine, table, write_json
from step import STEPS, seconds_of, vtrain_block
from workload import MODELS, RANK, Model, fill, write_config

PAGE = Path(__file__).with_name("README.md")


@dataclass(frozen=True)
class Feature:
    """mode: of step.py's base configuration. changes: text of it -> what stands there with the feature; more: tables at its end.

    clips: of a step with the feature, by which its seconds are divided. library: a module that it needs beside vtrain's own.
    """

    mode: str
    changes: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    clips: int = 1
    library: str = ""


def optimizer(name: str, library: str = "") -> Feature:
    return Feature("full", {'use = "adamw"': f'use = "{name}"'}, library=library)


def in_bf16(name: str, library: str = "") -> Feature:
    """All weights in bf16, which the optimizer `name` moves."""
    changes = {'base = "fp32"': 'base = "bf16"', 'use = "adamw"': f'use = "{name}"'}
    return Feature("full", changes, library=library)


def adapter(line: str) -> Feature:
    """A line of [model.lora] beside the rank."""
    return Feature("lora", {f"rank = {RANK}\n": f"rank = {RANK}\n{line}\n"})


def base(name: str) -> Feature:
    return Feature("lora", {'base = "bf16"': f'base = "{name}"'}, library="optimum.quanto")


def checkpointing(mode: str, words: str) -> Feature:
    return Feature(mode, {"gradient_checkpointing = false": f"gradient_checkpointing = {words}"})


def clipping(method: str) -> Feature:
    return Feature("full", {"[train]": f'[train]\ngradient_clip = {{ method = "{method}", max = 1.0 }}'})


EVERY_2ND = "true\ngradient_checkpointing_interval = 2"
ROLLOUT = "\n[train.rollout]\nprobability = 0.25\n"
FEATURES = {
    "4 accumulated clips": Feature("full", {"[train]": "[train]\naccumulate = 4"}, clips=4),
    "4 accumulated clips, LoRA": Feature("lora", {"[train]": "[train]\naccumulate = 4"}, clips=4),
    "gradient clipping by norm": clipping("norm"),
    "gradient clipping by value": clipping("value"),
    "skip-and-count of steps that are not finite": Feature("full", {"[train]": "[train]\nskip_nonfinite = 10"}),
    "gradient and activation statistics": Feature("full", {"[train]": "[train]\nstatistics = true"}),
    "EMA": Feature("full", more="\n[ema]\n"),
    "EMA, every 10 steps": Feature("full", more="\n[ema]\nupdate_every = 10\n"),
    "EMA, LoRA": Feature("lora", more="\n[ema]\n"),
    "rollout of a quarter, 2 steps": Feature("full", more=ROLLOUT),
    "rollout of a quarter, 2 steps, LoRA": Feature("lora", more=ROLLOUT),
    "gradient checkpointing, every block": checkpointing("full", "true"),
    "gradient checkpointing, every 2nd block": checkpointing("full", EVERY_2ND),
    "gradient checkpointing, feed-forward": checkpointing("full", '"feed_forward"'),
    "gradient checkpointing, every block, LoRA": checkpointing("lora", "true"),
    "pure bf16, adamw_bf16": in_bf16("adamw_bf16"),
    "pure bf16, optimi-adamw": in_bf16("optimi-adamw", "optimi"),
    "adamw8bit": optimizer("adamw8bit", "bitsandbytes"),
    "muon": optimizer("muon"),
    "base int8": base("int8"),
    "base fp8": base("fp8"),
    "base int4": base("int4"),
    "DoRA": adapter("dora = true"),
    "rsLoRA": adapter("rslora = true"),
    "LoRA dropout": adapter("dropout = 0.1"),
    "layersync": Feature("full", more='\n[[regularizer]]\nuse = "layersync"\nstudent = 1\nteacher = 3\n'),
}
"""Name -> what turns it on. Statistics are of the steps that are logged: the last of a block, so one of 4 of the small model's."""


def missing(name: str) -> bool:
    """Whether the feature's library is not installed."""
    library = FEATURES[name].library
    return bool(library) and (find_spec(library.partition(".")[0]) is None or find_spec(library) is None)


@dataclass(frozen=True)
class Cost:
    """CPU-seconds for a clip, of a step of one without a feature, and with it, medians over blocks, and their ratio in pairs."""

    feature: str
    mode: str
    without: float
    with_it: float
    ratio: Ratio


def config_of(folder: Path, model: Model, name: str, steps: int, *, with_it: bool) -> Path:
    """The configuration with a feature, or what it is compared with. steps: of a block."""
    feature = FEATURES[name]
    place = f"{name}-{'with' if with_it else 'without'}-{model.name}".replace(" ", "-").replace(",", "")
    changes, more = (feature.changes, feature.more) if with_it else ({}, "")
    return write_config(folder, model, feature.mode, steps, place, more, changes)


def measure(folder: Path, model: Model, name: str, pairs: int, steps: int) -> Cost:
    """Pairs of blocks in turn, after one block of each to warm up."""
    feature = FEATURES[name]
    sides = {"without": 1, "with": feature.clips}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    with ExitStack() as stack:
        blocks = {}
        for side in sides:
            config = config_of(folder, model, name, steps, with_it=side == "with")
            fill(config)
            blocks[side] = stack.enter_context(vtrain_block(config))
            blocks[side]()
        for pair in range(pairs):
            for side in sorted(blocks, reverse=pair % 2 == 1):
                seconds[side].append(seconds_of(blocks[side], time.process_time) / (steps * sides[side]))
    gc.collect()
    without, with_it = (statistics.median(seconds[side]) for side in sides)
    return Cost(name, feature.mode, without, with_it, ratio(seconds["with"], seconds["without"], None))


def cost_table(found: list[Cost]) -> str:
    rows = [
        (each.feature, each.mode, f"{each.without:.4f}", f"{each.with_it:.4f}",
         f"{each.ratio.median:.3f} [{each.ratio.low:.3f}, {each.ratio.high:.3f}]")
        for each in found
    ]  # fmt: skip
    return table(("feature", "trained", "CPU-s a clip without", "with", "ratio, 95% interval"), rows)


def before(path: Path | None, model: Model) -> dict[str, Cost]:
    """What earlier calls have measured, by feature. Raises SystemExit where that was another model, or another machine."""
    if path is None or not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if (content["model"], content["machine"]) != (model.name, machine()):
        raise SystemExit(f"{path} is of another model, machine or version: name another file")
    costs = [Cost(**{**each, "ratio": Ratio(**each["ratio"])}) for each in content["features"]]
    return {each.feature: each for each in costs if each.feature in FEATURES}


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
        known = before(chosen.json, model)
        for name in chosen.features:
            if missing(name):
                say(f"{name}: {FEATURES[name].library} is not installed")
                continue
            known[name] = measure(folder, model, name, chosen.pairs, chosen.steps or STEPS[model.name])
            say(f"{name}: {known[name].ratio}")
            found = [asdict(known[each]) for each in FEATURES if each in known]
            write_json(chosen.json, {"model": model.name, "features": found})
    told = cost_table([known[each] for each in FEATURES if each in known])
    say("\n" + told)
    if chosen.write:
        where = "; ".join(f"{name} {value}" for name, value in machine().items())
        put(PAGE, "features", f"Measured on {datetime.now(UTC):%Y-%m-%d}, model {model.name}: {where}.\n\n{told}\n")


if __name__ == "__main__":
    main()
