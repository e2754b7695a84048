"""Schedule-free AdamW that says what its average is."""

from __future__ import annotations

from typing import Any

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor


class AveragingAdamW(AdamWScheduleFree):  # type: ignore[misc]
    """SupportsEvalWeights. The library's own eval() would overwrite the training weights, and train() not bring back their bits."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, **options)
        # Asked of each weight at each update of an average: a search through the groups would be of them all, each time.
        self._group_of = {id(weight): group for group in self.param_groups for weight in group["params"]}

    @torch.no_grad()
    def eval_weight(self, weight: Tensor) -> Tensor:
        """x of a weight y: y = beta1 x + (1 - beta1) z solved for x, as the library's eval() does."""
        z = self.state.get(weight, {}).get("z")
        if z is None:  # before its first step
            return weight.detach().clone()
        beta1 = self._group_of[id(weight)]["betas"][0]
        return weight.detach().lerp(z, 1 - 1 / beta1)
