"""Copies between the machine's memory and a card, beside what the card computes: the second stream of a `Device`.

For weights and gradients, which are large and move in a known order. Batches move on the stream that computes (see `Device`).
Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtrain.contract.device import Device

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Arriving:
    """Tensors on their way to a device. arrived: an event of the stream that copies; None: they are there."""

    tensors: tuple[Tensor, ...]
    arrived: Any = None


class Transfers:
    """Copies to one device and back. beside: on a stream of their own, where the device has streams."""

    def __init__(self, device: Device, *, beside: bool = False) -> None:
        self.device = device
        self._stream = device._module.Stream() if beside and self.streams(device) else None

    @staticmethod
    def streams(device: Device) -> bool:
        """Whether copies can run beside the computation: on CUDA and XPU cards."""
        return device.accelerated and hasattr(device._module, "Stream") and hasattr(device._module, "current_stream")

    def send(self, tensors: Sequence[Tensor]) -> Arriving:
        """Begin to copy tensors of the CPU, page-locked ones, to the device. `receive` waits."""
        place = self.device.torch
        if self._stream is None:
            return Arriving(tuple(self.device.move(each) if _plain(each) else each.to(place) for each in tensors))
        with self.device._module.stream(self._stream):
            copies = tuple(each.to(place, non_blocking=True) for each in tensors)
            return Arriving(copies, self._stream.record_event())

    def receive(self, arriving: Arriving) -> tuple[Tensor, ...]:
        """The tensors, for what is asked of the device from now on. The host does not wait."""
        if arriving.arrived is not None:
            now = self.device._module.current_stream()
            now.wait_event(arriving.arrived)
            for each in arriving.tensors:
                # Else their memory could be given to the next copy while this stream still reads it.
                each.record_stream(now)
        return arriving.tensors

    def fetch(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy the first of each pair, on the device, into the second, on the CPU. Returns when all are there."""
        for source, target in pairs:
            target.copy_(source, non_blocking=True)
        self.device.synchronise()

    def put(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy the first of each pair, on the CPU, into the second, on the device, for what is asked of it from now on.

        The first may be changed after the next `fetch`, which waits for these copies too.
        """
        for source, target in pairs:
            target.copy_(source, non_blocking=True)


def _plain(tensor: Tensor) -> bool:
    """Whether it is one tensor in memory. Quantised weights are several, which are not page-locked."""
    from torch import Tensor

    return type(tensor) is Tensor
