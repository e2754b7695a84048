"""torch's Muon, also of convolution kernels."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor


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
