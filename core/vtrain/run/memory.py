"""The estimate of memory beside what a run really takes: at its end, and where memory runs out."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vtrain.contract import Device, Ended, Event, Logged, VtrainError
from vtrain.contract.rooms import least_room
from vtrain.estimate.estimate import Doing, remedies
from vtrain.estimate.memory import gib
from vtrain.plan.memory import CAPTIONS, CLIPS, CONTEXT, DECODING, FEATURES, LOADING, SAVING, SOLVING, TRAINING, Phase
from vtrain.plan.records import Plan
from vtrain.plan.workload import memory_estimate
from vtrain.run.prepare import planned

if TYPE_CHECKING:
    from vtrain.train.processes import Processes


class MemoryReport:
    """Compares the estimate for training with the peak that steps reached, over all events of a run."""

    def __init__(self, plan: Plan, device: Device) -> None:
        found = memory_estimate(plan, on_cpu=not device.accelerated)
        # A card says how many bytes tensors took; a CPU how many the whole process has.
        sizes = [
            phase.tensors if device.accelerated else phase.on_cpu for phase in found.phases if phase.name in TRAINING
        ]
        known = any(phase.device.get("activations") for phase in found.phases if phase.name in TRAINING)
        self.estimated = max(sizes) if known else None
        self.peak = 0

    def seen(self, event: Event) -> Event:
        """The event; the last one with both figures."""
        if isinstance(event, Logged):
            self.peak = max(self.peak, *(step.memory for step in event.steps))
        if isinstance(event, Ended) and self.peak:
            return replace(event, estimated_memory=self.estimated, peak_memory=self.peak)
        return event


def agreed(plan: Plan, path: Path, processes: Processes) -> Plan:
    """The plan of all processes, with its limit kept on the card. Each has read what is free at its own time, when another may
    have begun to fill its card: the least that one of them found counts for all, or they would train in different ways.

    Raises ConfigError when nothing fits in that, on all of them.
    """
    if plan.memory is not None:
        least = least_room(processes.gathered([plan.memory.room]))
        if least != plan.memory.room:
            try:
                plan = planned(path, least)
            except VtrainError as error:
                error.reported = not processes.first
                raise
    keep_limit(plan, processes.device)
    return plan


def keep_limit(plan: Plan, device: Device) -> None:
    """What [memory] promised of a card holds for the whole run: tensors get what its driver leaves of the limit.

    Without it they get all, also in a process that had a run with it before.
    """
    promised = plan.memory is not None and not plan.memory.on_cpu
    device.limit(plan.memory.limit - CONTEXT if plan.memory is not None and promised else None)


PHASES: dict[Doing, tuple[str, ...]] = {
    "filling the caches": (CAPTIONS, CLIPS, FEATURES),
    "loading the model": (LOADING, SAVING),
    "training": TRAINING,
    "validating": (SOLVING, DECODING),
}
"""What a run does -> how the phases of the estimate begin that it may be in."""


def explained(plan: Plan, device: Device, doing: Doing) -> AbstractContextManager[None]:
    """A device that gets full is an error with the estimate, and what lowers the memory that this plan takes."""
    return device.explained(explained_doing(plan, doing, on_cpu=not device.accelerated), remedies(plan, doing))


def explained_doing(plan: Plan, doing: Doing, *, on_cpu: bool = False) -> str:
    """ "training (estimated: 16.51 GiB for training: forward, mostly activations)", for an error that says that memory ran out."""
    sizes = {phase: phase.on_cpu if on_cpu else phase.total for phase in _phases(plan, doing, on_cpu=on_cpu)}
    if not sizes:
        return doing
    found, size = max(sizes.items(), key=lambda each: each[1])
    least = "at least " if found.unknown else ""
    most = max(found.device, key=lambda name: found.device[name])
    of = f" for {found.name}" if found.name != doing else ""
    return f"{doing} (estimated: {least}{gib(size)} GiB{of}, mostly {most})"


def _phases(plan: Plan, doing: Doing, *, on_cpu: bool) -> list[Phase]:
    """Those in which the run may be, as far as anything of them is known."""
    found = memory_estimate(plan, on_cpu=on_cpu)
    return [phase for phase in found.phases if phase.name.startswith(PHASES[doing]) and phase.device]
