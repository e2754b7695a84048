"""Schedule-free AdamW that says what its average is."""

from __future__ import annotations

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor


class AveragingAdamW(AdamWScheduleFree):  # type: ignore[misc]
    """SupportsEvalWeights. The library's own eval() would overwrite the training weights, and train() not bring back their bits."""

    @torch.no_grad()
    def eval_weight(self, weight: Tensor) -> Tensor:
        """x of a weight y: y = beta1 x + (1 - beta1) z solved for x, as the library's eval() does."""
        beta1 = next(
            group["betas"][0] for group in self.param_groups if any(weight is each for each in group["params"])
        )
        z = self.state.get(weight, {}).get("z")
        if z is None or not beta1:  # before its first step, or where y is z
            return weight.detach().clone()
        return weight.detach().lerp(z, 1 - 1 / beta1)
