"""From numbers on the device to rows of metrics: one read for many steps, and a look at whether all are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtrain.contract import Problem, StepMetrics, TrainingError
from vtrain.contract.specs import listed
from vtrain.train.processes import Processes
from vtrain.train.statistics import LARGEST


@dataclass(frozen=True)
class Measured:
    """One micro-batch, numbers still on the device, its inputs let go. loss: scalar; flow (B,); terms: scalars by name.

    waited: seconds for its data. rolled: of each clip, whether its input was rolled out; None in a run without.
    """

    micro_batch: int
    sigmas: list[float | list[float]]
    samples: tuple[str, ...]
    loss: Tensor
    flow: Tensor
    terms: dict[str, Tensor]
    waited: float = 0.0
    rolled: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Unread:
    """One optimizer step whose numbers nobody has looked at yet. step: 1-based. norm: scalar or not taken. extra: scalars by name,
    of the step as a whole on this process."""

    step: int
    micro: tuple[Measured, ...]
    lr: float
    norm: Tensor | None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """One micro-batch's numbers, as any process can tell them to another."""

    step: int
    micro_batch: int
    loss: float
    flow: list[float]
    terms: dict[str, float]
    sigmas: list[float | list[float]]
    samples: tuple[str, ...]
    waited: float = 0.0
    rolled: tuple[bool, ...] | None = None

    @property
    def clips(self) -> list[str]:
        """Its samples with their noise levels, for messages."""
        return clip_texts(self.samples, self.sigmas)

    @property
    def finite(self) -> bool:
        """Whether all its numbers are."""
        return all(map(math.isfinite, (self.loss, *self.flow, *self.terms.values())))


@dataclass(frozen=True)
class Failure:
    """A step with a number that is not finite. error: says so, and names its clips. readings: of all its micro-batches. lr: of the
    denoiser. grad_norm: of all gradients, where it was taken.

    gradients: block -> norm of its gradients, where they were still there. weights: block -> how many of its trained weights are
    not finite.
    """

    step: int
    error: TrainingError
    readings: Sequence[Reading]
    lr: float
    grad_norm: float | None
    gradients: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)

    def broken(self) -> list[Reading]:
        """Micro-batches with a number that is not finite, else all."""
        return [each for each in self.readings if not each.finite] or list(self.readings)


def level_text(sigma: float | list[float]) -> str:
    """ "0.731"; of one for each latent frame "0 to 0.731"."""
    if isinstance(sigma, list):
        return f"{min(sigma):.3g} to {max(sigma):.3g}"
    return f"{sigma:.3g}"


def clip_texts(samples: Sequence[str], sigmas: Sequence[float | list[float]]) -> list[str]:
    """ "clips/a.mp4 (noise level 0.731)" of each."""
    return [f"{name} (noise level {level_text(sigma)})" for name, sigma in zip(samples, sigmas, strict=True)]


Share = tuple[list[Reading], list[float | None], list[dict[str, float]]]
"""Readings of a process's micro-batches; the norm of each step, and its extra numbers."""


def fetch(unread: Sequence[Unread]) -> Share:
    """What this process has: one wait for the device."""
    micro = [(step.step, measured) for step in unread for measured in step.micro]
    tensors = [
        part for _, m in micro for part in (m.loss.reshape(1), m.flow, *(v.reshape(1) for v in m.terms.values()))
    ]
    tensors += [step.norm.reshape(1) for step in unread if step.norm is not None]
    tensors += [value.reshape(1) for step in unread for value in step.extra.values()]
    numbers = iter(torch.cat([tensor.float() for tensor in tensors]).tolist())  # the one wait for the device
    readings = [
        Reading(
            step=step,
            micro_batch=m.micro_batch,
            loss=next(numbers),
            flow=[next(numbers) for _ in range(len(m.flow))],
            terms={name: next(numbers) for name in m.terms},
            sigmas=m.sigmas,
            samples=m.samples,
            waited=m.waited,
            rolled=m.rolled,
        )
        for step, m in micro
    ]
    norms = [None if step.norm is None else next(numbers) for step in unread]
    return readings, norms, [{name: next(numbers) for name in step.extra} for step in unread]


