"""An optimizer whose states lie in the machine's memory: its step is made there, on copies of what is trained.

The plugin's own optimizer, built over these copies: before its step the gradients come from the card, after it what it moved goes
back. So the states are as large as without, elsewhere, and a checkpoint of them is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtrain.contract import Device
from vtrain.contract.transfers import Transfers


class HostWeights:
    """Copies on the CPU, page-locked, of parameters on a device. named: (name, copy), as the parameters are named."""

    def __init__(self, trained: list[tuple[str, Tensor]], device: Device) -> None:
        self._trained = [parameter for _, parameter in trained]
        self._transfers = Transfers(device)
        self._device = device
        self.named: list[tuple[str, Tensor]] = [
            (name, torch.nn.Parameter(device.pin(parameter.detach().to("cpu", copy=True))))
            for name, parameter in trained
        ]
        self._gradients: list[Tensor | None] = [None] * len(trained)

    @property
    def _copies(self) -> list[Tensor]:
        return [copy.detach() for _, copy in self.named]

    def step_here(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer of the copies step for the parameters."""
        optimizer.register_step_pre_hook(lambda *_: self._take_gradients())
        optimizer.register_step_post_hook(lambda *_: self.give_back())

    def give_back(self) -> None:
        """What the optimizer, or its other set of weights, is now, to the parameters."""
        self._transfers.put(zip(self._copies, (each.detach() for each in self._trained), strict=True))

    def _take_gradients(self) -> None:
        """To the copies. On the device they are gone afterwards, as after zero_grad."""
        pairs = []
        for number, (parameter, (_, copy)) in enumerate(zip(self._trained, self.named, strict=True)):
            gradient = parameter.grad
            if gradient is None:
                copy.grad = None
                continue
            kept = self._gradients[number]
            if kept is None:
                kept = self._gradients[number] = self._device.pin(torch.empty_like(gradient, device="cpu"))
            pairs.append((gradient, kept))
            copy.grad = kept
        self._transfers.fetch(pairs)
        for parameter in self._trained:
            parameter.grad = None
