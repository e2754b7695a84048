"""The Device object on machines that this one is not, through a stand-in for torch's device module."""

# ruff: noqa: N802 (NVML's own names)

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vtrain.contract import Device, DeviceError
from vtrain.contract import device as chapter

CardOf = Callable[..., Any]
GIB = 1 << 30


@pytest.fixture(autouse=True)
def _no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of the machine that runs the tests is not looked at."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


class Nvml(ModuleType):
    """NVIDIA's library, as nvidia-ml-py wraps it, on a machine with one card."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(
        self, used: int = 0, pids: tuple[int, ...] = (), broken: bool = False, quiet: bool = False, cards: int = 1
    ) -> None:
        super().__init__("pynvml")
        self.used, self.pids, self.broken, self.quiet, self.cards = used, pids, broken, quiet, cards
        self.open = 0
        self.asked: list[str] = []

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self.cards

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        if self.quiet:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(total=80 * GIB, used=self.used)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=37)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in self.pids]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Nvml]:
    def plug(**settings: Any) -> Nvml:
        made = Nvml(**settings)
        monkeypatch.setitem(sys.modules, "pynvml", made)
        return made

    return plug


# -- which device --------------------------------------------------------------------------------------------------------


def test_a_torch_without_accelerators_gives_the_cpu_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda: None
    )  # a build for cards, without any, says so
    assert Device.find() == (Device("cpu"), ())
    assert str(Device()) == "cpu"
    assert not Device().accelerated


def test_a_cpu_build_of_torch_on_a_machine_with_cards_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch, nvml: Callable[..., Nvml]
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    nvml(cards=2)
    device, (notice,) = Device.find()
    assert device == Device("cpu")
    assert "CPU build" in notice
    assert "(2)" in notice


def test_a_device_always_has_a_number_where_its_kind_has_numbers(card: CardOf) -> None:
    """accelerate's single-process device is "cuda" alone, which torch.cuda.set_device refuses."""
    card(count=2)
    assert str(Device.of("cuda")) == str(Device.of(torch.device("cuda"))) == "cuda:0"
    assert Device.of("cuda:1") == Device("cuda", 1)
    assert Device.of("cuda:1").torch == torch.device("cuda", 1)
    assert Device.of(torch.ones(1)) == Device.of("cpu") == Device.of("cpu:0") == Device()
    assert Device.find(rank=1, processes=2)[0] == Device("cuda", 1)


def test_a_card_that_is_found_is_opened_and_made_current(card: CardOf) -> None:
    cuda = card()
    device, notices = Device.find()
    assert (str(device), notices) == ("cuda:0", ())
    assert cuda.calls == [("set_device", 0), ("synchronize", 0)]
    assert device.name == "Stand-in 0"
    assert device.accelerated


