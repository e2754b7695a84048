"""How much memory there is: amounts as people write them, cards as CUDA shows them, control groups."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vtrain.contract.rooms import Room, bytes_of, find_room, host_memory, visible_cards

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16 GiB", 16 * GIB),
        ("24GiB", 24 * GIB),
        ("1.5 gib", 3 * GIB // 2),
        ("800 MiB", 800 << 20),
        ("16 GB", 16 * 10**9),
    ],
)
def test_amounts_are_read_as_people_write_them(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "16", "GiB", "-3 GiB", "16 GiBs", "1e3 GiB", "0 GiB", "sixteen GiB", "16 KB"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"amount of memory: give .*16 GiB|no memory at all"):
        bytes_of(text)


class NVMLError(Exception):
    pass


def library(cards: list[tuple[str, str, float, float]], slices: Mapping[str, tuple[float, float]] = {}) -> ModuleType:
    """NVML over cards of (name, uuid, GiB in all, GiB used). slices: MIG UUID -> the same two; those are of the first card."""
    made = ModuleType("pynvml")
    sizes = {uuid: (total, used) for _, uuid, total, used in cards} | dict(slices)

    def by_uuid(uuid: str) -> str:
        if uuid not in sizes:
            raise NVMLError(uuid)
        return uuid

    def mode(handle: str) -> tuple[int, int]:
        if not slices:
            raise NVMLError
        return (1, 1) if handle == cards[0][1] else (0, 0)

    functions: dict[str, Any] = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": lambda number: cards[number][1],
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetUUID": lambda handle: handle,
        "nvmlDeviceGetMigMode": mode,
        "nvmlDeviceGetMigDeviceHandleByIndex": lambda _handle, number: list(slices)[number],
        "nvmlDeviceGetName": lambda handle: next((name for name, uuid, *_ in cards if uuid == handle), "a slice"),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(
            total=int(sizes[handle][0] * GIB), used=int(sizes[handle][1] * GIB)
        ),
    }
    vars(made).update(functions)
    return made


TWO = [("H100", "GPU-aaaa-1", 80, 10), ("H100", "GPU-bbbb-2", 80, 3)]
MIXED = [("H100", "GPU-aaaa-1", 80, 10), ("RTX 4090", "GPU-bbbb-2", 24, 3)]


@pytest.mark.parametrize(
    ("cards", "environment", "free"),
    [
        (TWO, {}, [70, 77]),
        (TWO, {"CUDA_VISIBLE_DEVICES": "1"}, [77]),
        (TWO, {"CUDA_VISIBLE_DEVICES": "1,0"}, [77, 70]),
        (TWO, {"CUDA_VISIBLE_DEVICES": ""}, []),
        (TWO, {"CUDA_VISIBLE_DEVICES": "1,-1,0"}, [77]),
        (TWO, {"CUDA_VISIBLE_DEVICES": "GPU-bbbb"}, [77]),
        (TWO, {"CUDA_VISIBLE_DEVICES": "GPU-"}, []),
        (MIXED, {}, [21, 70]),
        (MIXED, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, [70, 21]),
        (MIXED, {"CUDA_VISIBLE_DEVICES": "GPU-aaaa-1"}, [70]),
    ],
)
def test_cards_are_those_that_cuda_would_show(
    monkeypatch: pytest.MonkeyPatch, cards: list[Any], environment: dict[str, str], free: list[int]
) -> None:
    """By number among different cards, where CUDA's own order is not known, the one with the least memory comes first."""
    monkeypatch.setitem(sys.modules, "pynvml", library(cards))
    assert [(room.free or 0) // GIB for room in visible_cards(environment)] == free


def test_a_slice_of_a_card_has_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = {"MIG-1": (10, 1), "MIG-2": (20, 0)}
    monkeypatch.setitem(sys.modules, "pynvml", library(TWO, slices))
    for named, free in (("MIG-2", [20]), ("MIG-2,MIG-1", [20, 9]), ("0", [9]), ("1", [77]), ("MIG-3", [])):
        assert [(each.free or 0) // GIB for each in visible_cards({"CUDA_VISIBLE_DEVICES": named})] == free, named


def test_processes_plan_for_the_least_of_their_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library(TWO))
    machine(tmp_path, available=50)
    environment = {"CUDA_VISIBLE_DEVICES": "1,0"}
    assert find_room(1, environment, tmp_path) == Room(80 * GIB, 3 * GIB, "H100", 50 * GIB)
    assert find_room(2, environment, tmp_path) == Room(80 * GIB, 10 * GIB, "H100", 25 * GIB), "which share its memory"


def test_without_a_card_the_room_is_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    machine(tmp_path, available=50)
    assert find_room(1, {}, tmp_path) == Room(50 * GIB, 0, "", 50 * GIB)


def machine(root: Path, available: int, groups: str = "", **files: str) -> None:
    """A machine's /proc and /sys. files: below /sys/fs/cgroup, "__" for "/"."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {available << 20} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    """The limit of an outer group counts too; file caches are given up; "max" is no limit."""
    files = {
        "a__b__memory_dot_max": "max", "a__memory_dot_max": str(24 * GIB), "a__memory_dot_current": str(10 * GIB),
        "a__memory_dot_stat": f"anon 5\ninactive_file {4 * GIB}\n",
    }  # fmt: skip
    machine(tmp_path, 100, "0::/a/b\n", **files)
    assert host_memory(tmp_path) == 18 * GIB


def test_in_a_container_the_group_is_what_is_mounted(tmp_path: Path) -> None:
    machine(tmp_path, 100, "0::/docker/abc\n", memory_dot_max=str(8 * GIB), memory_dot_current=str(GIB))
    assert host_memory(tmp_path) == 7 * GIB


def test_groups_of_the_first_version_are_read_too(tmp_path: Path) -> None:
    files = {"memory__g__memory_dot_limit_in_bytes": str(6 * GIB), "memory__g__memory_dot_usage_in_bytes": str(2 * GIB)}
    machine(tmp_path, 100, "5:cpu:/x\n4:memory,hugetlb:/g\n", **files)
    assert host_memory(tmp_path) == 4 * GIB


def test_a_group_without_a_limit_leaves_what_the_machine_has(tmp_path: Path) -> None:
    machine(tmp_path, 100, "4:memory:/g\n", memory__g__memory_dot_limit_in_bytes="9223372036854771712")
    assert host_memory(tmp_path) == 100 * GIB
