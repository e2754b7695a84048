"""How much memory there is for a process: of its card, less what others hold there, and of this machine. No torch.

A plan asks before torch is loaded, so a card is asked through NVIDIA's management library (NVML) alone. NVML numbers all cards of a
machine, whatever CUDA_VISIBLE_DEVICES says; so what that variable names is looked up here, by number or by UUID, MIG slices too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

UNITS: Mapping[str, int] = {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}

_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", re.IGNORECASE)
_NO_LIMIT = 2**60
"""Above it a control group's figure means that there is no limit (version 1 gives the largest whole number of pages)."""


def bytes_of(text: str) -> int:
    """ "16 GiB" -> 17179869184. Raises ValueError for anything else."""
    found = _AMOUNT.fullmatch(text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ValueError(f'"{text}" is no amount of memory: give a number with a unit, such as "16 GiB" or "800 MiB"')
    size = int(float(found[1]) * units[found[2].lower()])
    if not size:
        raise ValueError(f'"{text}" is no memory at all')
    return size


@dataclass(frozen=True)
class Room:
    """Memory for a process, in bytes. device: of its card, or of the machine where it trains on the CPU; None: not known.

    held: what others hold of that. name: of the card, "" for the machine's memory. host: its share of the machine's memory or of
    the control group's, less what others hold; None: not known.
    """

    device: int | None = None
    held: int = 0
    name: str = ""
    host: int | None = None

    @property
    def free(self) -> int | None:
        return None if self.device is None else max(0, self.device - self.held)


def least_room(rooms: Sequence[Room]) -> Room:
    """What each of several processes has for sure, of what each of them found at its own time."""
    least = min(rooms, key=lambda room: (room.free is None, room.free))
    hosts = [room.host for room in rooms if room.host is not None]
    return replace(least, host=min(hosts, default=None))


def find_room(processes: int = 1, environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Room:
    """The room of each of `processes` on this machine: the smallest of their cards, so that all plan alike; else its share of the
    machine's memory.

    root: of the files of /proc and /sys.
    """
    whole = host_memory(root)
    host = None if whole is None else whole // processes
    cards = visible_cards(environment)[:processes]
    if not cards:
        return Room(host, 0, "", host)
    return replace(least_room(cards), host=host)


def visible_cards(environment: Mapping[str, str] = os.environ) -> list[Room]:
    """NVIDIA cards and MIG slices that CUDA would show to this process, in its order.

    By number, CUDA may count the fastest first (CUDA_DEVICE_ORDER): where that can matter, the order is by free memory, the
    least first. [] where there is no card, driver or nvidia-ml-py.
    """
    named = environment.get("CUDA_VISIBLE_DEVICES")
    with nvml() as library:
        if library is None:
            return []
        handles = [library.nvmlDeviceGetHandleByIndex(number) for number in range(library.nvmlDeviceGetCount())]
        if named is None:
            chosen = [_slice(library, handle) for handle in handles]
        else:
            chosen = list(_named(library, handles, [each.strip() for each in named.split(",")]))
        rooms = [_room(library, handle) for handle in chosen]
    by_number = named is None or all(each.strip().isdigit() for each in named.split(","))
    alike = len({(room.name, room.device) for room in rooms}) <= 1
    if by_number and not alike and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        rooms.sort(key=lambda room: room.free or 0)
    return rooms


def _named(library: Any, handles: Sequence[Any], names: Sequence[str]) -> Iterator[Any]:
    """What CUDA_VISIBLE_DEVICES names, up to the first that is not there, as CUDA has it."""
    for name in names:
        found = None
        if name.isdigit():
            found = handles[int(name)] if int(name) < len(handles) else None
            found = None if found is None else _slice(library, found)
        elif name.startswith("MIG-"):
            found = answer(library, lambda name=name: library.nvmlDeviceGetHandleByUUID(name))  # type: ignore[misc]
        elif name:
            # A UUID may be shortened, as far as it is the only one.
            ids = [(_text(library.nvmlDeviceGetUUID(handle)), handle) for handle in handles]
            alike = [handle for uuid, handle in ids if uuid.startswith(name)]
            found = alike[0] if len(alike) == 1 else None
        if found is None:
            return
        yield found


def _slice(library: Any, handle: Any) -> Any:
    """The card, or where it is cut in slices (MIG) the first, which is all that CUDA takes of it by number."""
    mode = answer(library, lambda: library.nvmlDeviceGetMigMode(handle))
    if not mode or not mode[0]:
        return handle
    return answer(library, lambda: library.nvmlDeviceGetMigDeviceHandleByIndex(handle, 0)) or handle


def _room(library: Any, handle: Any) -> Room:
    memory = library.nvmlDeviceGetMemoryInfo(handle)
    name = answer(library, lambda: _text(library.nvmlDeviceGetName(handle))) or "a card"
    return Room(int(memory.total), int(memory.used), name)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def host_memory(root: Path = Path("/")) -> int | None:
    """Bytes of this machine that a process can take: the least of its control groups' limits and of what is not in use.

    What others hold is not in it; file caches, which the kernel gives up, are.
    """
    system = _meminfo(root / "proc/meminfo")
    amounts = [] if system is None else [system]
    for folder, limit, usage, cached in _groups(root):
        most = _number(folder / limit)
        if most is not None and most < _NO_LIMIT:
            used = _number(folder / usage) or 0
            amounts.append(max(0, most - used + _inactive(folder / "memory.stat", cached)))
    return min(amounts, default=None)


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Control groups of this process that may limit memory, inner ones first: folder, and what their files are called."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = Path(path.lstrip("/"))
        # In a container the path is often the host's: what is mounted is then the group itself.
        for part in (inner, *inner.parents):
            yield top / part, *names


def _meminfo(file: Path) -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        import psutil

        return int(psutil.virtual_memory().available)
    return int(found[1]) * 1024 if found else None


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _inactive(file: Path, key: str) -> int:
    try:
        found = re.search(rf"^{key} (\d+)$", file.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


@contextmanager
def nvml() -> Iterator[Any]:
    """NVIDIA's management library at work; None where it, or its driver, is missing."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def answer(library: Any, ask: Callable[[], T]) -> T | None:
    """None for a figure that this card or its driver does not give."""
    try:
        return ask()
    except library.NVMLError:
        return None
