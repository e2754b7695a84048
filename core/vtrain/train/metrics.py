"""metrics.jsonl: one line for each optimizer step, cut back to the checkpoint when a run goes on from one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Row:
    """One optimizer step.

    step: 1-based. loss: flow loss plus terms, mean over the step's micro-batches; flow_loss: without terms.
    grad_norm: before clipping; None on steps where it was not read. sigmas, samples: in draw order over all processes.
    terms: regularizers' numbers. seconds: wall time of a step, mean since the last reading; data_wait: seconds of it in
    which the step waited for its data, on the slowest process; memory: resident bytes on a CPU, peak bytes on a device.
    These three differ between runs; all else is the same when a run is resumed.
    """

    step: int
    epoch: float
    loss: float
    flow_loss: float
    lr: float
    grad_norm: float | None
    sigmas: list[float | list[float]]
    samples: list[str]
    seconds: float
    data_wait: float
    memory: int
    terms: Mapping[str, float] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """What trackers plot."""
        values = {"loss": self.loss, "flow_loss": self.flow_loss, "lr": self.lr, "epoch": self.epoch}
        if self.grad_norm is not None:
            values["grad_norm"] = self.grad_norm
        return (
            values
            | dict(self.terms)
            | {
                "step_seconds": self.seconds,
                "data_wait_seconds": self.data_wait,
                "memory_gib": self.memory / 2**30,
            }
        )


def append(folder: Path, rows: Iterable[Row]) -> None:
    """Add rows to the file and sync it. Raises OSError, the file then being as it was."""
    with (folder / FILE).open("ab") as file:
        before = file.tell()
        try:
            file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.truncate(folder / FILE, before)
            raise


def cut_back(folder: Path, step: int) -> int:
    """Drop the lines after `step`, and a torn last one. Gives how many whole steps were dropped."""
    path = folder / FILE
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            number = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if number <= step:
            kept.append(line if line.endswith("\n") else line + "\n")
        else:
            dropped += 1
    aside = path.with_suffix(".jsonl.partial")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)
    return dropped


def read(folder: Path) -> list[dict[str, object]]:
    """All lines of the file; [] when there is none."""
    path = folder / FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
