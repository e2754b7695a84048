"""The processes that train together, through accelerate."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from accelerate.utils.dataclasses import KwargsHandler
from torch import distributed as dist
from torch import nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from vtrain.contract import Device, DeviceError, Problem, TrainingError, VtrainError
from vtrain.plan.parallel import OWN_STORE
from vtrain.train.heartbeat import Heartbeat, gone

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long processes wait for each other's word at most: the first may fill caches or save for hours, and a heartbeat shows
whether it does. Gradients keep torch's own limit."""


STALE = (
    "torchrun on several machines keeps what processes that have died said of themselves, and those that it starts in their place "
    "may wait for them for ever."
)


_GLOO = timedelta(minutes=30)
"""torch's own limit on a CPU; accelerate gives a card's to a group that is made in another way than torch's."""


class Processes:
    """This process among its peers: device, autocast, DDP, and what all must agree on.

    Words (objects, votes) go through a group of their own on the CPU, so that agreeing never waits for a device.
    """

    def __init__(self, mixed: str, stored: str = "fp32") -> None:
        """mixed: "bf16" or "no". stored: the type of the denoiser's weights.

        notices: what the user should know of the device. Raises DeviceError for one that cannot be used, or a card without bf16.
        """
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        # A launcher that names the rank alone has started at least so many.
        self.device, notices = Device.find(rank, int(os.environ.get("LOCAL_WORLD_SIZE", rank + 1)))
        self.notices = (*notices, *_precision(self.device, mixed, stored), *_launcher(self.device))
        self.accelerator = _accelerator(self.device, mixed)
        self.count: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.first: bool = self.accelerator.is_main_process
        self.words = dist.new_group(backend="gloo", timeout=PATIENCE) if self.count > 1 else None
        self.heartbeat = Heartbeat.of_group(self.rank, self.count) if self.count > 1 else None

    @property
    def machine(self) -> dict[str, str]:
        """What decides over the last bits of a run, beside its settings."""
        device = self.device.kernels if self.device.accelerated else f"{_processor()}, {self.device.kernels}"
        threads = str(torch.get_num_threads())
        return {"torch": torch.__version__, "python": platform.python_version(), "device": device, "threads": threads}

    def wrap(self, step: nn.Module, *, sharded: bool = False) -> nn.Module:
        """Autocast, and DDP when there are several processes. All that is to be on the device is there: it is not moved.

        sharded: its processes keep shares of it (`Shares`), which exchange gradients by themselves.
        """
        if sharded:
            step.forward = self._uncached(step.forward)  # what is called inside of the hooks that gather weights
            return step
        wrapped: nn.Module = self.accelerator.prepare_model(step, device_placement=False)
        return wrapped

    def _uncached(self, forward: Callable[..., T]) -> Callable[..., T]:
        """Under autocast, without its copies of weights: of each block's they would stay until the last block has run."""

        def within(*given: Any) -> T:
            with self.autocast(cached=False):
                return forward(*given)

        return within

    def autocast(self, *, cached: bool = True) -> AbstractContextManager[Any]:
        """As in training (`Device.autocast`)."""
        return self.device.autocast("bf16" if self.accelerator.mixed_precision == "bf16" else None, cached=cached)

    def let_go(self) -> None:
        """Forget what was wrapped: accelerate keeps a list of it, and with it all weights, for as long as this object lives."""
        self.accelerator.free_memory()

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
        self.any()
        dist.broadcast_object_list(box, src=0, group=self.words)
        if not isinstance(box[0], VtrainError):
            made: T = box[0]
            return made
        box[0].reported = not self.first
        raise box[0]

    def gathered(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other."""
        if self.count == 1:
            return values
        lists: list[Any] = [None] * self.count
        self.any()
        dist.all_gather_object(lists, values, group=self.words)
        return [value for part in lists for value in part]

    def lost(self, error: BaseException) -> TrainingError | None:
        """What is to be said of an error that came of another process's end; None for any other error."""
        words = str(error)
        torn = isinstance(error, dist.DistError) or any(sign in words for sign in ("gloo/transport", "closed by peer"))
        if self.count == 1 or not (isinstance(error, RuntimeError) and torn):
            return None
        what = "another process of this run has ended, or cannot be reached any more; its own words stand above or in its log."
        found = gone(self.rank, self.count, what)
        found.reported = not self.first
        return found

    def any(self, *votes: bool) -> tuple[bool, ...]:
        """For each vote, whether any process says yes. Without votes: wait for all, for as long as all give signs of life."""
        if self.heartbeat is None:
            return votes
        counted = torch.tensor([*votes, False], dtype=torch.int32)
        self.heartbeat.wait(dist.all_reduce(counted, dist.ReduceOp.MAX, group=self.words, async_op=True))
        return tuple(bool(vote) for vote in counted[:-1].tolist())

    def close(self, *, failed: bool = False) -> None:
        """Leave the process group, if there is one. failed: this process alone has, and others may be inside a collective, which
        leaving would join: they find out as it ends.

        Alone, the next run of this process may choose another precision, which accelerate keeps for as long as its state lives.
        """
        if self.heartbeat is None:
            AcceleratorState._reset_state(reset_partial_state=True)
            return
        self.heartbeat.stop()
        if not failed:
            dist.destroy_process_group()


def _precision(device: Device, *types: str) -> Iterator[str]:
    """What is to be said of bf16 on it, where one of these is that. Raises DeviceError for a card without."""
    if "bf16" not in types or device.has_bf16:
        return
    remedy = 'precision.mixed = "no" and precision.base = "fp32"'
    if device.accelerated:
        capability = ".".join(map(str, device.capability or ()))
        what = f"this card computes no bf16 (its compute capability is {capability})."
        remedy = f"Set {remedy}, or use a card of 8.0 (Ampere) or later."
        raise DeviceError(Problem(f"{device} ({device.name})", what, remedy))
    yield f"this processor has no bf16 instructions that torch uses: it is faster with {remedy}"


def _launcher(device: Device) -> Iterator[str]:
    """What is to be said of how processes were started. Raises DeviceError where they could not work together."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return
    found = None
    if dist.get_default_backend_for_device(device.torch) == "nccl" and not dist.is_nccl_available():
        what = "this torch was built without NCCL, through which processes on NVIDIA and AMD cards exchange gradients."
        found = Problem(str(device), what, "Install torch's own build for Linux, or train one process.")
    on_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if _shares_store() and not on_one_machine and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        if _restarts():
            found = Problem("", STALE, f"Set {OWN_STORE}=1 where torchrun is started, and start it everywhere again.")
        yield f"{STALE} Set {OWN_STORE}=1 where torchrun is started"
    if found is not None:
        error = DeviceError(found)
        error.reported = os.environ.get("LOCAL_RANK", "0") != "0"  # all processes of a machine find the same: said once
        raise error


def _accelerator(device: Device, mixed: str) -> Accelerator:
    """Raises DeviceError if it computes elsewhere, or if processes do not find each other."""
    # Without an accelerator it must be told `cpu`, or torchrun starts unsynchronised copies.
    try:
        found = Accelerator(mixed_precision=mixed, cpu=not device.accelerated, kwargs_handlers=_meeting(device))
    except ValueError as error:
        what = f"accelerate is in use in this process already, otherwise than this run needs it: {error}"
        raise DeviceError(Problem("", what, "Train in a process of its own, or before accelerate is used.")) from None
    except dist.DistError as error:
        raise _unmet(error) from None
    # accelerate names the card of a single process without its number.
    placed, ours = found.device, device.torch
    if placed.type != ours.type or (ours.index is not None and placed.index not in (None, ours.index)):
        what = f"accelerate was set to compute on {placed}, and this process would take {device}."
        AcceleratorState._reset_state(reset_partial_state=True)  # or the next run of this process could not choose
        remedy = "Unset ACCELERATE_USE_CPU and ACCELERATE_TORCH_DEVICE; CUDA_VISIBLE_DEVICES chooses cards."
        raise DeviceError(Problem("", what, remedy))
    return found


def _restarts() -> int:
    """How often torchrun has started these processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def _shares_store() -> bool:
    """Whether processes find each other by a store that torchrun keeps for all that it starts, one after the other."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _meeting(device: Device) -> list[KwargsHandler]:
    """How processes find each other: those that torchrun started again apart from what the dead left in its store."""
    if not (_restarts() and _shares_store()):
        return []
    with suppress(RuntimeError):  # by an earlier run of this process
        register_rendezvous_handler("vtrain", _apart)  # type: ignore[no-untyped-call]
    timeout = None if device.accelerated else _GLOO
    return [InitProcessGroupKwargs(init_method="vtrain://", timeout=timeout)]


def _apart(_url: str, **options: Any) -> Iterator[tuple[Any, int, int]]:
    for store, rank, count in rendezvous("env://", **options):
        yield PrefixStore(f"restart {_restarts()}", store), rank, count


def _unmet(error: Exception) -> DeviceError:
    """Why processes did not find each other."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if "EADDRINUSE" in str(error):
        what = f"port {port} of this machine (MASTER_PORT), where the processes are to meet, is in use."
        return DeviceError(
            Problem("", what, "Choose another one, or unset MASTER_PORT: run.processes then finds a free one.")
        )
    what = f"this process does not reach the first one at {address}, port {port} (MASTER_ADDR, MASTER_PORT): {error}"
    remedy = "Name an address of the first machine that the others reach, and a port that no firewall closes."
    return DeviceError(Problem(f"process {int(os.environ.get('RANK', '0')) + 1}", what, remedy))


def _processor() -> str:
    """Its name, as far as the system tells it: libraries choose among their kernels by it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
