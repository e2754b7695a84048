"""Scheduled sampling: some clips' inputs are made by the denoiser itself, from a noisier level down to the one that is trained.

A denoiser is trained on corrupted clips and used on its own predictions, whose errors it never saw (exposure bias). Here it sees
them: Bengio et al., "Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks" (arXiv 1506.03099), with noise
levels in the place of words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from vtrain.config.tables import RolloutTable
from vtrain.contract import Condition, Denoiser, Device, Family, NoiseLevel, Sampler, SupportsRollout, Text, timesteps
from vtrain.data.seeds import chance


@dataclass(frozen=True)
class Rollout:
    """The clips of a micro-batch whose input the denoiser makes. rows: (R,) int64, their numbers in it. levels: one more than there
    are solver steps, each of these R clips, from where they start down to the levels at which they are trained."""

    rows: Tensor
    levels: tuple[NoiseLevel, ...]

    def on(self, device: Device) -> Rollout:
        levels = (NoiseLevel(device.move(each.sigma), device.move(timesteps(each))) for each in self.levels)
        return Rollout(device.move(self.rows), tuple(levels))


@dataclass(frozen=True)
class RolloutDraws:
    """Which draws are rolled out, and from where: a pure function of (seed, draw number), of the draw's level, and of the step, by
    the ramp alone. ramp: in optimizer steps, 0 for none."""

    table: RolloutTable
    seed: int
    ramp: int

    def probability(self, step: int) -> float:
        """Of a draw at optimizer step `step` (zero-based), before the strategy."""
        return self.table.probability * (min(1.0, step / self.ramp) if self.ramp else 1.0)

    def offset(self, draw: int, sigma: Tensor, step: int) -> float:
        """How far above its level a draw starts, in (0, max_offset]; 0: it is not rolled out. sigma: of the clip, or of its frames.

        The offset is uniform up to max_offset, or up to where level 1 is: s + offset <= 1.
        """
        lowest, highest = float(sigma.min()), float(sigma.max())
        room = min(self.table.max_offset, 1 - highest)
        if lowest < self.table.min_level or room <= 0:
            return 0.0
        weight = {"uniform": 1.0, "early": lowest, "late": 1 - lowest}[self.table.strategy]
        if chance(self.seed, "rollout", draw) >= weight * self.probability(step):
            return 0.0
        return (1 - chance(self.seed, "rollout offset", draw)) * room

    def of(
        self, draws: Sequence[int], drawn: NoiseLevel, level: NoiseLevel, family: Family, step: int
    ) -> tuple[Rollout | None, tuple[bool, ...]]:
        """Of a micro-batch, and of each clip whether it is rolled out. drawn: levels before frames were given clean, level: after,
        with timesteps. On the CPU."""
        offsets = [self.offset(draw, sigma, step) for draw, sigma in zip(draws, drawn.sigma, strict=True)]
        rows = torch.tensor([row for row, offset in enumerate(offsets) if offset], dtype=torch.int64)
        rolled = tuple(bool(offset) for offset in offsets)
        if not len(rows):
            return None, rolled
        own = level.sigma[rows]
        above = torch.tensor(offsets)[rows].reshape(-1, *[1] * (own.ndim - 1))
        count = self.table.steps
        # Clean frames stay at level 0.
        sigmas = [(own + above * (left / count)).clamp(max=1).where(own > 0, own) for left in range(count, 0, -1)]
        levels = [NoiseLevel(sigma, family.timestep(sigma)) for sigma in sigmas]
        # The last is the clip's own, with the timestep that the sampler drew.
        return Rollout(rows, (*levels, NoiseLevel(own, timesteps(level)[rows]))), rolled


def rolled_out(
    denoiser: Denoiser,
    sampler: Sampler,
    rollout: Rollout,
    clean: Tensor,
    noise: Tensor,
    condition: Condition,
    noisy: Tensor,
    target: Tensor,
) -> tuple[Tensor, Tensor]:
    """(noisy, target) of a micro-batch, those of the rolled-out clips made again; what is predicted for that are these alone.

    The target points from where the denoiser came to the clean clip: with the target of the corruption it would be taught to keep
    its error. No gradient goes back through the solver steps, and there is no dropout in them, as there is none when videos are
    generated: the errors to see are those made there. The graded forward draws the dropout that it would have drawn.
    """
    assert isinstance(sampler, SupportsRollout)  # the plan refuses others
    rows, levels = rollout.rows, rollout.levels
    own, given = clean.index_select(0, rows), chosen(condition, rows)
    state, _ = sampler.corrupt(own, noise.index_select(0, rows), levels[0])
    with torch.no_grad(), evaluating(denoiser.module):
        for level, to in pairwise(levels):
            state = sampler.advance(state, denoiser.predict(state, level, given), level, to)
    # Autocast keeps the weights that it has cast. In torch versions that keep those cast without a gradient, the graded forward
    # would take these, and nothing would be learned.
    torch.clear_autocast_cache()
    state = state.to(noisy.dtype)
    goal = sampler.target_at(state, own, levels[-1]).to(target.dtype)
    return noisy.index_copy(0, rows, state), target.index_copy(0, rows, goal)


def chosen(condition: Condition, rows: Tensor) -> Condition:
    """Of some clips alone."""
    text: Text = condition.text.map(lambda each: each.index_select(0, rows))
    return Condition(text, {name: each.index_select(0, rows) for name, each in condition.extras.items()})


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout inside; afterwards each part is as it was."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
