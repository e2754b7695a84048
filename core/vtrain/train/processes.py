"""The processes that train together, through accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import nn

from vtrain.contract import VtrainError

T = TypeVar("T")

FILLING_CACHES = timedelta(days=7)
"""The others wait for the first process to fill the caches, which may take long."""


def planned_processes() -> int:
    """How many processes the launcher started, before torch is imported by anything that plans."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Processes:
    """This process among its peers: device, autocast, DDP, and what all must agree on."""

    def __init__(self, mixed: str) -> None:
        """mixed: "bf16" or "no". Without an accelerator it must be told `cpu`, or torchrun starts unsynchronised copies."""
        on_cpu = not torch.accelerator.is_available()
        patience = InitProcessGroupKwargs(timeout=FILLING_CACHES)
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=on_cpu, kwargs_handlers=[patience])

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def count(self) -> int:
        num_processes: int = self.accelerator.num_processes
        return num_processes

    @property
    def rank(self) -> int:
        process_index: int = self.accelerator.process_index
        return process_index

    @property
    def first(self) -> bool:
        is_main_process: bool = self.accelerator.is_main_process
        return is_main_process

    def wrap(self, step: nn.Module) -> nn.Module:
        """Autocast, and DDP when there are several processes."""
        wrapped: nn.Module = self.accelerator.prepare_model(step)
        return wrapped

    def unsynchronised(self, step: nn.Module, *, when: bool) -> AbstractContextManager[Any]:
        """No gradient exchange inside, for all but the last micro-batch of an optimizer step."""
        return self.accelerator.no_sync(step) if when and self.count > 1 else nullcontext()

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first process, on all; only the first calls it.

        An error of the user's there is raised on all; the others leave the telling to the first.
        """
        if self.count == 1:
            return make()
        box: list[Any] = [None]
        if self.first:
            try:
                box = [make()]
            except VtrainError as error:
                box = [error]
        broadcast_object_list(box, from_process=0)
        if not isinstance(box[0], VtrainError):
            made: T = box[0]
            return made
        box[0].told = not self.first
        raise box[0]

    def gathered(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other."""
        return list(gather_object(values)) if self.count > 1 else values

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group, if there is one."""
        if self.count > 1:
            torch.distributed.destroy_process_group()
