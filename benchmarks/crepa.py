"""A training step with CREPA against the same step without it: CPU-seconds and peak memory, for every kind of teacher.

    python benchmarks/crepa.py [--quick] [--rounds 16] [--json FILE]

In one process, blocks of steps of four runs take turns, and which comes first changes with every round: without CREPA;
with features from the cache; with features made at each step from the latents, decoded; and from the source's own
frames. Each is the real thing, from a config file. The teacher is DINOv2-small (22 M parameters) of random weights:
what it costs does not depend on their values. Its size is "match", a patch for each token. CPU-seconds count all
threads, and processes that decode. Peak memory is of processes of their own, the caches being filled before.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and numpy start their threads

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from measured import put
from report import Ratio, machine, ratio, say, say_machine, table, write_json
from step import Block, peak_bytes, vtrain_block
from workload import MODELS, MODES, Model, fill, write_config

LIMITS: Mapping[str, float | None] = {"cached": 1.05, "decoded": None, "source": None}
"""Side -> what its ratio to the step without CREPA is held to."""
NONE = "none"
SIDES = (NONE, *LIMITS)
PAGE = Path(__file__).with_name("README.md")
ROUNDS, STEPS = 16, 4
"""By default: how often each side has its turn, and of how many steps."""
RSS_ROUNDS, RSS_STEPS = 3, 4

ENCODERS = {
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "tiny": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
}
"""Model -> its encoder: DINOv2-small, and one to see that the script works."""

CREPA = """
[[regularizer]]
use = "crepa"
block = {block}
encoder = "{encoder}"
{teacher}
"""
TEACHERS = {
    "cached": 'teacher = "cached"',
    "decoded": 'teacher = "online"\nonline_from = "latents"\ndrop_vae_encoder = true',
    "source": 'teacher = "online"\nonline_from = "source"',
}


@dataclass(frozen=True)
class Timed:
    """A side of a mode: medians over rounds, of a step, and the ratio of CPU-seconds to the side without CREPA."""

    model: str
    mode: str
    side: str
    cpu: float
    wall: float
    ratio: Ratio | None


@dataclass(frozen=True)
class Memory:
    """Peak resident bytes of a side, median over processes, and its ratio to the side without CREPA."""

    model: str
    mode: str
    side: str
    peak: int
    ratio: Ratio | None


def encoder(folder: Path, model: Model) -> Path:
    """A DINOv2 of random weights, unless it is there: small, and beside the tiny model a tiny one."""
    made = folder / f"dinov2-{model.name}-random"
    if not (made / "config.json").exists():
        from transformers import Dinov2Config, Dinov2Model

        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**ENCODERS[model.name], image_size=518, patch_size=14)).save_pretrained(made)
    return made


def config_of(folder: Path, model: Model, mode: str, side: str, steps: int, kind: str) -> Path:
    """The config file of a side, its caches filled."""
    more = ""
    if side != NONE:
        more = CREPA.format(block=model.layers // 2, encoder=encoder(folder, model).as_posix(), teacher=TEACHERS[side])
    config = write_config(folder, model, mode, steps, f"{kind}-{model.name}-{mode}-{side}", more)
    fill(config)
    return config


def spent() -> float:
    """CPU-seconds of this process and of those that it has started and that run."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        try:
            used = child.cpu_times()
        except psutil.Error:
            continue
        total += used.user + used.system
    return total


def timed(block: Block, steps: int) -> tuple[float, float]:
    """(CPU-seconds, wall seconds) of a step."""
    cpu, wall = spent(), time.perf_counter()
    loss = block()
    assert loss == loss, "the loss is not a number"
    return (spent() - cpu) / steps, (time.perf_counter() - wall) / steps


def measure_time(folder: Path, model: Model, mode: str, sides: list[str], rounds: int, steps: int) -> list[Timed]:
    """Blocks of all sides in turn, after one of each to warm up."""
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    with ExitStack() as stack:
        blocks = {
            side: stack.enter_context(vtrain_block(config_of(folder, model, mode, side, steps, "time")))
            for side in sides
        }
        for block in blocks.values():
            block()
        for number in range(rounds):
            for place in range(len(sides)):
                side = sides[(place + number) % len(sides)]
                found[side].append(timed(blocks[side], steps))
    cpu = {side: [each for each, _ in pairs] for side, pairs in found.items()}
    return [
        Timed(
            model.name,
            mode,
            side,
            statistics.median(cpu[side]),
            statistics.median(wall for _, wall in found[side]),
            None if side == NONE else ratio(cpu[side], cpu[NONE], LIMITS[side]),
        )
        for side in sides
    ]


