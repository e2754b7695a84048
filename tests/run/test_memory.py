"""The estimate of memory beside what a run takes, and the limit that a card keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vtrain.contract import Ended
from vtrain.contract.rooms import Room
from vtrain.plan.memory import CONTEXT, TRAINING
from vtrain.plan.records import MemoryChoice, Plan
from vtrain.plan.workload import memory_estimate
from vtrain.run import memory, prepare
from vtrain.run.memory import MemoryReport, agreed, explained_doing, keep_limit
from vtrain.run.prepare import notices

PlanOf = Callable[..., Plan]
GIB = 1 << 30


class Card:
    """Of a Device, what is asked here."""

    def __init__(self, *, accelerated: bool = True) -> None:
        self.accelerated, self.kind, self.limits = accelerated, "cuda", list[int | None]()

    def limit(self, size: int | None) -> None:
        self.limits.append(size)

    def __str__(self) -> str:
        return "cuda:0" if self.accelerated else "cpu"


@pytest.mark.parametrize("accelerated", [True, False])
def test_the_end_of_a_run_has_its_peak_beside_the_estimate(plan_of: PlanOf, accelerated: bool) -> None:
    """Of tensors on a card; of the whole process on a CPU."""
    plan = plan_of()
    report = MemoryReport(plan, Card(accelerated=accelerated))  # type: ignore[arg-type]
    report.peak = 5
    ended = report.seen(Ended(3, 3, "finished"))
    assert isinstance(ended, Ended)
    phases = [each for each in memory_estimate(plan, on_cpu=not accelerated).phases if each.name in TRAINING]
    expected = max(each.tensors if accelerated else each.on_cpu for each in phases)
    assert (ended.peak_memory, ended.estimated_memory) == (5, expected)


def test_a_run_without_steps_has_no_peak(plan_of: PlanOf) -> None:
    ended = Ended(3, 3, "nothing to do")
    assert MemoryReport(plan_of(), Card()).seen(ended) == ended  # type: ignore[arg-type]


def test_what_nobody_can_estimate_is_not_compared(plan_of: PlanOf) -> None:
    """Blocks of a width that nobody measured; a regularizer's own work is small beside, and the plan says so."""
    unknown = plan_of(model='use = "toy"\ntrain = "full"\nwidth = 24')
    assert MemoryReport(unknown, Card()).estimated is None  # type: ignore[arg-type]
    more = '[[regularizer]]\nuse = "toy-colours"\nblock = 1\nteacher = "decoded"'
    assert MemoryReport(plan_of(more=more), Card()).estimated  # type: ignore[arg-type]


def test_an_error_of_a_full_card_has_the_estimate_of_the_phase(plan_of: PlanOf) -> None:
    text = explained_doing(plan_of(train="steps = 3\nbatch_size = 4"), "training")
    assert text.startswith("training (estimated: 0.59 GiB for training: "), "mostly the driver"
    assert explained_doing(plan_of(), "filling the caches") == "filling the caches", "of the toy nothing is known"


def test_the_limit_is_kept_on_a_card_and_given_back_by_the_next_run(plan_of: PlanOf) -> None:
    plan, card = plan_of(), Card()
    promise = MemoryChoice(2 * GIB, "memory.limit", None, (), 1.0, ())
    keep_limit(replace(plan, memory=promise), card)  # type: ignore[arg-type]
    keep_limit(replace(plan, memory=replace(promise, on_cpu=True)), card)  # type: ignore[arg-type]
    keep_limit(plan, card)  # type: ignore[arg-type]
    assert card.limits == [2 * GIB - CONTEXT, None, None]


def test_processes_plan_alike_with_the_least_that_one_of_them_found(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or one would recompute blocks and the other not, when a third program starts between their two looks at the card."""
    card, looked = Card(), list[Room]()
    mine, theirs = Room(9 * GIB, 0, "an H100", 7 * GIB), Room(9 * GIB, GIB, "an H100", 8 * GIB)

    def planned(path: Path, room: Room) -> Plan:
        looked.append(room)
        return replace(plan, memory=MemoryChoice(room.free or 0, "an H100", room.host, (), 1.0, (), room=room))

    monkeypatch.setattr(memory, "planned", planned)
    plan = replace(plan_of(), memory=MemoryChoice(9 * GIB, "an H100", 7 * GIB, (), 1.0, (), room=mine))
    pair = SimpleNamespace(gathered=lambda rooms: [*rooms, theirs], device=card)
    found = agreed(plan, Path("config.toml"), pair)  # type: ignore[arg-type]
    assert looked == [Room(9 * GIB, GIB, "an H100", 7 * GIB)]
    assert found.memory is not None
    assert card.limits == [found.memory.limit - CONTEXT] == [8 * GIB - CONTEXT]
    alone = SimpleNamespace(gathered=lambda rooms: rooms, device=card)
    assert agreed(plan, Path("config.toml"), alone) is plan  # type: ignore[arg-type]
    assert agreed(plan_of(), Path("config.toml"), pair).memory is None  # type: ignore[arg-type]
    assert len(looked) == 1


def test_a_plan_for_another_kind_of_device_is_pointed_out(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch is a build for CPUs on a machine with a card."""
    monkeypatch.setattr(prepare, "Transfers", SimpleNamespace(streams=lambda device: False))
    promise = MemoryChoice(2 * GIB, "an H100", None, (), 1.0, ())
    plan = replace(plan_of(), memory=promise)
    assert notices(plan, Card()) == []  # type: ignore[arg-type]
    (said,) = notices(plan, Card(accelerated=False))  # type: ignore[arg-type]
    assert said == "[memory] was planned for an H100, and the run is on cpu: its limit may not be kept"
    (said,) = notices(replace(plan, memory=replace(promise, on_cpu=True)), Card())  # type: ignore[arg-type]
    assert said.startswith("[memory] was planned for this machine's memory, and the run is on cuda:0")
