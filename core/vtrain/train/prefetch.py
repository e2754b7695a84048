"""Micro-batches with their noise, read, drawn and put on the device in the background, ahead of the step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from vtrain.contract import (
    Condition,
    Device,
    Family,
    LatentShape,
    NoiseLevel,
    Sampler,
    timed,
    timesteps,
    with_clean,
)
from vtrain.data.batches import Batch, Batches
from vtrain.data.seeds import generator
from vtrain.registry.blame import PartFault, in_background
from vtrain.train.rollout import RolloutDraws
from vtrain.train.step import StepInput

AHEAD = 4
"""Micro-batches that are ready or in the making while one is trained on: they bridge a storage that stutters."""


@dataclass(frozen=True)
class Prefetched:
    """A step's input, on the device, and what is logged of it. sigmas: one, or one per latent frame, for each clip.

    waited: seconds for which the step had to wait for it. rolled: of each clip, whether it is rolled out; None in a run without.
    """

    given: StepInput
    micro_batch: int
    sample_ids: tuple[str, ...]
    sigmas: list[float | list[float]]
    waited: float = 0.0
    rolled: tuple[bool, ...] | None = None


class Prefetcher:
    """Gives this process's micro-batches in order.

    Noise and level of a sample are drawn by a generator of its own, a pure function of (seed, draw number, purpose), on
    the CPU: the same on every device, whatever the batch size.
    """

    def __init__(
        self,
        batches: Batches,
        family: Family,
        sampler: Sampler,
        seed: int,
        device: Device,
        needed: Callable[[int], Collection[str] | None] = lambda step: None,
        timesteps_of: str = "",
        rollout: RolloutDraws | None = None,
    ) -> None:
        """needed: the regularizers for which features and frames are read at a step; None: all that ask for some.

        timesteps_of: of the sampler's spec. rollout: which draws are rolled out.
        """
        self.batches, self.family, self.sampler, self.timesteps_of = batches, family, sampler, timesteps_of
        self.seed, self.device, self.needed, self.rollout = seed, device, needed, rollout

    def draw(self, batch: Batch) -> tuple[torch.Tensor, NoiseLevel]:
        """Noise (B, C, f, h, w) fp32 and level of a batch, with its timesteps, on the CPU."""
        shape = batch.latents.mean.shape[1:]
        noise = [torch.randn(shape, generator=generator(self.seed, "noise", draw)) for draw in batch.draws]
        levels = [self.sampler.draw(1, generator(self.seed, "level", draw)) for draw in batch.draws]
        for drawn in levels:
            check_level(drawn, shape[1], self.timesteps_of)
        times = [level.timestep for level in levels if level.timestep is not None]
        sigma = torch.cat([level.sigma for level in levels])
        level = NoiseLevel(sigma, torch.cat(times) if len(times) == len(levels) else None)
        level = timed(self.family, level)
        if timesteps(level).shape != level.sigma.shape:
            what = f"its timestep gave {tuple(timesteps(level).shape)} for levels {tuple(level.sigma.shape)}"
            raise PartFault("family", "", what)
        return torch.stack(noise), level

    def prepare(self, number: int, step: int) -> Prefetched:
        """The global micro-batch `number`, which optimizer step `step` (zero-based) uses, but for what `complete` moves."""
        with in_background(f"in the prefetcher, reading micro-batch {number}"):
            batch = self.batches.get(number, self.needed(step))
        with in_background(f"in the prefetcher, micro-batch {number} of {', '.join(batch.sample_ids)}"):
            return self._prepared(batch, number, step)

    def inputs(self, number: int, step: int) -> StepInput:
        """Those of a global micro-batch once more, the same bits, without features and frames."""
        return self._prepared(self.batches.get(number, ()), number, step).given

    def _prepared(self, batch: Batch, number: int, step: int) -> Prefetched:
        noise, drawn = self.draw(batch)
        level, mask = given_clean(self.family, drawn, batch.mask, batch.clean, LatentShape(*noise.shape[1:]))
        rollout, rolled = None, None
        if self.rollout is not None:
            rollout, rolled = self.rollout.of(batch.draws, drawn, level, self.family, step)
        extras = {name: self.device.move(each) for name, each in batch.conditions.items()}
        given = StepInput(
            clean=self.device.move(batch.latents.mean),
            noise=self.device.move(noise),
            level=NoiseLevel(self.device.move(level.sigma), self.device.move(timesteps(level))),
            condition=Condition(batch.text.map(self.device.move), extras),
            step=step,
            mask=None if mask is None else self.device.move(mask),
            features={name: self.device.pin(each) for name, each in batch.features.items()},
            frames=None if batch.frames is None else self.device.pin(batch.frames),
            rollout=None if rollout is None else rollout.on(self.device),
        )
        return Prefetched(given, number, batch.sample_ids, _told(drawn, level), rolled=rolled)

    def complete(self, fed: Prefetched) -> Prefetched:
        """With features and frames on the device too: the largest of an input, they wait for their step in the host's memory."""
        features = {name: self.device.move(each) for name, each in fed.given.features.items()}
        frames = None if fed.given.frames is None else self.device.move(fed.given.frames)
        return replace(fed, given=replace(fed.given, features=features, frames=frames))

    def stream(self, numbers: Iterator[tuple[int, int]]) -> Generator[Prefetched]:
        """Each (micro-batch number, step), in order, `prepare`d up to AHEAD of them in advance by one thread.

        What goes wrong in making one is raised when its turn comes. Closing it ends the thread.
        """
        # One thread: source frames are decoded for one at a time (SourceFrames).
        with ThreadPoolExecutor(1, thread_name_prefix="prefetcher") as pool:
            waiting: deque[Future[Prefetched]] = deque()
            # As a job, not as the pool's initializer: what is wrong there comes out as BrokenThreadPool.
            pool.submit(self.device.use).result()
            try:
                for number, step in numbers:
                    waiting.append(pool.submit(self.prepare, number, step))
                    if len(waiting) > AHEAD:
                        yield self.complete(_wait(waiting.popleft()))
                while waiting:
                    yield self.complete(_wait(waiting.popleft()))
            finally:
                for future in waiting:
                    future.cancel()  # the pool, which is left next, waits for all that it has


