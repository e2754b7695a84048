"""The one place that talks to an accelerator: which one, its streams of work, memory, seeds, autocast, figures and failures.

All that only a GPU answers is asked here alone, so that one file knows how devices differ: a CPU has no queue and no memory of
its own, CUDA and XPU cards have numbers and a current one for each thread, Apple's MPS has neither. Importing it imports no torch.

Copies run on the stream that computes. A second one would hide about 0.4 % of a step (63 MB of features at 25 GB/s) and cost
memory: what one stream allocates and another uses is free again only when the device has caught up with the host.
"""

from __future__ import annotations

import gc
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vtrain.contract.errors import DeviceError, Problem
from vtrain.contract.rooms import answer, nvml

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""The environment variable that makes cuBLAS use the same scratch memory each time (NVIDIA cuBLAS, "Results reproducibility")."""

BUSY = 1 << 30
"""Bytes of a card that must be in use by others before a run says so: a desktop takes less."""

ON_CPU = "CUDA_VISIBLE_DEVICES= (empty) runs on the CPU instead."

CPU_IS_FULL = "DefaultCPUAllocator: can't allocate memory"
_STATUS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
CARD_IS_FULL = ("CUDA error: out of memory", "MPS backend out of memory", *_STATUS)
NOT_DETERMINISTIC = ("does not have a deterministic implementation", "not deterministic because it uses CuBLAS")
"""How torch words what it raises as a plain RuntimeError."""


@dataclass(frozen=True)
class Figures:
    """What NVIDIA's management library (NVML) says of a whole card, whoever uses it; None: it does not know.

    total, used: bytes. utilisation: per cent of the last sample period in which a kernel ran. temperature: degrees Celsius. watts:
    drawn now. processes: process id -> bytes, of all that compute there (0: not known), as the host numbers them.
    """

    total: int
    used: int
    utilisation: int | None
    temperature: int | None
    watts: float | None
    processes: dict[int, int]


@dataclass(frozen=True)
class Device:
    """A CPU, or one accelerator. kind: torch's name of it, "cpu", "cuda", "xpu", "mps". index: its number, None where it has none.

    `str(device)` is what torch and plugins take: "cpu", "cuda:0".
    """

    kind: str = "cpu"
    index: int | None = None

    @classmethod
    def of(cls, place: str | torch.device | Tensor) -> Device:
        """Of a name ("cuda:1"), a torch.device or a tensor. A card without a number is the current one: torch asks for one."""
        name = place if isinstance(place, str) else str(getattr(place, "device", place))
        kind, _, number = name.partition(":")
        if kind in ("cpu", "meta") or not hasattr(module := cls(kind)._module, "set_device"):
            return cls(kind)  # torch numbers MPS's tensors, whose functions take no number
        return cls(kind, int(number) if number else module.current_device())

    @classmethod
    def find(cls, rank: int = 0, processes: int = 1) -> tuple[Device, tuple[str, ...]]:
        """The device of this process, ready to work, and what the user should know of it.

        rank: this process's number on this machine; processes: how many there are here. Raises DeviceError for fewer cards than
        processes, and for a card that is there and cannot be used: a driver too old for this torch, one held by another process.
        """
        import torch

        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None:
            unused = f"this torch is a CPU build: the machine's NVIDIA cards ({_cards()}) are not used"
            return cls(), ((unused,) if _cards() else ())
        kind = accelerator.type
        count, trouble = _count(cls(kind)._module)
        if not count:
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES") if kind == "cuda" else None
            why = f'CUDA_VISIBLE_DEVICES is "{hidden}"' if hidden is not None else f"torch finds no {kind} device"
            return cls(), (f"{why}{trouble}: running on the CPU",)
        if processes > count:
            what = f"{processes} processes were started on this machine, and torch sees {count} {kind} device{'s' * (count > 1)}."
            raise DeviceError(Problem("", what, "Start one process for each card (torchrun --nproc_per_node)."))
        device = cls.of(f"{kind}:{rank}" if hasattr(cls(kind)._module, "set_device") else kind)
        others = device._others()
        device.use()
        return device, others

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"

    @property
    def torch(self) -> torch.device:
        import torch

        return torch.device(str(self))

    @property
    def accelerated(self) -> bool:
        return self.kind not in ("cpu", "meta")

    @property
    def name(self) -> str:
        """What people call it: "NVIDIA H100 80GB HBM3"."""
        return str(self._ask("get_device_name", str(self)))

    @property
    def kernels(self) -> str:
        """Whose kernels torch takes: the card's name, or that of the CPU's instructions, such as "AVX512"."""
        import torch

        return self.name if self.accelerated else torch.backends.cpu.get_cpu_capability()

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA's compute capability: (9, 0) is Hopper. None for others."""
        found = self._ask("get_device_capability", None) if self.kind == "cuda" else None
        return None if found is None else (int(found[0]), int(found[1]))

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bf16 itself. Others only emulate it and are slower than in fp32: CUDA before Ampere (8.0)
        several times; a forward and backward pass of a tiny Sana 2.2 times on x86 with AVX-512 alone, 10 times with AVX2."""
        if self.kind == "cpu":
            import torch

            known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
            return known.get("architecture") != "x86_64" or bool(known.get("avx512_bf16") or known.get("amx_bf16"))
        capability = self.capability
        return capability is None or capability >= (8, 0)

    @property
    def _module(self) -> Any:
        """torch.cuda, torch.xpu ...: the functions of its kind."""
        import torch

        return torch.get_device_module(self.kind)

    def _ask(self, function: str, otherwise: Any) -> Any:
        """What a function of its module answers for this device; `otherwise` on a CPU, and where a kind lacks the function."""
        if not self.accelerated or not hasattr(self._module, function):
            return otherwise
        return getattr(self._module, function)(*(() if self.index is None else (self.index,)))

    # -- work ------------------------------------------------------------------------------------------------------------

    def use(self) -> None:
        """Make it the calling thread's current device: else a thread opens a context on the first card. Raises DeviceError."""
        try:
            self._ask("set_device", None)
            self._ask("synchronize", None)  # opens the card, so that what is wrong with it is found here
        except RuntimeError as error:
            remedy = f"It may be full, held by another process alone, or have a driver that does not fit this torch. {ON_CPU}"
            raise DeviceError(
                Problem(str(self), f"the card cannot be opened: {_first_line(error)}.", remedy)
            ) from error

    def pin(self, tensor: Tensor) -> Tensor:
        """A tensor of the CPU in page-locked memory, from which it can go to this device without anybody waiting."""
        return tensor.pin_memory() if self._pins(tensor) else tensor

    def move(self, tensor: Tensor) -> Tensor:
        """The tensor on this device; from the CPU, nobody waits for the copy."""
        return tensor.pin_memory().to(self.torch, non_blocking=True) if self._pins(tensor) else tensor.to(self.torch)

    def copy_out(self, tensors: Sequence[Tensor], into: Sequence[Tensor]) -> Callable[[], None]:
        """Copy its tensors into those of `pin`, after all that was asked of it before; who calls what it gives waits for them."""
        for tensor, place in zip(tensors, into, strict=True):
            place.copy_(tensor, non_blocking=self._pins(place))
        event = self._module.Event()
        event.record()
        return lambda: event.synchronize()

    def _pins(self, tensor: Tensor) -> bool:
        """MPS shares its memory with the CPU."""
        return self.accelerated and tensor.device.type == "cpu" and hasattr(self._module, "set_device")

    def synchronise(self) -> None:
        """Wait until all that was asked of it is done."""
        self._ask("synchronize", None)

    def seed(self, seed: int) -> None:
        """Seed what draws without a generator of its own, such as dropout: on the CPU, and on this device."""
        import torch

        # torch.manual_seed would also note a stack trace for a CUDA that never starts: 2 ms of a tiny model's step of 37.
        torch.default_generator.manual_seed(seed)
        if self.accelerated:
            self._module.manual_seed(seed)

    def autocast(self, dtype: Literal["bf16"] | None, *, cached: bool = True) -> AbstractContextManager[Any]:
        """Products in bf16 inside, or with None everything in the types that it has. cached: whether copies of weights in bf16 stay
        until its end, for their next use."""
        import torch

        return torch.autocast(self.kind, torch.bfloat16, enabled=dtype is not None, cache_enabled=cached)

    @property
    def autocasting(self) -> bool:
        """Whether autocast is on here and now."""
        import torch

        return torch.is_autocast_enabled(self.kind)

    # -- memory ----------------------------------------------------------------------------------------------------------

    def peak(self) -> int:
        """Most bytes that tensors took on it since the last `reset_peak`; on a CPU the resident bytes of this process now."""
        if not self.accelerated:
            import psutil

            return int(psutil.Process().memory_info().rss)
        return int(self._ask("max_memory_allocated", None) or self.allocated())

    def reset_peak(self) -> None:
        self._ask("reset_peak_memory_stats", None)

    def allocated(self) -> int:
        """Bytes of tensors on it now; 0 on a CPU."""
        if hasattr(self._module, "current_allocated_memory"):  # MPS
            return int(self._module.current_allocated_memory())
        return int(self._ask("memory_allocated", 0))

    def free(self) -> tuple[int, int] | None:
        """(free, total) bytes of the card, all processes counted; None where it does not say."""
        found = self._ask("mem_get_info", None)
        return None if found is None else (int(found[0]), int(found[1]))

    def limit(self, size: int | None) -> None:
        """Let tensors of this process take so many bytes of the card at most, from here on: beyond it the card counts as full.

        Kernels that want more for themselves then do with less, as on a full card. None: all of it again. Kinds without such a
        limit have none.
        """
        room = self.free()
        if room is None or not hasattr(self._module, "set_per_process_memory_fraction"):
            return
        share = 1.0 if size is None else min(1.0, max(0, size) / room[1])
        if share < 1 or self._ask("get_per_process_memory_fraction", 1.0) < 1:
            self._module.set_per_process_memory_fraction(share, self.index)

    def release(self) -> None:
        """Give memory of dropped tensors back to the device, for models that come and go."""
        gc.collect()
        if self.accelerated:
            self._module.empty_cache()

    # -- bit for bit -----------------------------------------------------------------------------------------------------

    def deterministic(self) -> None:
        """From here on, for the life of the process, the same work gives the same bits, or fails loudly where an operation has
        no such form. Before any work: cuBLAS reads its setting when it is first used."""
        import torch

        os.environ.setdefault(WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        # It would also fill every new tensor with NaN: a pass over memory that finds bugs, and changes no result.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # its module makes it
        torch.backends.cudnn.benchmark = False

    # -- what goes wrong -------------------------------------------------------------------------------------------------

    @contextmanager
    def explained(self, doing: str, remedies: Sequence[str]) -> Iterator[None]:
        """Turn what a device refuses into a DeviceError that says what was asked for, what is free, and what lowers it.
        doing: "training"; remedies: settings, the likeliest first."""
        import torch

        try:
            yield
        except RuntimeError as error:
            text = _first_line(error)
            if CPU_IS_FULL in text:  # also beside a card: it is the host's memory that ran out
                raise DeviceError(Device()._out_of_memory(error, doing, remedies)) from error
            if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in CARD_IS_FULL):
                raise DeviceError(self._out_of_memory(error, doing, remedies)) from error
            if not any(words in text for words in NOT_DETERMINISTIC):
                raise
            text = text.partition(", but you set")[0]
            remedy = "Set run.deterministic = false: the run still trains, but a resumed one may differ in last bits."
            raise DeviceError(Problem(str(self), f"run.deterministic cannot be kept: {text}.", remedy)) from error

    def _out_of_memory(self, error: Exception, doing: str, remedies: Sequence[str]) -> Problem:
        asked = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
        parts = [*getattr(error, "__notes__", ()), _first_line(error)]  # a note says at which step
        if asked:
            parts[-1] = f"{_amount(*asked.groups())} were asked for"
        room = self.free()
        if room is not None:
            own = int(self._ask("memory_reserved", 0))
            parts.append(f"{gib(room[0])} of {gib(room[1])} are free")
            parts.append(f"this process holds {gib(own)}")
            if (rest := room[1] - room[0] - own) > BUSY:
                parts.append(f"{gib(rest)} are held by others and by CUDA itself")
        what = f"out of memory while {doing}: {', '.join(parts)}."
        place = f"{self} ({self.name})" if self.accelerated else "this machine's memory"
        return Problem(place, what, f"What lowers it: {'; '.join(remedies)}." if remedies else "")

    def _others(self) -> tuple[str, ...]:
        """Who else works on this card, before this process does."""
        figures = self.figures()
        if figures is None:
            return ()
        pids = [pid for pid in figures.processes if pid != os.getpid()]
        if figures.used < BUSY and not pids:
            return ()
        who = f" (process {', '.join(map(str, pids))})" if pids else ""
        return (
            f"{self} ({self.name}) is in use by others{who}: {gib(figures.used)} of {gib(figures.total)} are taken; "
            "both get slower and may run out of memory",
        )

    def figures(self) -> Figures | None:
        """NVML's figures of this card; None where there is no NVIDIA card, driver or nvidia-ml-py."""
        if self.kind != "cuda":
            return None
        with nvml() as library:
            if library is None:
                return None
            try:
                # By its UUID: CUDA_VISIBLE_DEVICES renumbers cards for torch, not for the driver.
                handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{self._module.get_device_properties(self.index).uuid}")
                memory = library.nvmlDeviceGetMemoryInfo(handle)
                return Figures(
                    total=int(memory.total),
                    used=int(memory.used),
                    utilisation=answer(library, lambda: int(library.nvmlDeviceGetUtilizationRates(handle).gpu)),
                    temperature=answer(
                        library, lambda: int(library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU))
                    ),
                    watts=answer(library, lambda: library.nvmlDeviceGetPowerUsage(handle) / 1000),
                    processes=answer(library, lambda: _processes(library, handle)) or {},
                )
            except Exception:  # noqa: BLE001 - a driver older than the library raises what is no NVMLError
                return None


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _amount(number: str, unit: str) -> str:
    """Torch gives bytes of a CPU, and the nearest unit of a card."""
    return gib(int(number)) if unit == "bytes" else f"{number} {unit}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _count(module: Any) -> tuple[int, str]:
    """Cards of a kind that torch can use, and what it warned of in looking. Raises DeviceError if there are some that it cannot."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable, seen = module.is_available(), module.device_count()
    trouble = "; ".join(dict.fromkeys(_first_line(Exception(str(warning.message))) for warning in caught))
    if usable:
        return seen, ""
    if not seen:
        return 0, f" ({trouble})" if trouble else ""
    try:
        module.init()  # says why, where is_available only says no
    except RuntimeError as error:
        trouble = _first_line(error)
    remedy = f"Install the driver that this torch needs, or a torch built for this driver. {ON_CPU}"
    what = f"this machine has {seen} card{'s' * (seen > 1)} that torch cannot use: {trouble or 'it does not say why'}."
    raise DeviceError(Problem("", what, remedy))


def _cards() -> int:
    """NVIDIA cards of this machine, whatever torch makes of them."""
    with nvml() as library:
        return (answer(library, lambda: int(library.nvmlDeviceGetCount())) or 0) if library is not None else 0


def _processes(library: Any, handle: Any) -> dict[int, int]:
    return {each.pid: int(each.usedGpuMemory or 0) for each in library.nvmlDeviceGetComputeRunningProcesses(handle)}