def test_a_kind_without_numbers_is_used_without_one(card: CardOf) -> None:
    """As torch.mps: no set_device, no statistics of memory, one device."""
    mps = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 1, synchronize=lambda: None, current_allocated_memory=lambda: 7
    )
    card(mps, kind="mps")
    device, _ = Device.find()
    assert str(device) == "mps"
    assert device.peak() == device.allocated() == 7
    assert device.name == "mps"
    assert (device.capability, device.free(), device.figures()) == (None, None, None)
    assert device.has_bf16
    device.reset_peak()
    assert Device.of("mps:0") == device, "as its tensors say"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_cards_mean_the_cpu_and_the_reason_is_said(
    card: CardOf, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    card(count=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    device, (notice,) = Device.find()
    assert device == Device("cpu")
    assert notice == f'CUDA_VISIBLE_DEVICES is "{hidden}": running on the CPU'


def test_no_card_means_the_cpu_with_what_torch_warns_of(card: CardOf) -> None:
    cuda = card(count=0)

    def is_available() -> bool:
        warnings.warn("CUDA initialization: unknown error\nand a second line", stacklevel=1)
        return False

    cuda.is_available = is_available
    _, (notice,) = Device.find()
    assert notice == "torch finds no cuda device (CUDA initialization: unknown error): running on the CPU"


def test_a_driver_too_old_for_this_torch_is_an_error_with_torchs_own_reason(card: CardOf) -> None:
    card(count=2, usable=False, wrong="The NVIDIA driver on your system is too old (found version 11040). Please ...")
    with pytest.raises(DeviceError) as raised:
        Device.find()
    (problem,) = raised.value.problems
    assert "2 cards that torch cannot use" in problem.what
    assert "too old (found version 11040)" in problem.what
    assert "Install the driver" in problem.remedy


def test_cards_that_torch_cannot_use_and_gives_no_reason_for_are_an_error_all_the_same(card: CardOf) -> None:
    card(usable=False)
    with pytest.raises(DeviceError, match="1 card that torch cannot use: it does not say why"):
        Device.find()


def test_a_card_that_cannot_be_opened_is_an_error_that_names_it(card: CardOf) -> None:
    card(wrong="CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be ...")
    with pytest.raises(
        DeviceError, match=r"cuda:0: the card cannot be opened: CUDA error: all .* unavailable\. It may"
    ):
        Device.find()


def test_more_processes_than_cards_are_an_error(card: CardOf) -> None:
    card(count=1)
    with pytest.raises(DeviceError, match="2 processes were started on this machine, and torch sees 1 cuda device"):
        Device.find(rank=0, processes=2)


@pytest.mark.parametrize(
    ("used", "pids", "said"),
    [
        (GIB // 2, (), None),
        (GIB // 2, (os.getpid(),), None),
        (GIB // 2, (4711,), "(process 4711): 0.50 GiB of 80.00 GiB"),
        (30 * GIB, (), "in use by others: 30.00 GiB of 80.00 GiB"),
    ],
)
def test_another_process_on_the_card_is_pointed_out(
    card: CardOf, nvml: Callable[..., Nvml], used: int, pids: tuple[int, ...], said: str | None
) -> None:
    card()
    library = nvml(used=used, pids=pids)
    _, notices = Device.find()
    assert [said in notice for notice in notices] == ([True] if said else [])
    assert library.asked == ["GPU-0000-0"]
    assert library.open == 0


@pytest.mark.parametrize(
    ("capability", "has"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True)]
)
def test_cards_before_ampere_have_no_bf16(card: CardOf, capability: tuple[int, int], has: bool) -> None:
    card(capability=capability)
    assert Device("cuda", 0).capability == capability
    assert Device("cuda", 0).has_bf16 is has


@pytest.mark.parametrize(
    ("known", "has"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "aarch64"}, True),
        ({}, True),
    ],
)
def test_a_processor_has_bf16_where_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, Any], has: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert Device().has_bf16 is has


def test_a_torch_that_does_not_tell_a_processors_instructions_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert Device().has_bf16


# -- work, seeds, autocast -----------------------------------------------------------------------------------------------


def test_the_current_device_is_set_for_the_thread_that_asks(card: CardOf) -> None:
    cuda = card()
    thread = threading.Thread(target=Device("cuda", 0).use, name="worker")
    thread.start()
    thread.join()
    assert cuda.threads["set_device"] == {"worker"}


class Moves:
    """A tensor that notes how it was moved."""

    def __init__(self, kind: str = "cpu") -> None:
        self.device, self.how = SimpleNamespace(type=kind), list[Any]()

    def pin_memory(self) -> Moves:
        self.how.append("pinned")
        return self

    def to(self, place: torch.device, non_blocking: bool = False) -> Moves:
        self.how.append((str(place), non_blocking))
        return self


def test_a_tensor_goes_to_a_card_from_page_locked_memory_and_nobody_waits(card: CardOf) -> None:
    card()
    tensor = Moves()
    Device("cuda", 0).move(tensor)  # type: ignore[arg-type]
    assert tensor.how == ["pinned", ("cuda:0", True)]
    waiting = Moves()
    Device("cuda", 0).pin(waiting)  # type: ignore[arg-type]
    assert waiting.how == ["pinned"]
    kept = torch.ones(2)
    assert Device().pin(kept) is kept


def test_tensors_are_copied_out_in_the_order_of_the_cards_work_and_only_who_needs_them_waits(card: CardOf) -> None:
    order: list[str] = []

    class Place:
        device = SimpleNamespace(type="cpu")

        def copy_(self, tensor: object, non_blocking: bool) -> None:
            order.append(f"copy, {'nobody waits' if non_blocking else 'all wait'}")

    class Event:
        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("wait")

    card(SimpleNamespace(Event=Event, set_device=lambda number: None))
    wait = Device("cuda", 0).copy_out([torch.ones(1)] * 2, [Place()] * 2)  # type: ignore[list-item]
    assert order == ["copy, nobody waits", "copy, nobody waits", "record"]
    wait()
    assert order[3:] == ["wait"]
    card(SimpleNamespace(Event=Event), kind="mps")
    Device("mps").copy_out([torch.ones(1)], [Place()])()  # type: ignore[list-item]
    assert order[4] == "copy, all wait"
    place = torch.zeros(2)
    Device().copy_out([torch.ones(2)], [place])()
    assert place.tolist() == [1, 1]


def test_what_is_on_a_card_already_or_goes_to_memory_shared_with_the_cpu_is_not_pinned(card: CardOf) -> None:
    card()
    there = Moves("cuda")
    Device("cuda", 0).move(there)  # type: ignore[arg-type]
    assert there.how == [("cuda:0", False)]
    card(SimpleNamespace(), kind="mps")
    shared = Moves()
    Device("mps").move(shared)  # type: ignore[arg-type]
    assert shared.how == [("mps", False)]
    kept = torch.ones(2)
    assert Device().move(kept) is kept


def test_a_seed_is_set_on_the_cpu_and_on_the_card(card: CardOf) -> None:
    cuda = card()
    Device("cuda", 0).seed(11)
    first = torch.rand(3)
    Device().seed(11)
    assert torch.equal(first, torch.rand(3))
    assert cuda.calls == [("manual_seed", 11)]


def test_autocast_is_on_or_off_as_asked_and_says_so() -> None:
    device = Device()
    product = torch.ones(2, 2)
    with device.autocast("bf16"):
        assert device.autocasting
        assert (product @ product).dtype == torch.bfloat16
        with device.autocast(None):
            assert not device.autocasting
            assert (product @ product).dtype == torch.float32
    assert not device.autocasting


def test_waiting_for_the_card_waits_for_this_card(card: CardOf) -> None:
    cuda = card(count=2)
    Device("cuda", 1).synchronise()
    Device().synchronise()
    assert cuda.calls == [("synchronize", 1)]


# -- memory and figures --------------------------------------------------------------------------------------------------


def test_memory_of_a_card_is_torchs_and_that_of_a_cpu_is_the_processs(card: CardOf) -> None:
    cuda = card()
    device = Device("cuda", 0)
    device.reset_peak()
    assert cuda.calls == [("reset_peak", 0)]
    assert (device.peak(), device.allocated(), device.free()) == (5 * GIB, 2 * GIB, (3 * GIB, 80 * GIB))
    cpu = Device()
    cpu.reset_peak()
    assert cpu.peak() > 50 << 20
    assert (cpu.allocated(), cpu.free(), cpu.figures()) == (0, None, None)


def test_memory_of_dropped_tensors_is_given_back(card: CardOf) -> None:
    cuda = card()
    Device("cuda", 0).release()
    Device().release()
    assert cuda.calls == [("empty_cache",)]


def test_a_process_takes_no_more_of_a_card_than_its_limit(card: CardOf) -> None:
    cuda = card()
    shares: list[tuple[float, int]] = []
    cuda.set_per_process_memory_fraction = lambda share, index: shares.append((share, index))
    cuda.get_per_process_memory_fraction = lambda index: shares[-1][0] if shares else 1.0
    device = Device("cuda", 0)
    device.limit(None)
    device.limit(90 * GIB)
    assert shares == [], "all of it is what a process has anyway"
    device.limit(20 * GIB)
    device.limit(-5)
    device.limit(None)
    assert shares == [(0.25, 0), (0.0, 0), (1.0, 0)]
    Device().limit(1)


def test_a_kind_without_limits_has_none(card: CardOf) -> None:
    card()
    Device("cuda", 0).limit(20 * GIB)


def test_figures_are_nvmls_of_the_whole_card(card: CardOf, nvml: Callable[..., Nvml]) -> None:
    card(count=2)
    nvml(used=5 * GIB, pids=(1, 2))
    figures = Device("cuda", 1).figures()
    assert figures is not None
    assert (figures.total, figures.used) == (80 * GIB, 5 * GIB)
    assert (figures.utilisation, figures.temperature) == (37, 61)
    assert figures.watts is None, "this card does not say"
    assert figures.processes == {1: 0, 2: 0}


@pytest.mark.parametrize("settings", [{"broken": True}, {"quiet": True}])
def test_a_driver_that_does_not_answer_gives_no_figures(
    card: CardOf, nvml: Callable[..., Nvml], settings: dict[str, bool]
) -> None:
    card()
    library = nvml(**settings)
    assert Device("cuda", 0).figures() is None
    assert library.open == 0


def test_without_nvidias_library_there_are_no_figures(card: CardOf) -> None:
    card()
    assert Device("cuda", 0).figures() is None


# -- what goes wrong -----------------------------------------------------------------------------------------------------

FULL = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1.21 GiB is free.\n"
    "See documentation for Memory Management."
)


