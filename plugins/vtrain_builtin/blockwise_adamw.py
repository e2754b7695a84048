"""bitsandbytes' 8-bit AdamW, whose state a checkpoint can hold and whose steps do not wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor

MAPS = ("qmap1", "qmap2")


class BlockwiseAdamW(AdamW8bit):  # type: ignore[misc]
    """Each parameter's state without the two tables of what its 256 codes mean: constants of the library, and of all parameters
    the same memory, which a file of tensors refuses."""

    initialized: bool

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """As the library has it, but for its wait for the device after each weight."""
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for number, group in enumerate(self.param_groups):
            for at, weight in enumerate(group["params"]):
                if weight.grad is not None:
                    self._move(group, weight, number, at)

    def _move(self, group: dict[str, Any], weight: Tensor, number: int, at: int) -> None:
        state = self.state[weight]
        if not state:
            self.init_state(group, weight, number, at)
        if state["state1"].dtype == torch.uint8:
            self._to(weight)
            state.update(qmap1=self.name2qmap["dynamic"], qmap2=self.name2qmap["udynamic"])
        self.update_step(group, weight, number, at)
        for name in MAPS:
            state.pop(name, None)

    def _to(self, weight: Tensor) -> None:
        """The tables to its device; init_state does so too, but not where a checkpoint brought the state."""
        if self.name2qmap["dynamic"].device != weight.device:
            for name in ("dynamic", "udynamic"):
                self.name2qmap[name] = self.name2qmap[name].to(weight.device)
