"""What a run takes in memory, phase by phase, and what [memory] chose for it: sections for people, the same for programs."""

from __future__ import annotations

from collections.abc import Iterator

from vtrain.contract import Section
from vtrain.plan.memory import CONTEXT, FRAGMENTATION, PROCESS, MemoryEstimate, Phase
from vtrain.plan.records import MemoryChoice, Plan
from vtrain.plan.workload import memory_estimate, workload

COLUMNS = ("weights", "gradients", "optimizer", "average", "activations", "teacher", "encoders", "casts", "loss")
"""What a device holds, in the order of the table; a column that is 0 in all phases is left out."""


def gib(size: float) -> str:
    """Two digits after the point, and three for what would be 0.00."""
    found = size / 2**30
    return f"{found:.2f}" if found >= 0.005 or not found else f"{found:.3f}"


def memory_sections(plan: Plan) -> tuple[Section, ...]:
    """The table by phase, what it stands on, and what was promised."""
    on_cpu = plan.memory is not None and plan.memory.on_cpu
    found = memory_estimate(plan, on_cpu=on_cpu)
    return (
        Section("memory (GiB, each process)", table_rows(found, on_cpu=on_cpu), table=True),
        Section("memory: how", tuple(_how(plan, found, on_cpu=on_cpu))),
    )


def table_rows(found: MemoryEstimate, *, on_cpu: bool = False) -> tuple[tuple[str, ...], ...]:
    """on_cpu: the CPU trains, where all is in main memory."""
    names = [name for name in COLUMNS if any(phase.device.get(name) for phase in found.phases)]
    totals = ("in all",) if on_cpu else ("on the device", "main memory")
    return (("phase", *names, *totals), *(_row(phase, names, on_cpu=on_cpu) for phase in found.phases))


def _row(phase: Phase, names: list[str], *, on_cpu: bool) -> tuple[str, ...]:
    least = ">= " if phase.unknown else ""
    cells = (gib(phase.device.get(name, 0)) for name in names)
    totals = (phase.on_cpu,) if on_cpu else (phase.total, phase.on_host)
    return (phase.name, *cells, least + gib(totals[0]), *map(gib, totals[1:]))


def _how(plan: Plan, found: MemoryEstimate, *, on_cpu: bool) -> Iterator[tuple[str, str]]:
    work, peak = workload(plan), found.peak
    allowance = f"{100 * FRAGMENTATION:.0f}% between tensors and {CONTEXT / 2**20:.0f} MiB of the driver are counted in"
    if not on_cpu:
        yield "most", f"{gib(peak.total)} GiB on a card, {peak.name} ({allowance})"
    if on_cpu or plan.memory is None:
        size = gib(memory_estimate(plan, on_cpu=True).on_cpu)
        own = f"{PROCESS / 2**20:.0f} MiB of the process itself are counted in"
        yield "most" if on_cpu else "on a CPU", f"{size} GiB of the machine's memory ({own})"
    if work.largest is not None:
        yield "largest clip", f"{work.largest}, {work.tokens:,} tokens, x batch {found.settings.batch}"
    if found.unknown:
        yield "not counted", ", ".join(found.unknown)
    if work.guessed:
        yield "adapter", f"its size is not known: taken for {work.adapter:,} weights"
    if plan.memory is not None:
        yield from choice_rows(plan.memory)


def choice_rows(choice: MemoryChoice) -> Iterator[tuple[str, str]]:
    """What [memory] chose, why, and what it costs."""
    yield "limit", f"{gib(choice.limit)} GiB ({choice.where})"
    if choice.host is not None:
        yield "main memory", f"{gib(choice.host)} GiB are free for each process"
    chosen = ", ".join(choice.words) or "nothing: the run fits as it is"
    cost = f"; about {choice.time:.2f} times the time of a step (an estimate)" if choice.time > 1.005 else ""
    kept = "; the run was begun with it, and it still fits" if choice.kept else ""
    yield "chosen", f"{chosen}: {gib(choice.amount)} GiB{cost}{kept}"
    for words, size in choice.faster[-3:]:
        yield "faster", f"{' and '.join(words) or 'without any of it'}: would take {gib(size)} GiB"


def memory_json(plan: Plan) -> dict[str, object]:
    """The same for programs, in bytes."""
    choice = plan.memory
    found = memory_estimate(plan, on_cpu=choice is not None and choice.on_cpu)
    return {
        "phases": [
            {
                "phase": phase.name,
                "device": dict(phase.device),
                "host": dict(phase.host),
                "on_device": phase.total,
                "on_host": phase.on_host,
                "on_cpu": phase.on_cpu,
                "not_counted": list(phase.unknown),
            }
            for phase in found.phases
        ],
        "on_device": found.on_device,
        "on_host": found.on_host,
        "on_cpu": found.on_cpu,
        "promise": None
        if choice is None
        else {
            "limit": choice.limit,
            "of": choice.where,
            "card": choice.room.name,
            "on_cpu": choice.on_cpu,
            "chosen": list(choice.words),
            "takes": choice.amount,
            "time": choice.time,
            "faster": [{"settings": list(words), "bytes": size} for words, size in choice.faster],
        },
    }
