"""Optimizers made of torch's own: several as one, Muon of kernels too, AdamW of bf16 weights. Importing this imports torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from vtrain.contract import Device

AT_ONCE, AT_ONCE_THERE = 1 << 18, 1 << 24
"""Numbers of a weight that are in fp32 at a time, on a CPU and on an accelerator: as many as a CPU's cache holds (random bits and
rounding alone are twice as fast so as with 16 times as many), and enough for a card to be busy with, in about 400 MiB."""


class JoinedOptimizer(torch.optim.Optimizer):
    """Its groups are those of `parts`, the very same tables, and all keep their state in one place, by parameter."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        """Each part with groups of its own and no state yet."""
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.parts = tuple(parts)
        self.param_groups = groups
        for part in parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


class MatrixMuon(torch.optim.Muon):
    """Muon of weights with two or more dimensions: one of more is the matrix (outputs, all else), a view of the same memory."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float, nesterov: bool, ns_steps: int) -> None:
        """groups: with named parameters, "lr" and "weight_decay"."""
        defaults = torch.optim.Muon(
            [torch.zeros(1, 1)], momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw"
        ).defaults
        # Not Muon's own, which refuses weights of more than two dimensions.
        torch.optim.Optimizer.__init__(self, groups, defaults)

    def _init_group(
        self,
        group: MutableMapping[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
    ) -> bool:
        """As torch has it, and then everything as a matrix."""
        found = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        for tensors in (params_with_grad, muon_momentum_bufs):
            tensors[:] = [each.view(len(each), -1) for each in tensors]  # raises where it would be a copy
        grads[:] = [each.reshape(len(each), -1) for each in grads]
        return found


class StochasticAdamW(torch.optim.Optimizer):
    """torch's own AdamW, computed in fp32 for a piece of a weight at a time; what it gives is rounded stochastically to bf16.

    The second moment too: with beta 0.999 it changes by a thousandth in a step, of which rounding to the nearest leaves nothing.
    The random bits of a step are a function of the seed, the parameter's name and the step alone.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float, seed: int) -> None:
        """groups: with named parameters, of bf16, and "lr" and "weight_decay"."""
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for name, weight in zip(group["param_names"], group["params"], strict=True):
                if weight.grad is not None:
                    self._move(name, weight, weight.grad, group)

    def _move(self, name: str, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        step = state["step"] = state["step"] + 1
        generator = torch.Generator(device=weight.device).manual_seed(_seed(self.seed, name, step))
        beta1, beta2 = group["betas"]
        # A gradient may lie in another order than its weight, such as channels-last.
        ordered = torch.empty_like(weight).copy_(gradient)
        for *kept, slope in pieces(weight, state["exp_avg"], state["exp_avg_sq"], ordered):
            value, mean, square = exact = [each.float() for each in kept]
            before = torch.full((), float(step - 1), device=weight.device)  # filled there: a copy would be waited for
            adamw(
                [value], [slope.float()], [mean], [square], [], [before], fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
                lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            # 63 random bits for each number, of which each of the three roundings takes 16.
            bits = torch.empty(value.shape, dtype=torch.int64, device=value.device).random_(generator=generator)
            chance = bits.view(torch.int16).view(-1, 4)
            for column, (target, result) in enumerate(zip(kept, exact, strict=True)):
                target.copy_(rounded(result, chance[:, column]))


def pieces(*tensors: Tensor, whole: bool = False) -> Iterator[list[Tensor]]:
    """The same stretch of each, as flat views that write to it; all lie in memory in one order. whole: all at once."""
    # A view of memory in its own order: that of channels-last weights, and of moments made like them, is another.
    flat = [each.detach().as_strided((each.numel(),), (1,)) for each in tensors]
    at_once = AT_ONCE_THERE if Device.of(flat[0]).accelerated else AT_ONCE
    length = len(flat[0])
    for start in range(0, length, length if whole else at_once):
        yield [each[start : length if whole else start + at_once] for each in flat]


def rounded(value: Tensor, chance: Tensor) -> Tensor:
    """fp32 -> fp32 that bf16 holds: up with the probability of how far it is on the way up, away from zero for both signs.

    chance: int16, all values alike probable. A number that bf16 holds stays; so do NaN and infinities.
    """
    # bf16 is the upper half of fp32's bits: noise below carries into it as often as what is below is large.
    noisy = value.view(torch.int32) + (chance.to(torch.int32) & 0xFFFF)
    return torch.where(value.isfinite(), (noisy & -0x10000).view(torch.float32), value)


def _seed(*parts: object) -> int:
    """63 bits, from the texts of `parts`."""
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest(), "little") >> 1
