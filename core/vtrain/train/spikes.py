"""Loss spikes: a step whose flow loss lies far above what steps at the same noise levels had.

At batch 1 the flow loss varies tenfold from step to step by its noise level alone, so that a plain limit on it finds nothing or
cries at every third step. What is expected of a clip is the median loss of the clips whose noise levels were nearest to its own,
of the last ones; what is left of the step's loss is judged by how widely it usually scatters (median absolute deviation).
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vtrain.contract import LossSpike, Problem, StepMetrics, StepSkipped, TrainingError
from vtrain.plan.records import Plan
from vtrain.train.checkpoint import read_model
from vtrain.train.piece import Copies, Keep, State
from vtrain.train.readings import Failure, clip_texts
from vtrain.train.resume import MOST, Start

CLIPS, NEAREST = 256, 15
"""Clips that are remembered, and how many of them, by noise level, say what another is expected to have."""

STEPS, LEAST = 128, 48
"""Steps whose deviations are remembered, and how many there must be before anything is called a spike."""

TIMES, DEVIATIONS = 2.5, 8.0
"""A spike has at least so many times the expected loss, and lies so many robust standard deviations above it."""

QUIET = 50
"""Steps after a spike in which no other is told."""

_NORMAL = 1.4826
"""Of a normal distribution: its standard deviation by its median absolute deviation."""

_SCATTER = 0.05
"""The least scatter that is believed, in logarithms: at a fixed level and clip there would be none."""


class LossWatch:
    """Follows a run's steps in order; what it knows is a function of them alone, however they are read."""

    def __init__(self, hint: str = "") -> None:
        """hint: what its text says of a likely cause."""
        self.hint = hint
        self.clips: deque[tuple[float, float]] = deque(maxlen=CLIPS)
        """(noise level, logarithm of the flow loss)."""
        self.deviations: deque[float] = deque(maxlen=STEPS)
        self.last = -QUIET
        """The step of the last spike that was told."""

    def see(self, row: StepMetrics) -> Iterator[LossSpike]:
        """The next step; a spike if it is one. Steps without finite losses above 0 are passed over."""
        losses = row.clip_losses
        if not losses or not all(math.isfinite(loss) and loss > 0 for loss in losses):
            return
        levels = [max(each) if isinstance(each, list) else each for each in row.sigmas]
        if len(self.clips) >= NEAREST:
            expected = self.expected(levels)
            deviation = math.log(row.flow_loss / expected)
            if self.is_spike(deviation) and row.step - self.last > QUIET:
                self.last = row.step
                yield self.spike(row, expected)
            self.deviations.append(deviation)
        self.clips.extend(zip(levels, map(math.log, losses), strict=True))

    def expected(self, levels: list[float]) -> float:
        """Mean flow loss of clips at these levels, by the last ones."""
        known, logs = np.array(self.clips).T
        nearest = np.argsort(np.abs(np.array(levels)[:, None] - known), axis=1, kind="stable")[:, :NEAREST]
        return float(np.exp(np.median(logs[nearest], axis=1)).mean())

    def is_spike(self, deviation: float) -> bool:
        """deviation: logarithm of a step's loss over what was expected."""
        if len(self.deviations) < LEAST or deviation < math.log(TIMES):
            return False
        before = np.array(self.deviations)
        centre = float(np.median(before))
        scatter = max(_SCATTER, _NORMAL * float(np.median(np.abs(before - centre))))
        return deviation - centre > DEVIATIONS * scatter

    def spike(self, row: StepMetrics, expected: float) -> LossSpike:
        times = row.flow_loss / expected
        clips = ", ".join(clip_texts(row.samples, row.sigmas))
        text = (
            f"loss spike at step {row.step}: the flow loss is {row.flow_loss:.4g}, {times:.1f} times the {expected:.4g} of "
            f"earlier steps at its noise levels; samples: {clips}{self.hint}"
        )
        sigmas = tuple(tuple(each) if isinstance(each, list) else each for each in row.sigmas)
        return LossSpike(row.step, row.flow_loss, expected, tuple(row.samples), sigmas, text)


# -- steps that are not taken --------------------------------------------------------------------------------------------


class Skipped:
    """How many steps were not taken, because a loss or gradient was not finite. limit: how many may be; None: none is skipped."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.count = limit, 0


def skipped_step(failure: Failure, skipped: Skipped) -> StepSkipped:
    """The event of one more."""
    limit = skipped.limit or 0
    samples = tuple(dict.fromkeys(name for each in failure.broken() for name in each.samples))
    what = failure.error.problems[0].what.split(" Or the step before")[0]
    text = f"step {failure.step} skipped ({skipped.count} of at most {limit}): {what}"
    return StepSkipped(failure.step, skipped.count, limit, samples, text)


def too_many(failure: Failure, count: int) -> TrainingError:
    """The error of one that may not be skipped any more. count: how many steps were not finite, with it."""
    (problem,) = failure.error.problems
    what = f"{problem.what} {count} steps were not finite, and train.skip_nonfinite allows {count - 1}."
    error = TrainingError(Problem(problem.where, what, problem.remedy))
    error.reported = failure.error.reported
    return error


# -- in a checkpoint -----------------------------------------------------------------------------------------------------

FILE = "readings.json"


class Readings(BaseModel):
    """What a checkpoint keeps of the numbers that were read. levels, losses (logarithms), deviations, spike: of a LossWatch.

    skipped: steps not taken.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    levels: list[float] = Field(max_length=CLIPS)
    losses: list[float] = Field(max_length=CLIPS)
    deviations: list[float] = Field(max_length=STEPS)
    spike: int = Field(ge=-QUIET, le=MOST)
    skipped: int = Field(ge=0, le=MOST)

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.levels) != len(self.losses):
            raise ValueError("each level has one loss")
        return self


@dataclass(frozen=True)
class ReadingsPiece:
    """What is known of the losses so far, and how many steps were skipped: both decide over later steps' events."""

    watch: LossWatch
    skipped: Skipped
    name: ClassVar[str] = "readings"
    files: ClassVar[tuple[str, ...]] = (FILE,)
    bytes: ClassVar[int] = 0

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        watch = self.watch
        made = Readings(
            levels=[level for level, _ in watch.clips],
            losses=[loss for _, loss in watch.clips],
            deviations=list(watch.deviations),
            spike=watch.last,
            skipped=self.skipped.count,
        )
        return State(values=made.model_dump()) if keep else State()

    def write(self, folder: Path, state: State) -> None:
        (folder / FILE).write_text(json.dumps(state.values), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Raises CheckpointError for a file that cannot be read. Checkpoints of before have none: it begins anew."""
        if not (folder / FILE).exists():
            return
        found = read_model(folder / FILE, Readings)
        self.watch.clips.extend(zip(found.levels, found.losses, strict=True))
        self.watch.deviations.extend(found.deviations)
        self.watch.last, self.skipped.count = found.spike, found.skipped


def readings_piece(plan: Plan, start: Start) -> ReadingsPiece:
    """That of a run, as the checkpoint holds it which the run continues from. Raises CheckpointError."""
    hint = ""
    if plan.storage.quantised:
        hint = (
            f'. The base is quantised (precision.base = "{plan.base}"): if it comes again, continue with this adapter '
            '(model.lora.start) in a new run with "bf16"'
        )
    piece = ReadingsPiece(LossWatch(hint), Skipped(plan.config.train.skip_nonfinite))
    if start.folder is not None:
        piece.load(start.folder)
    return piece