def test_a_full_card_says_what_was_asked_for_what_is_free_and_what_lowers_it(card: CardOf) -> None:
    card()
    with pytest.raises(DeviceError) as raised, Device("cuda", 0).explained("training", ["a.b (it is 2)", "c.d"]):
        raise torch.OutOfMemoryError(FULL)
    (problem,) = raised.value.problems
    assert problem.where == "cuda:0 (Stand-in 0)"
    assert problem.what == (
        "out of memory while training: 2.50 GiB were asked for, 3.00 GiB of 80.00 GiB are free, this process holds 60.00 GiB, "
        "17.00 GiB are held by others and by CUDA itself."
    )
    assert problem.remedy == "What lowers it: a.b (it is 2); c.d."


def test_the_place_of_a_full_card_is_said_and_others_only_if_they_hold_much(card: CardOf) -> None:
    cuda = card()
    cuda.memory_reserved = lambda index: int(76.5 * GIB)
    error = torch.OutOfMemoryError("no words that we know")
    error.add_note("at step 7")
    with pytest.raises(DeviceError) as raised, Device("cuda", 0).explained("training", []):
        raise error
    (problem,) = raised.value.problems
    assert "no words that we know" in problem.what
    assert "at step 7" in problem.what
    assert "others" not in problem.what
    assert problem.remedy == ""


