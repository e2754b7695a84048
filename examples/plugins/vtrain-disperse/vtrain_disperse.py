"""`disperse`: the clips of a batch should look unlike to one block of the denoiser.

Dispersive loss (Wang and He, arXiv 2506.09027, InfoNCE with squared L2 distances): weight x log mean exp(-d / tau), over all
pairs of clips of a micro-batch, a clip with itself included; d: squared distance of what the block makes of them, divided by
its size, as the authors' code does. It has no positive pairs, no encoder and no parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from vtrain.contract import LossTerm, Needs, Options, RegularizerSpec, StepView, fixed, hookimpl

if TYPE_CHECKING:
    from torch import nn


class DisperseOptions(Options):
    """Options of `disperse`. The authors take the block at a quarter of the depth, and weight and tau 0.5."""

    block: int = fixed(ge=0, description="number of the block whose output is read, from 0")
    weight: float = Field(0.5, ge=0, description="factor of the loss")
    tau: float = Field(0.5, gt=0, description="temperature: a smaller one looks at the nearest clips alone")


class Disperse:
    """The regularizer, built from its options."""

    def __init__(self, options: DisperseOptions) -> None:
        self._options = options

    def needs(self) -> Needs:
        return Needs(taps=(self._options.block,))

    def describe(self) -> Sequence[tuple[str, str]]:
        chosen = self._options
        return (
            ("disperse", f"block {chosen.block}, weight {chosen.weight:g}, tau {chosen.tau:g}; needs batch_size > 1"),
        )

    def load(self, tap_widths: Mapping[int, int]) -> nn.Module:
        return dispersive(self._options)


def dispersive(options: DisperseOptions) -> nn.Module:
    """The loss module; a function, since its class needs torch, which a plugin imports only here."""
    import torch
    from torch import nn

    class Dispersive(nn.Module):
        def forward(self, view: StepView) -> LossTerm:
            tap = view.taps[options.block].float().flatten(1)  # (B, f h w D), under autocast too
            # Not cdist: its gradient at distance 0, of a clip with itself, is not a number.
            distance = (tap[:, None] - tap[None]).square().mean(-1)
            loss = (-distance / options.tau).flatten().logsumexp(0) - torch.tensor(len(tap) ** 2).log()
            return LossTerm(options.weight * loss, {"unweighted": loss.detach(), "distance": distance.mean().detach()})

    return Dispersive()


@hookimpl
def vtrain_regularizers() -> tuple[RegularizerSpec, ...]:
    return (RegularizerSpec("disperse", "clips look unlike to one block (dispersive loss)", DisperseOptions, Disperse),)
