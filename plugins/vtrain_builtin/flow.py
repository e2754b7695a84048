"""`flow`: rectified flow with a shifted schedule, solved by Euler steps.

x_s = (1 - s) x0 + s e and target v = e - x0 (Liu et al., arXiv 2209.03003). Training levels are logit-normal (Esser et al., arXiv
2403.03206, section 3.1) or uniform; both pass the resolution shift s' = shift s / (1 + (shift - 1) s) (same paper, equation 23).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vtrain.contract import NoiseLevel, Options, Predict, SamplerSpec, fixed

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class FlowOptions(Options):
    """Options of `flow`. What the weights learn from is fixed for a run; sampling may change at a resume."""

    distribution: Literal["logit-normal", "uniform"] = fixed(
        "logit-normal", description="how training levels are drawn before the shift"
    )
    mean: float = fixed(0.0, description="logit-normal: mean of the logit; above 0 is noisier")
    std: float = fixed(1.0, gt=0, description="logit-normal: standard deviation of the logit")
    shift: float = fixed(1.0, gt=0, description="shift of training levels; above 1 is noisier, 1 is none")
    sampling_shift: float | None = Field(None, gt=0, description="shift of the sampling grid; absent: shift")


def shifted(level: Tensor, shift: float) -> Tensor:
    """s' = shift s / (1 + (shift - 1) s), for s in [0, 1]; keeps 0 and 1 exactly."""
    return shift * level / (1 + (shift - 1) * level)


def _spread(sigma: Tensor) -> Tensor:
    """(B,) or, per latent frame, (B, f) -> a shape that multiplies (B, C, f, h, w)."""
    return sigma[:, None, :, None, None] if sigma.ndim == 2 else sigma[:, None, None, None, None]


class Flow:
    """The sampler. options: see FlowOptions. scheduler: the model folder's scheduler config, which this sampler does not use."""

    def __init__(self, options: FlowOptions, scheduler: Mapping[str, object]) -> None:
        self._options = options
        self._scheduler = scheduler
        self._sampling_shift = options.shift if options.sampling_shift is None else options.sampling_shift

    def describe(self) -> Sequence[tuple[str, str]]:
        chosen = self._options
        of = f"logit-normal({chosen.mean:g}, {chosen.std:g})" if chosen.distribution == "logit-normal" else "uniform"
        rows = [
            ("training levels", f"{of}, shift {chosen.shift:g}"),
            ("sampling", f"Euler, linear grid, shift {self._sampling_shift:g}"),
        ]
        if self._scheduler:
            name = self._scheduler.get("_class_name", "the model folder's")
            rows.append(("scheduler config", f"{name}, not used by this sampler"))
        return tuple(rows)

    def warnings(self) -> Sequence[str]:
        given = self._options.model_fields_set & {"mean", "std"}
        if self._options.distribution == "logit-normal" or not given:
            return ()
        return (f'{" and ".join(sorted(given))}: no effect, because distribution is "uniform"',)

    def draw(self, n: int, generator: torch.Generator) -> NoiseLevel:
        import torch

        if self._options.distribution == "uniform":
            level = torch.rand(n, generator=generator, dtype=torch.float32)
        else:
            normal = torch.randn(n, generator=generator, dtype=torch.float32)
            level = torch.sigmoid(self._options.mean + self._options.std * normal)
        return NoiseLevel(shifted(level, self._options.shift))

    def corrupt(self, clean: Tensor, noise: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Computed in fp32, returned in the type of `clean`."""
        sigma = _spread(level.sigma.to(clean.device).float())
        first, last = clean.float(), noise.float()
        noisy = (1 - sigma) * first + sigma * last
        return noisy.to(clean.dtype), (last - first).to(clean.dtype)

    def advance(self, noisy: Tensor, prediction: Tensor, level: NoiseLevel, to: NoiseLevel) -> Tensor:
        """SupportsRollout: x_t = x_s + (t - s) v."""
        moved = _spread((to.sigma - level.sigma).to(noisy.device).float())
        return noisy.float() + moved * prediction.float()

    def target_at(self, noisy: Tensor, clean: Tensor, level: NoiseLevel) -> Tensor:
        """SupportsRollout: (x_s - x0) / s, the velocity of the straight path from clean to here; 0 where s is."""
        sigma = _spread(level.sigma.to(noisy.device).float())
        return (noisy.float() - clean.float()) / sigma.where(sigma > 0, 1)

    def solve(
        self, predict: Predict, noise: Tensor, steps: int, on_step: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Euler from 1 to 0 on `steps` intervals; the state is fp32. Raises ValueError for steps < 1."""
        state = noise
        for number, state in enumerate(self.solving(predict, noise, steps), start=1):
            if on_step is not None:
                on_step(number, state)
        return state

    def solving(self, predict: Predict, noise: Tensor, steps: int) -> Iterator[Tensor]:
        """SupportsStepwise."""
        import torch

        if steps < 1:
            raise ValueError(f"a solver takes at least 1 step, not {steps}")
        # Its ends stay 1 and 0 exactly, so the last step lands on clean.
        grid = shifted(torch.linspace(1, 0, steps + 1, device=noise.device), self._sampling_shift)
        state = noise.float()
        for number in range(steps):
            here = NoiseLevel(grid[number].expand(len(state)))
            state = state + (grid[number + 1] - grid[number]) * predict(state, here).float()
            yield state


FLOW = SamplerSpec(
    name="flow",
    summary="rectified flow: logit-normal or uniform levels with a shift, solved by Euler steps",
    options=FlowOptions,
    build=Flow,
)
