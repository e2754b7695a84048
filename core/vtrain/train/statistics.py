"""Numbers of each block, of gradients, weights, updates and outputs, taken at the steps that are logged."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SAMPLED = 65_536
"""Numbers of a weight, evenly spread, of which the size of an update is taken: a copy of all would take as much memory again."""

OTHERS = "others"
"""What stands for a block's name of weights that lie in none."""


class Statistics:
    """Of a denoiser's blocks. Everything stays on the device, a tensor of one number each, until somebody reads it.

    Names are "statistics/block-03/grad_rms": the root mean square (rms) of the gradient before clipping, of the weights that are
    trained (weight_rms) and of the block's output (output_rms); the output's largest absolute value (output_max); and the rms of
    what the step changes, divided by that of the weights (update_ratio). Weights outside
    all blocks, a regularizer's among them, are "others", which have no output.
    """

    def __init__(self, blocks: Sequence[nn.Module], named: Sequence[tuple[str, Tensor]]) -> None:
        """named: all that is trained."""
        self.blocks = blocks
        digits = max(2, len(str(len(blocks) - 1)))
        names = [f"block-{number:0{digits}d}" for number in range(len(blocks))]
        owner = {id(weight): name for name, block in zip(names, blocks, strict=True) for weight in block.parameters()}
        self.weights: dict[str, list[Tensor]] = {}
        for _, weight in named:
            self.weights.setdefault(owner.get(id(weight), OTHERS), []).append(weight)
        self.names = names

    @contextmanager
    def outputs(self, found: dict[str, Tensor]) -> Iterator[None]:
        """Inside, a forward pass adds its blocks' numbers to `found`; of several passes the largest maximum and the last rms.

        Passes without gradient are others': rollout's.
        """

        def keep(name: str) -> object:
            def hook(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
                if not torch.is_grad_enabled():
                    return
                value = (output[0] if isinstance(output, tuple) else output).detach()
                found[_key(name, "output_rms")] = _rms([value])
                most = torch.linalg.vector_norm(value, torch.inf, dtype=torch.float32)
                before = found.get(_key(name, "output_max"))
                found[_key(name, "output_max")] = most if before is None else torch.maximum(before, most)

            return hook

        # Around whole blocks and gone before the backward pass: a recomputed block is not counted again.
        handles = [block.register_forward_hook(keep(name)) for name, block in zip(self.names, self.blocks, strict=True)]  # type: ignore[arg-type]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gradients(self, found: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """Before clipping and the step. Gives what `updates` compares the weights with."""
        before = {}
        for name, weights in self.weights.items():
            slopes = [weight.grad for weight in weights if weight.grad is not None]
            if slopes:
                found[_key(name, "grad_rms")] = _rms(slopes)
            found[_key(name, "weight_rms")] = _rms([weight.detach() for weight in weights])
            before[name] = [_sample(weight).clone() for weight in weights]
        return before

    def updates(self, found: dict[str, Tensor], before: Mapping[str, Sequence[Tensor]]) -> None:
        """After the step."""
        for name, old in before.items():
            changes = [
                _sample(weight).float() - each.float() for weight, each in zip(self.weights[name], old, strict=True)
            ]
            found[_key(name, "update_ratio")] = _rms(changes) / _rms(old).clamp(min=1e-12)


LARGEST = re.compile(r"statistics/.*/output_max")
"""Names of numbers of which several processes have the largest; of others they have the mean."""


def _key(name: str, what: str) -> str:
    return f"statistics/{name}/{what}"


def _rms(values: Sequence[Tensor]) -> Tensor:
    """Of all numbers together, fp32."""
    norms = torch.stack([torch.linalg.vector_norm(value, dtype=torch.float32) for value in values])
    total: Tensor = torch.linalg.vector_norm(norms) / math.sqrt(sum(value.numel() for value in values))
    return total


def _sample(weight: Tensor) -> Tensor:
    """At most SAMPLED of its numbers, the same each time."""
    flat = weight.detach().flatten()
    return flat[:: -(-len(flat) // SAMPLED)] if len(flat) > SAMPLED else flat
