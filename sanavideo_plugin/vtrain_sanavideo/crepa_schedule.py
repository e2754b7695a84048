"""How the weight of a loss changes over a run, and when it is cut off. Numbers of the host only; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from vtrain.contract import Duration, RunLength
from vtrain_sanavideo.crepa_options import ScheduleOptions


class Schedule:
    """The weight at each optimizer step, as the options alone say: a pure function of the step."""

    def __init__(self, weight: float, options: ScheduleOptions) -> None:
        self._weight = weight
        self._options = options

    def weight(self, step: int, run: RunLength) -> float:
        """step: optimizer steps done so far. >= 0.

        Warm-up of w steps: step i has (i + 1) / w of the weight, so that step w - 1 is the first with all of it; without
        warm-up that is step 0. Decay from that step a on: p = (i - a) / length, at most 1; without a length, p is 1 at the
        run's last step. The weight is end + (weight - end) q; linear: q = 1 - p, cosine: q = (1 + cos(pi p)) / 2,
        polynomial: q = (1 - p) ** power.
        """
        options = self._options
        if options.cutoff is not None and step >= _steps(options.cutoff, run):
            return 0.0
        warmup = 0 if options.warmup is None else _steps(options.warmup, run)
        if step < warmup:
            return self._weight * (step + 1) / warmup
        if options.decay == "constant":
            return self._weight
        first = max(warmup - 1, 0)
        length = run.steps - 1 - first if options.length is None else _steps(options.length, run)
        progress = min(1.0, (step - first) / max(length, 1))
        return options.end + (self._weight - options.end) * self._left(progress)

    def _left(self, progress: float) -> float:
        """What is left of the way to the end, 1 at its beginning and 0 after it."""
        if self._options.decay == "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        return float((1 - progress) ** (self._options.power if self._options.decay == "polynomial" else 1))

    def describe(self) -> str:
        options = self._options
        words = [f"warm-up {options.warmup}"] if options.warmup is not None else []
        if options.decay == "constant":
            words.append("constant")
        else:
            power = f" of power {options.power:g}" if options.decay == "polynomial" else ""
            over = f"over {options.length}" if options.length is not None else "over the rest of the run"
            words.append(f"{options.decay}{power} to {options.end:g} {over}")
        if options.cutoff is not None:
            words.append(f"0 after {options.cutoff}")
        if options.threshold is not None:
            words.append(f"0 once the similarity's running mean is {options.threshold:g} ({options.threshold_mode})")
        return ", ".join(words)

    def idle_keys(self) -> Iterator[str]:
        """Keys that the file gives and that have no effect beside the others."""
        options = self._options
        given = options.model_fields_set
        if options.decay == "constant":
            yield from sorted(given & {"power", "length", "end"})
        elif options.decay != "polynomial":
            yield from sorted(given & {"power"})
        if options.threshold is None:
            yield from sorted(given & {"threshold_mode", "smoothing", "probe_every"})
        elif options.threshold_mode == "permanent":
            yield from sorted(given & {"probe_every"})


class SimilarityGate:
    """Shuts the loss off once the running mean of its similarity is high enough.

    The mean m is exponential in optimizer steps: n steps after it was last told, m becomes g m + (1 - g) s with
    g = smoothing ** n; the first s is m itself. `mean` is None until then.
    """

    def __init__(self, options: ScheduleOptions) -> None:
        self._options = options
        self.mean: float | None = None
        self.step = 0
        self.shut = False

    def tell(self, step: int, similarity: float) -> None:
        """step: 1-based, the one that the similarity was measured in."""
        kept = self._options.smoothing ** (step - self.step)
        self.mean = similarity if self.mean is None else kept * self.mean + (1 - kept) * similarity
        self.step = step

    def decide(self) -> None:
        """Draw the conclusion."""
        threshold = self._options.threshold
        if threshold is None or self.mean is None:
            return
        high = self.mean >= threshold
        self.shut = high or (self.shut and self._options.threshold_mode == "permanent")

    @property
    def closed(self) -> bool:
        return self.shut and self._options.threshold is not None

    @property
    def for_good(self) -> bool:
        return self.closed and self._options.threshold_mode == "permanent"

    def probes(self, step: int) -> bool:
        """Whether the similarity is measured at this step (steps done so far) although the loss is shut off."""
        return self.closed and not self.for_good and step % self._options.probe_every == 0

    def state(self) -> tuple[float, float, float, float]:
        """All that is remembered: whether there is a mean, the mean, its step, whether it is shut."""
        return float(self.mean is not None), self.mean or 0.0, float(self.step), float(self.shut)

    def restore(self, told: float, mean: float, step: float, shut: float) -> None:
        """Take over what `state` gave."""
        self.mean = mean if told else None
        self.step, self.shut = int(step), bool(shut)


def _steps(duration: Duration, run: RunLength) -> int:
    steps = duration.in_steps(run.per_epoch)
    assert steps is not None  # options take no seconds
    return steps