def check_level(level: object, frames: int, timesteps_of: str) -> None:
    """Raises PartFault for what is no level of one clip with so many latent frames. It is on the CPU: reading it costs nothing.

    timesteps_of: of the sampler's spec; without, a timestep would be in a unit that no family was asked for.
    """
    if not isinstance(level, NoiseLevel):
        raise PartFault("sampler", "", f"its draw gave a {type(level).__name__}, not a NoiseLevel")
    sigma, time = level.sigma, level.timestep
    if sigma.shape not in ((1,), (1, frames)) or sigma.dtype is not torch.float32:
        found = f"{str(sigma.dtype).removeprefix('torch.')} {tuple(sigma.shape)}"
        raise PartFault("sampler", "", f"its draw gave levels {found} for one clip, not float32 (1,) or (1, {frames})")
    if not bool(((sigma >= 0) & (sigma <= 1)).all()):  # NaN is not either
        raise PartFault("sampler", "", f"its draw gave the level {sigma.flatten().tolist()}; levels are from 0 to 1")
    if (time is not None) != bool(timesteps_of):
        said = f'names the family "{timesteps_of}"' if timesteps_of else "names no family"
        raise PartFault(
            "sampler", "", f"its draw gave {'no ' if time is None else ''}timesteps, and its spec {said} (timesteps_of)"
        )
    if time is not None and time.shape != sigma.shape:
        what = f"its draw gave timesteps {tuple(time.shape)} for levels {tuple(sigma.shape)}"
        raise PartFault("sampler", "", what)


def given_clean(
    family: Family, level: NoiseLevel, mask: torch.Tensor | None, clean: Sequence[int], latents: LatentShape
) -> tuple[NoiseLevel, torch.Tensor | None]:
    """Level and mask of a batch: a clip's first latent frames that are given clean are at level 0 and do not count.

    mask: (B, f, h, w) of the data, None for none. clean: how many frames of each clip, in which something else is left to train.
    A batch without any keeps its levels, one for a clip, and its mask; else levels are (B, f).
    """
    if not any(clean):
        return level, mask
    # (B, f): which frames are given.
    given = torch.arange(latents.frames) < torch.tensor(clean)[:, None]
    counted = torch.ones(len(clean), *latents[1:]) if mask is None else mask.clone()
    counted[given] = 0
    return with_clean(family, level, given), counted


def _told(drawn: NoiseLevel, level: NoiseLevel) -> list[float | list[float]]:
    """The sigmas of a batch as they are logged: those drawn, and where a clip has another at some frame, one for each."""
    if level is drawn:
        sigmas: list[float | list[float]] = drawn.sigma.tolist()
        return sigmas
    own = drawn.sigma[:, None].expand_as(level.sigma) if drawn.sigma.ndim == 1 else drawn.sigma
    return [
        after.tolist() if bool((after != before).any()) else one.tolist()
        for one, before, after in zip(drawn.sigma, own, level.sigma, strict=True)
    ]


def _wait(future: Future[Prefetched]) -> Prefetched:
    began = time.perf_counter()
    fed = future.result()
    return replace(fed, waited=time.perf_counter() - began)
