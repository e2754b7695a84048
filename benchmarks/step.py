"""vtrain's training step against a bare torch + diffusers loop, in CPU-seconds on one thread, and their peak memory.

Both sides train the same checkpoint on the same cached clips with the same optimizer. In one process, blocks of N steps
of the bare loop (bare.py) and of vtrain take turns, and which comes first changes with every pair. The bare loop has
its batches in memory; vtrain is the real thing, from a config file: it reads caches, draws noise per sample, logs,
writes metrics. CPU-seconds count all threads of the process, vtrain's feeding thread too. Peak memory is the maximum
resident size of a process of its own for each side.

Modes beside full training and LoRA: four accumulated clips a step; an average of the weights (EMA), which the bare loop keeps with
torch._foreach_lerp_; and bf16 weights, by stochastic rounding and by Kahan summation, for which both sides have the very same
optimizer (vtrain_builtin's), so that the loops alone are compared.

A last row compares vtrain with itself: with listeners (TensorBoard, one that raises, one that hangs, one that prints) and
without.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and numpy start their threads

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from report import Ratio, ratio, say, say_machine, table, write_json
from workload import MODELS, MODES, RANK, Model, fill, read_samples
from works import LR, WORKS, config_of, same_optimizer

from vtrain.contract import Event, RunInfo

if TYPE_CHECKING:
    from vtrain.contract import Tracker
    from vtrain.run.listeners import Listeners
    from vtrain.train.assemble import Trainer

TIME_LIMITS = {"small": 1.02, "tiny": 1.10, "wan-small": 1.02, "wan-tiny": 1.10}
MEMORY_LIMIT = 1.05
LISTENERS_LIMIT = 1.01
STEPS = {"small": 4, "tiny": 40, "wan-small": 4, "wan-tiny": 40}
"""Of one block, by default."""

RSS_STEPS = 8
RSS_PAIRS = 3

Block = Callable[[], float]
"""Runs one block of steps and gives the last loss, or the mean of those logged."""


@dataclass(frozen=True)
class Timed:
    """A workload's CPU-seconds per step, medians over blocks, and their ratio in pairs."""

    model: str
    mode: str
    bare: float
    vtrain: float
    ratio: Ratio


@dataclass(frozen=True)
class Memory:
    """A workload's peak resident bytes, medians over processes, and their ratio in pairs."""

    model: str
    mode: str
    bare: int
    vtrain: int
    ratio: Ratio


@dataclass(frozen=True)
class Listening:
    """A workload's seconds per step without and with listeners, medians over blocks, and their ratio in pairs.

    On the clock: who waits takes no CPU.
    """

    model: str
    mode: str
    without: float
    listening: float
    ratio: Ratio


class OddTracker:
    """A tracker that asks for everything and does as it likes with it."""

    events = (Event,)

    def __init__(self, does: Callable[[], None]) -> None:
        self._does = does

    def start(self, run: RunInfo, saved: Mapping[str, Any]) -> None:
        pass

    def show(self, event: Event) -> None:
        self._does()

    def state(self) -> Mapping[str, Any]:
        return {}

    def finish(self) -> None:
        pass