def test_full_memory_of_a_cpu_is_explained_too() -> None:
    words = r"this machine's memory: out of memory while training: .* GiB were asked for"
    with pytest.raises(DeviceError, match=words), Device().explained("training", ["train.batch_size"]):
        torch.empty(10**15)


def test_full_memory_of_the_host_is_not_blamed_on_the_card(card: CardOf) -> None:
    card()
    with pytest.raises(DeviceError) as raised, Device("cuda", 0).explained("training", []):
        torch.empty(10**15)
    (problem,) = raised.value.problems
    assert problem.where == "this machine's memory"
    assert "free" not in problem.what


@pytest.mark.parametrize("words", chapter.CARD_IS_FULL)
def test_a_full_card_is_known_by_all_of_torchs_words_for_it(card: CardOf, words: str) -> None:
    card()
    with pytest.raises(DeviceError, match="out of memory while training"), Device("cuda", 0).explained("training", []):
        raise RuntimeError(f"{words} (and more)")


def test_an_operation_without_a_deterministic_form_names_the_option() -> None:
    words = r"run\.deterministic cannot be kept: cumsum_cuda does not .* implementation"
    with pytest.raises(DeviceError, match=words), Device().explained("training", []):
        raise RuntimeError("cumsum_cuda does not have a deterministic implementation, but you set ...")


def test_any_other_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^a bug$"), Device().explained("training", []):
        raise RuntimeError("a bug")


def test_deterministic_work_is_asked_for_before_any_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(chapter.WORKSPACE, "before")  # so that it is put back
    monkeypatch.delenv(chapter.WORKSPACE)
    benchmark, filled = torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory
    try:
        Device().deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[chapter.WORKSPACE] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory = benchmark, filled
