"""bf16 weights that move as fp32 ones do: the 16 bits that rounding takes lie beside them. Importing this imports torch.

A weight and its rest are one fp32 number (Split-SGD-BF16: Kalamkar et al., arXiv 2005.04680). What libraries keep by Kahan
summation is itself of bf16: with weights near 1 it loses what is below 2^-16, an update at a rate of 1e-5 or the usual decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtrain_builtin.torch_optimizers import pieces

REST = "rest"
"""Part of a parameter's state: the bits of the fp32 weight less those of the bf16 one, int16."""


def split(base: type[torch.optim.Optimizer], *, whole: bool) -> type[torch.optim.Optimizer]:
    """A class of torch-optimi of which groups of bf16 weights take the library's step in fp32, a piece of a weight at a time.

    Afterwards its moments are rounded to bf16, and kept so. whole: a step goes by all of a weight, which is one piece then.
    """

    class Split(base):  # type: ignore[misc, valid-type]
        param_groups: list[dict[str, Any]]

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                if group["params"][0].dtype != torch.bfloat16:
                    self._alone(group)
                    continue
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._move(weight, group)
                # Each piece began at the group's count of steps: of none of them, it counts this one.
                counted = self._alone({**group, "params": []})
                group.update({key: value for key, value in counted.items() if key != "params"})

        def _alone(self, group: dict[str, Any]) -> dict[str, Any]:
            """The library's step, of this group and no other."""
            groups, self.param_groups = self.param_groups, [group]
            try:
                super().step()
            finally:
                self.param_groups = groups
            return group

        def _move(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
            state, gradient = self.state[weight], weight.grad
            assert gradient is not None
            if gradient.stride() != weight.stride():  # pieces are stretches of memory
                weight.grad = gradient = torch.empty_like(weight).copy_(gradient)
            self._init_state(group, state, weight)
            rest = state.setdefault(REST, torch.zeros_like(weight, dtype=torch.int16))
            moments = {key: value for key, value in state.items() if _is_moment(value, weight)}
            others = {key: value for key, value in state.items() if key not in moments and key != REST}
            for low, below, slope, *kept in pieces(weight, rest, gradient, *moments.values(), whole=whole):
                exact = nn.Parameter(joined(low, below))
                exact.grad = slope.float()
                of_piece = dict(zip(moments, kept, strict=True))
                self.state[exact] = {**others, **{key: value.float() for key, value in of_piece.items()}}
                try:
                    self._alone({**_copied(group), "params": [exact]})
                finally:
                    found = self.state.pop(exact)
                for key, value in of_piece.items():
                    value.copy_(found[key])
                take_apart(exact.detach(), low, below)

    Split.__name__ = Split.__qualname__ = base.__name__
    return Split


def joined(low: Tensor, rest: Tensor) -> Tensor:
    """bf16, int16 -> fp32."""
    return low.view(torch.int16).to(torch.int32).mul_(0x10000).add_(rest).view(torch.float32)


def take_apart(value: Tensor, low: Tensor, rest: Tensor) -> None:
    """fp32 -> bf16, the nearest, and int16, of which `joined` makes it again. NaN stays NaN."""
    low.copy_(value)
    # Half way up from an even neighbour is one more than int16 holds: such a number comes back as the one below it in fp32.
    below = value.view(torch.int32) - low.view(torch.int16).to(torch.int32).mul_(0x10000)
    rest.copy_(below.clamp_(max=0x7FFF))


def _is_moment(value: object, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dtype == weight.dtype and value.shape == weight.shape


def _copied(group: dict[str, Any]) -> dict[str, Any]:
    """With counts of its own."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
