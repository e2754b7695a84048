"""`levels`: rectified flow, trained at levels drawn as "mode" or "cosmap" (Esser et al., arXiv 2403.03206, section 3.1).

mode:   s = 1 - u - scale (cos(pi u / 2)^2 - 1 + u)   (equation 20; scale > 0 favours the middle, < 0 the ends)
cosmap: s = 1 - 1 / (tan(pi u / 2) + 1)               (equation 21)
with u uniform in [0, 1]. The path x_s = (1 - s) x0 + s e and its target e - x0 are those of every rectified flow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from vtrain.contract import NoiseLevel, Options, Predict, SamplerSpec, fixed, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LevelsOptions(Options):
    """Options of `levels`."""

    distribution: Literal["mode", "cosmap"] = fixed("mode", description="how levels are drawn in training")
    scale: float = fixed(
        1.29, ge=-1, le=2 / (math.pi - 2), description='of "mode": how far from uniform, which is 0; beyond, none is'
    )


class Levels:
    """The sampler. It gives sigma alone, and so works with every family."""

    def __init__(self, options: LevelsOptions, scheduler: Mapping[str, object]) -> None:
        self._options = options

    def describe(self) -> Sequence[tuple[str, str]]:
        of = f"mode, scale {self._options.scale:g}" if self._options.distribution == "mode" else "cosmap"
        return (("training levels", of), ("sampling", "Euler, linear grid"))

    def warnings(self) -> Sequence[str]:
        odd = self._options.distribution == "cosmap" and "scale" in self._options.model_fields_set
        return ('scale: no effect, because distribution is "cosmap"',) if odd else ()

    def draw(self, n: int, generator: torch.Generator) -> NoiseLevel:
        import torch

        u = torch.rand(n, generator=generator, dtype=torch.float32)
        if self._options.distribution == "cosmap":
            return NoiseLevel((1 - 1 / ((math.pi / 2 * u).tan() + 1)).clamp(0, 1))
        bend = (math.pi / 2 * u).cos().square() - 1 + u
        return NoiseLevel((1 - u - self._options.scale * bend).clamp(0, 1))  # rounding alone leaves [0, 1]

    def corrupt(self, clean: Tensor, noise: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        sigma = level.sigma.to(clean.device).view(len(clean), 1, -1, 1, 1)  # a level for each clip, or for each frame
        noisy = (1 - sigma) * clean.float() + sigma * noise.float()
        return noisy.to(clean.dtype), (noise.float() - clean.float()).to(clean.dtype)

    def solving(self, predict: Predict, noise: Tensor, steps: int) -> Iterator[Tensor]:
        state = noise.float()
        for number in range(steps, 0, -1):
            level = NoiseLevel(state.new_full((len(state),), number / steps))
            state = state - predict(state, level).float() / steps
            yield state

    def solve(
        self, predict: Predict, noise: Tensor, steps: int, on_step: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        state = noise
        for number, state in enumerate(self.solving(predict, noise, steps), start=1):
            if on_step is not None:
                on_step(number, state)
        return state


@hookimpl
def vtrain_samplers() -> tuple[SamplerSpec, ...]:
    return (SamplerSpec("levels", 'rectified flow with levels drawn as "mode" or "cosmap"', LevelsOptions, Levels),)
