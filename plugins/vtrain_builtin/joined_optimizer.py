"""Several optimizers, each of some of the weights, that are one to whoever steps, schedules and saves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


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