def rows(
    unread: Sequence[Unread], processes: Processes, steps_per_epoch: float, seconds: float, memory: int
) -> tuple[tuple[StepMetrics, ...], Failure | None]:
    """Metrics of steps, over all processes, the same on each. seconds: per step.

    With a failure, whose error names the samples, metrics end before the first step with a number that is not finite. The step
    before it is named too if nobody took the norm of its gradient: a loss can be finite whose gradient is not.
    """
    shares: list[Share] = processes.gathered([fetch(unread)])
    # By number: sums of floats then do not depend on which process had which micro-batch.
    readings = sorted((each for own, _, _ in shares for each in own), key=lambda reading: reading.micro_batch)
    found: list[StepMetrics] = []
    before: list[Reading] = []
    for at, step in enumerate(unread):
        norms = [own[at] for _, own, _ in shares]
        parts = [reading for reading in readings if reading.step == step.step]
        # That of all gradients together is the same everywhere, unless something is broken.
        norm = next((each for each in norms if each is not None and not math.isfinite(each)), norms[0])
        try:
            check_finite(step.step, parts, norm, before)
        except TrainingError as error:
            error.reported = not processes.first
            return tuple(found), Failure(step.step, error, parts, step.lr, norm)
        before = parts if norm is None else []
        found.append(
            StepMetrics(
                step=step.step,
                epoch=round(step.step / steps_per_epoch, 6),
                loss=_mean([part.loss for part in parts]),
                flow_loss=_mean([_mean(part.flow) for part in parts]),
                lr=step.lr,
                grad_norm=norm,
                sigmas=[sigma for part in parts for sigma in part.sigmas],
                samples=[sample for part in parts for sample in part.samples],
                seconds=seconds,
                data_wait=_longest_wait(parts, processes.count),
                memory=memory,
                terms={name: _mean([part.terms[name] for part in parts]) for name in parts[0].terms}
                | _apart(parts)
                | _together([own[at] for _, _, own in shares]),
                clip_losses=[loss for part in parts for loss in part.flow],
            )
        )
    return tuple(found), None


def _apart(parts: Sequence[Reading]) -> dict[str, float]:
    """Of a run with rollout: the share of clips that were rolled out, and the flow loss of these and of the others, where there
    are some."""
    clips = [(rolled, loss) for part in parts for rolled, loss in zip(part.rolled or (), part.flow, strict=False)]
    if not clips:
        return {}
    of = {each: [loss for rolled, loss in clips if rolled is each] for each in (True, False)}
    found = {"rollout_share": len(of[True]) / len(clips)}
    names = {True: "flow_loss_rolled_out", False: "flow_loss_direct"}
    return found | {names[each]: _mean(losses) for each, losses in of.items() if losses}


def check_finite(step: int, parts: Sequence[Reading], norm: float | None, before: Sequence[Reading] = ()) -> None:
    """Raises TrainingError that names the clips whose own loss is not finite, else all of the micro-batch or step.

    before: readings of the step before, if the norm of its gradient is not known.
    """
    what, remedy = "the loss is not finite", "Look at these clips, lower the learning rate, or clip the gradient."
    if step == 1:
        remedy = "No weight has moved yet, so it is not the learning rate: look at these clips, at [precision], at the model."
    terms = sorted({name for part in parts for name, value in part.terms.items() if not math.isfinite(value)})
    bad = [
        name for part in parts for name, value in zip(part.clips, part.flow, strict=True) if not math.isfinite(value)
    ]
    # Where the clips' own losses are finite, what is not comes from a regularizer, whose name a term's begins with.
    if not bad and (owners := dict.fromkeys(name.partition("/")[0] for name in terms if name.endswith("/loss"))):
        what = f"the loss of the regularizer {listed(owners)} is not finite"
        remedy = (
            "Lower its weight, or look at these clips; if it is so with any, report it to the regularizer's author."
        )
    bad = bad or [name for part in parts if not math.isfinite(part.loss) for name in part.clips]
    if not bad and norm is not None and not math.isfinite(norm):
        what, bad = "the gradient is not finite", [name for part in parts for name in part.clips]
    if bad:
        earlier = ", ".join(dict.fromkeys(name for part in before for name in part.samples))
        also = f" Or the step before broke the weights; its samples: {earlier}." if earlier else ""
        raise TrainingError(
            Problem(
                f"step {step}",
                f"{what}; samples: {', '.join(dict.fromkeys(bad))}.{also}",
                f"No checkpoint holds these weights. {remedy}",
            )
        )


def _longest_wait(parts: Sequence[Reading], processes: int) -> float:
    """Seconds that the slowest process waited for the data of a step: the others wait for it."""
    waits = [0.0] * processes
    for part in parts:
        # Micro-batches are dealt in turn (Loop.order): equal remainders are of one process, whichever that is.
        waits[part.micro_batch % processes] += part.waited
    return max(waits)


def _together(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Extra numbers of a step over all processes."""
    return {name: (max if LARGEST.fullmatch(name) else _mean)([share[name] for share in shares]) for name in shares[0]}


def _mean(values: list[float]) -> float:
    """In the order given, so that it is the same whichever process held which value."""
    return sum(values) / len(values)
