"""Several processes: what exchanging costs in time, and what each keeps in memory when weights are shared out.

    python benchmarks/processes.py [--model small] [--counts 2 4] [--pairs 5] [--memory-only] [--json FILE]

Time: wall seconds of a step of full training, two processes of one thread (DDP, then [parallel] shard) against one process of two
threads with twice the accumulation, whole runs in turn. Memory: bytes of all tensors that are there at once in a step, counted
after each operator as their storages are then (FSDP2 empties and fills them), of each process, against its ideal share of weights,
gradients and AdamW's moments.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

from report import Ratio, ratio, say, say_machine, table, write_json
from step import assembled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from workload import MODELS, fill, write_config

STEPS = 6
"""Of a timed run; the first two warm up."""
SHARD = "\n[parallel]\nshard = true\n"
RECOMPUTED = {"gradient_checkpointing = false": "gradient_checkpointing = true"}
"""So that what a block computes is small beside its weights."""


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own is untyped
    """Bytes of all storages that operators have given and that are still there, as large as each is then. most: at once, while it
    is counting."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, Any] = {}
        self.counting, self.most = False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it calls operators of its own, on this process's tensors
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, made)
        if self.counting:
            self.most = max(self.most, self.now())
        return made

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._storages and tensor.device.type == "cpu":
            self._storages[key] = weakref.ref(storage, lambda _: self._storages.pop(key, None))
        return tensor

    def now(self) -> int:
        return sum(found.nbytes() for each in list(self._storages.values()) if (found := each()) is not None)


def child(config: Path, out: Path) -> None:
    """One process of a run of three steps: what its largest step had in memory at once."""
    from vtrain.contract import Stepped
    from vtrain.run.inbox import Inbox

    with Live() as live:
        trainer = assembled(config)
        blocks = trainer.denoiser.blocks
        events = trainer.run(Inbox())
        for event in events:
            if isinstance(event, Stepped) and event.step == 2:
                live.counting = True  # now that all moments are there
            if isinstance(event, Stepped) and event.step == 3:
                break
        of_blocks = [sum(weight.numel() for weight in block.parameters()) for block in blocks]
        numbers = sum(weight.numel() for weight in trainer.denoiser.module.parameters())
        counted = {"most": live.most, "numbers": numbers, "block": max(of_blocks), "rest": numbers - sum(of_blocks)}
        (out / f"{trainer.processes.rank}.json").write_text(json.dumps(counted))
        events.close()  # type: ignore[attr-defined]
        trainer.processes.close()


def start(count: int, *arguments: str | Path) -> None:
    """A Python script, in so many processes of an even number of threads. Raises CalledProcessError."""
    alone = [sys.executable, *map(str, arguments)]
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    env = {**os.environ, "OMP_NUM_THREADS": threads, "ACCELERATE_USE_CPU": "1"}
    command = alone if count == 1 else [*launched, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout[-2000:] + done.stderr[-4000:])
        done.check_returncode()


def memory(folder: Path, model: str, count: int) -> dict[str, int]:
    """most: bytes of the process that had most. numbers: of the model. block: of its largest block. rest: in no block."""
    more = SHARD if count > 1 else ""
    config = write_config(folder, MODELS[model], "full", 1, f"memory-{count}", more, RECOMPUTED)
    out = folder / f"counted-{count}"
    out.mkdir()
    start(count, __file__, "--child", config, out)
    found = [json.loads(file.read_text()) for file in sorted(out.iterdir())]
    assert len(found) == count
    return max(found, key=lambda each: each["most"])


def seconds(folder: Path, model: str, name: str, count: int, more: str) -> float:
    """Of a step of a new run: the median of those that were no warm-up."""
    changes = {"steps = 1000000": f"steps = {STEPS}\naccumulate = {2 // count}"}
    config = write_config(folder, MODELS[model], "full", 1, name, more, changes)
    start(count, "-m", "vtrain.cli", "run", config)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["seconds"] for row in rows[2:])


def timed(folder: Path, model: str, pairs: int) -> dict[str, tuple[Ratio, list[float], list[float]]]:
    """DDP and shares: (ratio to one process, its seconds, theirs)."""
    found: dict[str, list[float]] = {"one": [], "DDP": [], "shares": []}
    for turn in range(pairs):
        for name, count, more in (("one", 1, ""), ("DDP", 2, ""), ("shares", 2, SHARD)):
            found[name].append(seconds(folder, model, f"{name}-{turn}", count, more))
    one = found.pop("one")
    return {name: (ratio(took, one, None), one, took) for name, took in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(*asked.child)
        return
    say_machine()
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(write_config(folder, MODELS[asked.model], "full", 1))
        rows = {count: memory(folder, asked.model, count) for count in (1, *asked.counts)}
        numbers["memory"] = rows
        say(memory_table(asked.model, rows))
        if not asked.memory_only:
            times = timed(folder, asked.model, asked.pairs)
            numbers["seconds"] = {kind: {"one": one, "two": two} for kind, (_, one, two) in times.items()}
            heads = ("model", "two processes", "one, s/step", "two, s/step", "ratio, 95% interval")
            lines = [
                (asked.model, kind, f"{statistics.median(one):.2f}", f"{statistics.median(two):.2f}", str(found))
                for kind, (found, one, two) in times.items()
            ]
            say("\n" + table(heads, lines))
    if asked.json:
        write_json(asked.json, numbers)


def memory_table(model: str, rows: dict[int, dict[str, int]]) -> str:
    """States: weights, gradients and two moments, 16 bytes a number. Beside them alone lies what is computed, here of a block."""
    states, block = 16 * rows[1]["numbers"], 4 * rows[1]["block"]
    computed = rows[1]["most"] - states
    beside = "beside both share and what is computed, in weights of a block"
    heads = ("model", "processes", "ideal share, MiB", "most at once, MiB", "ratio", beside)
    lines = [
        (
            model, str(count), f"{states / count / 2**20:.0f}", f"{row['most'] / 2**20:.0f}",
            f"{row['most'] / (states / count):.2f}", f"{(row['most'] - states / count - computed) / block:.2f}",
        )
        for count, row in rows.items()
    ]  # fmt: skip
    return table(heads, lines)


if __name__ == "__main__":
    main()