def run_side(folder: Path, model: Model, mode: str, side: str, steps: int) -> int:
    """One block of one side alone. Gives this process's peak resident bytes."""
    with vtrain_block(config_of(folder, model, mode, side, steps, f"rss-{os.getpid()}")) as block:
        block()
    return peak_bytes()


def measure_memory(folder: Path, model: Model, mode: str, sides: list[str], rounds: int, steps: int) -> list[Memory]:
    """Processes of their own, in turn."""
    peaks: dict[str, list[int]] = {side: [] for side in sides}
    for side in sides:
        config_of(folder, model, mode, side, steps, "rss")
    for number in range(rounds):
        for place in range(len(sides)):
            side = sides[(place + number) % len(sides)]
            command = [
                sys.executable, __file__, "--rss", "--sides", side, "--folder", str(folder), "--model", model.name,
                "--modes", mode, "--steps", str(steps),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
            peaks[side].append(json.loads(done.stdout.splitlines()[-1]))
    return [
        Memory(
            model.name,
            mode,
            side,
            int(statistics.median(peaks[side])),
            None if side == NONE else ratio(peaks[side], peaks[NONE], LIMITS[side]),
        )
        for side in sides
    ]


def time_table(found: list[Timed]) -> str:
    rows = [(t.model, t.mode, t.side, f"{t.cpu:.4f}", f"{t.wall:.4f}", str(t.ratio or "")) for t in found]
    return table(("model", "trained", "CREPA", "CPU-s/step", "wall s/step", "CPU by that without, 95% interval"), rows)


def memory_table(found: list[Memory]) -> str:
    rows = [(m.model, m.mode, m.side, f"{m.peak / 2**20:.0f}", str(m.ratio or "")) for m in found]
    return table(("model", "trained", "CREPA", "peak MiB", "by that without, 95% interval"), rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny model, few rounds: to see that the script works")
    parser.add_argument("--model", choices=ENCODERS, help="(default: small)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, help=f"of blocks; 0: none (default: {ROUNDS})")
    parser.add_argument("--steps", type=int, help=f"of a block (default: {STEPS})")
    parser.add_argument("--rss-rounds", type=int, help=f"of processes for peak memory; 0: none (default: {RSS_ROUNDS})")
    parser.add_argument("--folder", type=Path, help="where checkpoints and caches go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.parent.name}/{PAGE.name}")
    parser.add_argument("--rss", action="store_true", help="one block of one of --sides alone; prints its peak bytes")
    chosen = parser.parse_args()
    if not chosen.rss and NONE not in chosen.sides:
        parser.error(f'--sides needs "{NONE}", to which the others are compared')
    return chosen


def main() -> None:
    chosen = arguments()
    torch.set_num_threads(1)
    model = MODELS[chosen.model or ("tiny" if chosen.quick else "small")]
    rounds = chosen.rounds if chosen.rounds is not None else (2 if chosen.quick else ROUNDS)
    steps = chosen.steps or (2 if chosen.quick else STEPS)
    rss_rounds = chosen.rss_rounds if chosen.rss_rounds is not None else (1 if chosen.quick else RSS_ROUNDS)
    with ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vtrain-crepa-")))
        folder.mkdir(parents=True, exist_ok=True)
        if chosen.rss:
            say(json.dumps(run_side(folder, model, chosen.modes[0], chosen.sides[0], steps)))
            return
        say_machine()
        times: list[Timed] = []
        for mode in chosen.modes if rounds else ():
            times += measure_time(folder, model, mode, chosen.sides, rounds, steps)
        if times:
            say(time_table(times))
        memory: list[Memory] = []
        for mode in chosen.modes if rss_rounds else ():
            memory += measure_memory(folder, model, mode, chosen.sides, rss_rounds, RSS_STEPS)
        if memory:
            say("\n" + memory_table(memory))
        if chosen.write:
            told = "; ".join(f"{name} {value}" for name, value in machine().items())
            found = ([time_table(times)] if times else []) + ([memory_table(memory)] if memory else [])
            tables = "\n\n".join(found)
            put(PAGE, "crepa", f"Measured on {datetime.now(UTC):%Y-%m-%d}: {told}.\n\n{tables}\n")
        write_json(chosen.json, {"time": [asdict(each) for each in times], "memory": [asdict(each) for each in memory]})


if __name__ == "__main__":
    main()
