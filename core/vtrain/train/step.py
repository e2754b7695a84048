"""One training step as one nn.Module: corrupt, predict, flow loss, regularizers.

DDP, compile and autocast wrap this module alone, so no plugin ever meets a wrapper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from vtrain.contract import Condition, Denoiser, LatentShape, LossTerm, NoiseLevel, Sampler, StepView
from vtrain.train.taps import tapped


@dataclass(frozen=True)
class StepInput:
    """A micro-batch with its draws, on the training device. clean, noise: (B, C, f, h, w) fp32. step: steps done so far."""

    clean: Tensor
    noise: Tensor
    level: NoiseLevel
    condition: Condition
    step: int


@dataclass(frozen=True)
class StepOutput:
    """loss: scalar in the graph, the flow loss plus every term. flow (B,): per clip, detached. metrics: detached scalars."""

    loss: Tensor
    flow: Tensor
    metrics: Mapping[str, Tensor]


class Step(nn.Module):
    """The denoiser and the regularizers' own modules, and what is computed with them."""

    def __init__(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        regularizers: Mapping[str, nn.Module],
        taps: Mapping[str, tuple[int, ...]],
    ) -> None:
        """regularizers: name -> LossModule. taps: name -> the blocks it reads."""
        super().__init__()
        self.denoiser_module = denoiser.module
        self.regularizers = nn.ModuleDict(regularizers)
        self.denoiser = denoiser
        self.sampler = sampler
        self.taps = tuple(sorted({tap for blocks in taps.values() for tap in blocks}))

    def forward(self, given: StepInput) -> StepOutput:
        noisy, target = self.sampler.corrupt(given.clean, given.noise, given.level)
        _, channels, frames, height, width = noisy.shape
        with tapped(self.denoiser, self.taps, LatentShape(channels, frames, height, width)) as taps:
            prediction = self.denoiser.predict(noisy, given.level, given.condition)
        flow = (prediction.float() - target.float()).square().flatten(1).mean(1)
        loss = flow.mean()
        metrics: dict[str, Tensor] = {}
        if self.regularizers:
            view = StepView(
                clean=given.clean,
                noise=given.noise,
                noisy=noisy,
                target=target,
                prediction=prediction,
                level=given.level,
                condition=given.condition,
                taps=taps,
                step=given.step,
            )
            for name, module in self.regularizers.items():
                term: LossTerm = module(view)
                loss = loss + term.value
                metrics[f"{name}/loss"] = term.value.detach()
                metrics |= {f"{name}/{key}": value for key, value in term.metrics.items()}
        return StepOutput(loss, flow.detach(), metrics)


def clip_gradients(parameters: list[Tensor], method: str, limit: float) -> Tensor | None:
    """Clip in place; gives the norm before clipping for "norm", None for "value". Never reads the device."""
    if method == "value":
        nn.utils.clip_grad_value_(parameters, limit)
        return None
    return nn.utils.clip_grad_norm_(parameters, limit)


def gradient_norm(parameters: list[Tensor]) -> Tensor:
    """2-norm of all gradients together, a scalar on their device."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
