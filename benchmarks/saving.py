"""For how long a checkpoint stops training: until it is copied, against safetensors' own save_file of the same tensors.

    python benchmarks/saving.py [--model small] [--pairs 8] [--json FILE]

Full training of step.py's model, its weights and AdamW's moments, in wall seconds; nothing else runs. What stops a run is
`Saver.save`, which copies; the thread that writes is waited for before the next turn. save_file writes one file, and syncs nothing.
The last column is the whole way to a checkpoint that is synced, read back and sealed, which nobody waits for.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from report import Ratio, ratio, say, say_machine, table, write_json
from safetensors.torch import save_file
from step import assembled
from workload import MODELS, fill
from works import config_of

LIMIT = 0.2


def measured(folder: Path, model: str, pairs: int) -> tuple[Ratio, list[float], list[float], list[float], int]:
    """(ratio, seconds until training continues, of save_file, until the checkpoint is there, bytes)."""
    from vtrain.run.inbox import Inbox
    from vtrain.train.saving import Saver

    config = config_of(folder, MODELS[model], "full", log_every=1, name="saving")
    fill(config)
    trainer = assembled(config)
    events = trainer.run(Inbox())
    next(event for event in events if type(event).__name__ == "Logged")  # one step: the moments are there
    saver = Saver(folder / "checkpoints", 1, trainer.processes, beside=True)
    tensors = {
        f"{piece.name}.{name}": value
        for piece in trainer.pieces
        for name, value in piece.gather(keep=True).tensors.items()
    }
    stopped, plain, whole = [], [], []
    for turn in range(pairs + 1):  # the first of each warms up
        started = time.perf_counter()
        list(saver.save(turn + 1, trainer.pieces, now=False))
        stopped.append(time.perf_counter() - started)
        assert saver.writing, "nothing was left for a thread"
        list(saver.settle())
        whole.append(time.perf_counter() - started)
        started = time.perf_counter()
        save_file(tensors, folder / "plain.safetensors")
        plain.append(time.perf_counter() - started)
    saver.close()
    events.close()  # type: ignore[attr-defined]
    size = sum(value.nbytes for value in tensors.values())
    return ratio(stopped[1:], plain[1:], LIMIT), stopped[1:], plain[1:], whole[1:], size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    say_machine()
    with tempfile.TemporaryDirectory() as folder:
        found, stopped, plain, whole, size = measured(Path(folder), asked.model, asked.pairs)
    middle = [f"{sorted(times)[len(times) // 2]:.3f}" for times in (stopped, plain, whole)]
    heads = ("model", "MiB", "training stops, s", "save_file, s", "ratio, 95% interval", "until it is sealed, s")
    say(table(heads, [(asked.model, f"{size / 2**20:.0f}", middle[0], middle[1], str(found), middle[2])]))
    if asked.json:
        write_json(asked.json, {"stopped": stopped, "save_file": plain, "sealed": whole, "bytes": size})


if __name__ == "__main__":
    main()