def odd_listeners(output: Path, sink: TextIO) -> Listeners:
    """TensorBoard, one that raises, one that hangs, one that prints to `sink`."""
    from vtrain.run.listeners import Listeners
    from vtrain_builtin.tensorboard import TENSORBOARD

    trackers: list[tuple[str, str, Callable[[], Tracker]]] = [
        ("0", "tensorboard", lambda: TENSORBOARD.build(TENSORBOARD.options())),
        ("1", "fails", lambda: OddTracker(lambda: 1 // 0)),  # type: ignore[arg-type,return-value]
        ("2", "hangs", lambda: OddTracker(lambda: time.sleep(1e6))),
        ("3", "prints", lambda: OddTracker(lambda: print("a line", file=sink))),
    ]
    return Listeners(trackers, RunInfo("run", str(output), {}, 0), {})


def assembled(config: Path) -> Trainer:
    """A run as `vtrain run` puts it together."""
    from vtrain.data.caching.caches import fill_caches
    from vtrain.data.scanning.scan import scan
    from vtrain.estimate.estimate import make_estimate
    from vtrain.run.prepare import planned
    from vtrain.train.assemble import assemble
    from vtrain.train.processes import Processes
    from vtrain.train.resume import find_start

    plan = planned(config)
    processes = Processes(plan.config.precision.mixed)
    found = scan(plan)
    filled = fill_caches(plan, found.samples, [], str(processes.device), lambda _: None)
    plan.config.run.output_dir.mkdir(parents=True, exist_ok=True)
    estimate, start = make_estimate(plan, found.survey), find_start(plan)
    return assemble(plan, estimate, start, filled.index, filled.caches, processes)


@contextmanager
def vtrain_block(config: Path, *, listening: bool = False) -> Iterator[Block]:
    """A run as `vtrain run` starts it, without a terminal; each block runs to the next log line.

    listening: with listeners, else without any.
    """
    from vtrain.contract import Logged
    from vtrain.run.inbox import Inbox
    from vtrain.run.output import Recorder

    trainer = assembled(config)
    plan = trainer.plan
    recorder = Recorder(plan.config.run.output_dir)
    recorder.begin(trainer.start.state.step)
    events = trainer.run(Inbox())

    listeners: Listeners | None = None

    def block() -> float:
        for event in events:
            assert list(recorder.record(event)) == [], "a file could not be written"
            if listeners is not None:
                listeners.show(event)
            if isinstance(event, Logged):
                break
        assert isinstance(event, Logged)
        assert len(event.steps) == plan.config.train.log_every
        return statistics.fmean(each.loss for each in event.steps)

    try:
        with Path(os.devnull).open("w", encoding="utf-8") as sink:
            if listening:
                listeners = odd_listeners(plan.config.run.output_dir, sink)
            yield block
    finally:
        events.close()  # type: ignore[attr-defined]


@contextmanager
def bare_block(config: Path, model: Model, mode: str, steps: int) -> Iterator[Block]:
    """The bare loop on the samples that vtrain cached for `config`."""
    import bare

    work, family, samples = WORKS[mode], bare.FAMILIES[model.use], read_samples(config, model)
    checkpoint = model.build(config.parent)
    net = bare.prepare(
        family, family.load(checkpoint / "transformer", work.dtype), RANK if work.mode == "lora" else None
    )
    optimizer = same_optimizer(net, work.optimizer) if work.optimizer else bare.adamw(net, LR)
    given = [bare.Sample(*sample) for sample in samples]
    losses = bare.train(family, net, optimizer, given, accumulate=work.accumulate, average=work.average)

    def block() -> float:
        for _ in range(steps):
            loss = next(losses)
        return float(loss)

    yield block


def seconds_of(block: Block, clock: Callable[[], float]) -> float:
    before = clock()
    loss = block()
    seconds = clock() - before
    assert loss == loss, "the loss is not a number"
    return seconds


def measure_time(folder: Path, model: Model, mode: str, pairs: int, steps: int) -> Timed:
    """Pairs of blocks in turn, after one block of each to warm up."""
    config = config_of(folder, model, mode, log_every=steps, name=f"time-{model.name}-{mode}")
    fill(config)
    seconds: dict[str, list[float]] = {"bare": [], "vtrain": []}
    with ExitStack() as stack:
        blocks = {
            "bare": stack.enter_context(bare_block(config, model, mode, steps)),
            "vtrain": stack.enter_context(vtrain_block(config)),
        }
        for block in blocks.values():
            block()
        for pair in range(pairs):
            for side in sorted(blocks, reverse=pair % 2 == 1):
                seconds[side].append(seconds_of(blocks[side], time.process_time) / steps)
    gc.collect()
    bare, vtrain = (statistics.median(seconds[side]) for side in ("bare", "vtrain"))
    return Timed(model.name, mode, bare, vtrain, ratio(seconds["vtrain"], seconds["bare"], TIME_LIMITS[model.name]))


def measure_listeners(folder: Path, model: Model, mode: str, pairs: int, steps: int) -> Listening:
    """Pairs of blocks in turn, after one block of each to warm up."""
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    with ExitStack() as stack:
        blocks = {}
        for side in seconds:
            config = config_of(folder, model, mode, log_every=steps, name=f"listeners-{side}-{model.name}-{mode}")
            fill(config)
            blocks[side] = stack.enter_context(vtrain_block(config, listening=side == "with"))
            blocks[side]()
        for pair in range(pairs):
            for side in sorted(blocks, reverse=pair % 2 == 1):
                seconds[side].append(seconds_of(blocks[side], time.perf_counter) / steps)
    gc.collect()
    without, with_them = (statistics.median(seconds[side]) for side in ("without", "with"))
    return Listening(model.name, mode, without, with_them, ratio(seconds["with"], seconds["without"], LISTENERS_LIMIT))


def run_side(folder: Path, model: Model, mode: str, side: str, steps: int) -> int:
    """One block on one side alone. Gives this process's peak resident bytes."""
    config = config_of(folder, model, mode, log_every=steps, name=f"rss-{model.name}-{mode}-{os.getpid()}")
    with vtrain_block(config) if side == "vtrain" else bare_block(config, model, mode, steps) as block:
        block()
    return peak_bytes()


def peak_bytes() -> int:
    """This process's peak resident size. Linux's VmHWM: ru_maxrss also counts the parent's memory at the fork."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def measure_memory(folder: Path, model: Model, mode: str, pairs: int, steps: int) -> Memory:
    """Processes of their own, in turn."""
    config = config_of(folder, model, mode, log_every=steps, name=f"rss-{model.name}-{mode}")
    fill(config)
    read_samples(config, model)
    peaks: dict[str, list[int]] = {"bare": [], "vtrain": []}
    options = ["--folder", str(folder), "--models", model.name, "--modes", mode, "--steps", str(steps)]
    for pair in range(pairs):
        for side in sorted(peaks, reverse=pair % 2 == 1):
            command = [sys.executable, __file__, "--rss", "--side", side, *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
            peaks[side].append(json.loads(done.stdout.splitlines()[-1]))
    bare, vtrain = (int(statistics.median(peaks[side])) for side in ("bare", "vtrain"))
    return Memory(model.name, mode, bare, vtrain, ratio(peaks["vtrain"], peaks["bare"], MEMORY_LIMIT))


def time_table(found: list[Timed]) -> str:
    return table(
        ("model", "trained", "bare CPU-s/step", "vtrain CPU-s/step", "ratio, 95% interval"),
        [(each.model, each.mode, f"{each.bare:.4f}", f"{each.vtrain:.4f}", str(each.ratio)) for each in found],
    )


def memory_table(found: list[Memory]) -> str:
    return table(
        ("model", "trained", "bare peak MiB", "vtrain peak MiB", "ratio, 95% interval"),
        [
            (each.model, each.mode, f"{each.bare / 2**20:.0f}", f"{each.vtrain / 2**20:.0f}", str(each.ratio))
            for each in found
        ],
    )


def listeners_table(found: list[Listening]) -> str:
    return table(
        ("model", "trained", "s/step, no listener", "s/step, four listeners", "ratio, 95% interval"),
        [(each.model, each.mode, f"{each.without:.4f}", f"{each.listening:.4f}", str(each.ratio)) for each in found],
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24, help="pairs of blocks for each workload (default: 24)")
    parser.add_argument("--steps", type=int, help=f"steps of a block (default: {STEPS})")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=WORKS, default=list(MODES), help="(default: full lora)")
    parser.add_argument("--rss-pairs", type=int, default=RSS_PAIRS, help="pairs of processes for peak memory; 0: none")
    parser.add_argument("--folder", type=Path, help="where checkpoints and caches go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--rss", action="store_true", help="one block of one --side alone; prints its peak bytes")
    parser.add_argument("--side", choices=("bare", "vtrain"), default="vtrain", help="with --rss")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vtrain-step-")))
        folder.mkdir(parents=True, exist_ok=True)
        works = [(MODELS[model], mode) for model in chosen.models for mode in chosen.modes]
        if chosen.rss:
            say(json.dumps(run_side(folder, *works[0], chosen.side, chosen.steps or RSS_STEPS)))
            return
        say_machine()
        timed = [measure_time(folder, m, mode, chosen.pairs, chosen.steps or STEPS[m.name]) for m, mode in works]
        say(time_table(timed))
        listening = [
            measure_listeners(folder, m, mode, chosen.pairs, chosen.steps or STEPS[m.name]) for m, mode in works[:1]
        ]
        say("\n" + listeners_table(listening))
        memory = [
            measure_memory(folder, m, mode, chosen.rss_pairs, chosen.steps or RSS_STEPS)
            for m, mode in works
            if chosen.rss_pairs
        ]
        if memory:
            say("\n" + memory_table(memory))
        found = {"time": timed, "listeners": listening, "memory": memory}
        write_json(chosen.json, {name: [asdict(each) for each in rows] for name, rows in found.items()})


if __name__ == "__main__":
    main()
