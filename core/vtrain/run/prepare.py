"""From a file's name to a plan and what it amounts to: what `vtrain plan` shows and every run starts with. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vtrain.config import load
from vtrain.contract import Caption, ConfigError, Device, Problem, Role, VtrainError
from vtrain.contract.rooms import Room, find_room
from vtrain.contract.transfers import Transfers
from vtrain.data.scanning.scan import Scan, scan, with_decoders
from vtrain.estimate.estimate import Estimate, check_room, make_estimate
from vtrain.plan.make import make_plan
from vtrain.plan.offload import device_notices
from vtrain.plan.records import Plan
from vtrain.registry import discover
from vtrain.registry.blame import blame
from vtrain.registry.guard import stdout_on_stderr
from vtrain.run.collector import uncollected

_LARGE = 1 << 50
"""Bytes of memory on machines that are not known here: a plan chooses again where it runs."""


@dataclass(frozen=True)
class Elsewhere:
    """Machines that a run is planned for and not on. per_node: processes of each, None: run.processes."""

    nodes: int
    per_node: int | None = None


@dataclass(frozen=True)
class Prepared:
    """A plan, what was found in its data, and what it amounts to."""

    plan: Plan
    scan: Scan
    estimate: Estimate


def planned(path: Path, room: Room | None = None, base: Path | None = None, elsewhere: Elsewhere | None = None) -> Plan:
    """Read and check the file. The number of processes is what the launcher (torchrun, accelerate) says, else run.processes.

    No data file is opened: that is the scan's. room: the memory of the machine that it is for; absent: this one's is looked up
    where the file has [memory]. base: where relative paths start, absent: at the file's folder. elsewhere: on other
    machines, of whose memory nothing is known here.
    Raises ConfigError, ModelError or PluginError with all problems.
    """
    try:
        return _planned(path, room, base, elsewhere)
    except VtrainError as error:
        error.reported = os.environ.get("LOCAL_RANK", "0") != "0"  # all processes of a machine read the same: said once
        raise


def _planned(path: Path, room: Room | None, base: Path | None, elsewhere: Elsewhere | None) -> Plan:
    said = os.environ.get("WORLD_SIZE") or ""
    if said and (not said.isdecimal() or not int(said)):
        what = f'the environment variable WORLD_SIZE is "{said}", which is no number of processes.'
        raise ConfigError(Problem("", what, "Start several processes with torchrun, or unset it."))
    with stdout_on_stderr():  # parts are built, and what their code prints must not stand in a command's JSON
        catalog = discover()
        with blame(tuple(catalog.parts.values())):  # validators of options are plugins' code
            config = load(path, catalog, base)
        count = int(said or config.run.processes)
        if elsewhere is not None:
            count = elsewhere.nodes * (elsewhere.per_node or config.run.processes)
            room = Room(_LARGE, 0, "--nodes", _LARGE) if config.memory is not None else None
        elif room is None and config.memory is not None:
            local = os.environ.get("LOCAL_WORLD_SIZE") or ""
            room = find_room(int(local) if local.isdecimal() else count)
        return with_decoders(make_plan(config, count, catalog, room))


def prepare(path: Path, on_file: Callable[[int], None] | None = None, room: Room | None = None) -> Prepared:
    """Plan, scan, estimate. room: as `planned` takes it. Raises ConfigError, ModelError, PluginError or DataError."""
    with uncollected(collect_first=False):
        plan = planned(path, room)
    with blame(plan.config.parts()):
        return Prepared(plan, *scanned(plan, on_file))


def scanned(plan: Plan, on_file: Callable[[int], None] | None = None) -> tuple[Scan, Estimate]:
    """Every source file looked at, and what a run amounts to, with room for it. Raises DataError, ConfigError."""
    found = scan(plan, on_file)
    estimate = make_estimate(plan, found.survey)
    check_room(plan, estimate)
    return found, estimate


def notices(plan: Plan, device: Device) -> list[str]:
    """What of the plan does nothing on the device that a run found."""
    wanted, started = plan.config.run.processes, int(os.environ.get("LOCAL_WORLD_SIZE") or plan.processes)
    found = list(device_notices(plan.config.offload, accelerated=device.accelerated, streams=Transfers.streams(device)))
    if 1 < wanted != started:
        found.append(f"run.processes is {wanted}, and the launcher started {started}: these count")
    if plan.memory is not None and plan.memory.on_cpu == device.accelerated:
        planned_for = "this machine's memory" if plan.memory.on_cpu else plan.memory.where
        found.append(f"[memory] was planned for {planned_for}, and the run is on {device}: its limit may not be kept")
    return found


def extra_texts(plan: Plan) -> list[tuple[Caption, Role]]:
    """What a run encodes beside captions: validation's prompts."""
    return [(caption, role) for _, caption, role in plan.validation.texts] if plan.validation else []


def alone_though(plan: Plan, count: int) -> Problem:
    """Another number of processes works together than the plan is for."""
    if os.environ.get("WORLD_SIZE"):
        what = f"the launcher announced {plan.processes} processes in WORLD_SIZE, and {count} work together."
        return Problem("", what, "Start it with torchrun, or unset WORLD_SIZE.")
    what = f"run.processes is {plan.processes}, and this is one process: `vtrain run` starts the others, a program's own does not."
    return Problem(plan.config.where("run", "processes"), what, "Use vtrain run or torchrun, or set run.processes = 1.")
