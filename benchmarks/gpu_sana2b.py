"""SANA-Video 2B on a GPU: seconds per step, peak memory and TFLOP/s of vtrain and of a bare loop on the same card.

Nothing is downloaded: the weights are random, in the real model's shapes. LoRA (rank 16) keeps them in bf16, full
training in fp32; both train under bf16 autocast, batch 1, with gradient checkpointing, fused AdamW. vtrain's side is its
own step, loop and feed; its caches are not measured, so random latents in memory stand in for them. The bare loop
(bare.py) has its batches on the card.

Two more sides are vtrain with CREPA on block 10 (of the tiny model: 1), DINOv2-giant as its teacher, a patch for each
token: with features as from a cache (random ones of the true shape, in memory), and made at each step from the latents,
decoded by the Wan VAE whose encoder is let go. Both have random weights in the real shapes.

--sides takes more: what saves memory (gradient checkpointing of some blocks or of feed-forward layers, offloaded groups,
the optimizer's states on the CPU) and vtrain without checkpointing, each compared with vtrain.

Memory is measured with each side alone in memory. Times are of blocks of steps, the card synchronised before and after,
in turn where all models fit on the card (LoRA), else one side after the other (full); the table says which.
TFLOP/s rest on a forward of 121 TFLOP at 832x480, 81 frames, and work in proportion to the tokens: backward is twice
that, or once under LoRA, whose frozen weights need no gradients, and checkpointing adds a forward.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from gpu_sides import REAL, SAVING, SIDES, TINY, Block, Clip, Setup, applies
from report import Ratio, machine, ratio, say, table, write_json

from vtrain.contract import Device
from vtrain.train.processes import Processes

LIMITS = {"seconds": 1.02, "memory": 1.05}
"""vtrain by the bare loop."""
CREPA_LIMITS: dict[str, dict[str, float | None]] = {
    "CREPA cached": {"seconds": 1.05, "memory": 1.05},
    "CREPA decoded": {"seconds": None, "memory": None},
}
"""By vtrain without it."""
NO_LIMITS: dict[str, float | None] = {"seconds": None, "memory": None}
ALL = SIDES | SAVING
PEER = ("SimpleTuner 4, as published", "lora", "832x480x49", "0.599", "59.15 (-)", "-", "H100, checkpointing said on")


@dataclass
class Measured:
    """One side of a setup. seconds: per step, one for each block. Peaks in bytes, 0 on a CPU. note: what went wrong."""

    side: str
    setup: Setup
    seconds: list[float] = field(default_factory=list)
    allocated: int = 0
    reserved: int = 0
    note: str = ""


def seconds(setup: Setup, block: Block) -> float:
    """Of a step, in a block."""
    device = Device.of(setup.device)
    device.synchronise()
    start = time.perf_counter()
    block()
    device.synchronise()
    return (time.perf_counter() - start) / setup.steps


def measure_alone(setup: Setup, side: str, processes: Processes, blocks: int) -> Measured:
    """Peak memory from the building of the model on; times too, where the sides cannot take turns."""
    found = Measured(side, setup)
    device = Device.of(setup.device)
    try:
        device.reset_peak()
        with ALL[side](setup, processes) as block:
            block()
            if not setup.in_turn:
                found.seconds = [seconds(setup, block) for _ in range(blocks)]
    except torch.OutOfMemoryError:
        found.note = "out of memory"
    if device.accelerated:
        found.allocated, found.reserved = device.peak(), torch.cuda.max_memory_reserved()
    return found


def measure_in_turn(setup: Setup, found: dict[str, Measured], processes: Processes, blocks: int) -> None:
    """Add times to all sides, from one process with all models in memory, after a block of each to warm up."""
    try:
        with ExitStack() as stack:
            sides = {side: stack.enter_context(ALL[side](setup, processes)) for side in found}
            for block in sides.values():
                block()
            for turn in range(blocks):
                for place in range(len(sides)):
                    side = list(sides)[(turn + place) % len(sides)]
                    found[side].seconds.append(seconds(setup, sides[side]))
    except torch.OutOfMemoryError:
        for each in found.values():
            each.seconds, each.note = [], "out of memory with all models"


def measure(setup: Setup, processes: Processes, blocks: int, sides: Iterable[str] = ()) -> dict[str, Measured]:
    """The sides of a setup, all by default. Too little memory is a note, not an error."""
    found = {}
    for side in (each for each in sides or SIDES if applies(each, setup)):
        found[side] = measure_alone(setup, side, processes, blocks)
        Device.of(setup.device).release()
    whole = {side: each for side, each in found.items() if not each.note}
    if setup.in_turn and whole:
        measure_in_turn(setup, whole, processes, blocks)
        Device.of(setup.device).release()
    return found


def row(each: Measured) -> tuple[str, ...]:
    median = statistics.median(each.seconds) if each.seconds else None
    work = each.setup.tflop()
    gib = f"{each.allocated / 2**30:.2f} ({each.reserved / 2**30:.2f})" if each.allocated else "-"
    return (
        each.side,
        each.setup.mode,
        str(each.setup.clip),
        f"{median:.3f}" if median else "-",
        gib,
        f"{work / median:.0f}" if work and median and each.side in ("bare", "vtrain") else "-",
        each.note or ("in turn" if each.setup.in_turn else "one after the other"),
    )


def ratios(found: dict[str, Measured]) -> dict[str, Ratio]:
    """Seconds in pairs of blocks, peak allocated bytes: vtrain by the bare loop, and CREPA by vtrain."""
    compared: dict[str, Ratio] = {}
    for above, below, limits in (
        ("vtrain", "bare", LIMITS),
        *((side, "vtrain", limits) for side, limits in CREPA_LIMITS.items()),
        *((side, "vtrain", NO_LIMITS) for side in SAVING),
    ):
        ours, theirs = found.get(above), found.get(below)
        if ours is None or theirs is None or ours.note or theirs.note:
            continue
        pairs = {"seconds": (ours.seconds, theirs.seconds), "memory": ([ours.allocated], [theirs.allocated])}
        compared |= {
            f"{above} / {below}, {name}": ratio(a, b, limits[name]) for name, (a, b) in pairs.items() if a and all(b)
        }
    return compared


def card() -> dict[str, str]:
    """The GPU and its driver."""
    if not torch.cuda.is_available():
        return {"gpu": "none"}
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=False) if shutil.which(query[0]) else None
    return {"gpu": told.stdout.strip() if told else torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and clip, to see that the script works")
    parser.add_argument("--modes", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--sides", nargs="+", choices=ALL, default=list(SIDES), help="(default: bare, vtrain, CREPA)")
    parser.add_argument("--frames", nargs="+", type=int, default=[49, 81], help="of a clip (default: 49 81)")
    parser.add_argument("--size", default="832x480", help="of a clip, WxH (default: 832x480)")
    parser.add_argument("--blocks", type=int, default=6, help="timed blocks of each side (default: 6)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a block (default: 4)")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument(
        "--deterministic", action="store_true", help="all sides as under run.deterministic: what it costs"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def setups(chosen: argparse.Namespace) -> Iterator[Setup]:
    width, height = map(int, ("64x64" if chosen.tiny else chosen.size).split("x"))
    for mode in chosen.modes:
        for frames in (9,) if chosen.tiny else chosen.frames:
            yield Setup(
                mode,
                Clip(width, height, frames),
                TINY if chosen.tiny else REAL,
                Device.of(chosen.device).torch,
                chosen.steps,
                not chosen.no_checkpointing,
            )


def main() -> None:
    chosen = arguments()
    processes = Processes("bf16")
    if chosen.deterministic:
        processes.device.deterministic()
    if processes.device.kind != chosen.device:
        sys.exit(
            f"this process computes on {processes.device}, not on {chosen.device} (a GPU hides behind CUDA_VISIBLE_DEVICES=)"
        )
    say("; ".join(f"{name} {value}" for name, value in {**card(), **machine()}.items()))
    rows: list[tuple[str, ...]] = []
    told: list[str] = []
    content: list[dict[str, object]] = []
    for setup in setups(chosen):
        found = measure(setup, processes, chosen.blocks, chosen.sides)
        rows += [row(each) for each in found.values()]
        compared = ratios(found)
        told += [f"{setup.mode} {setup.clip}, {name}: {each}" for name, each in compared.items()]
        say("\n".join(map(str, rows[-len(found) :])))
        sides = {
            side: {"seconds": each.seconds, "allocated": each.allocated, "reserved": each.reserved, "note": each.note}
            for side, each in found.items()
        }
        numbers = {name: asdict(each) for name, each in compared.items()}
        content.append(
            {"mode": setup.mode, "clip": str(setup.clip), "tflop": setup.tflop(), **sides, "ratios": numbers}
        )
        write_json(chosen.json, {"card": card(), "setups": content})
    heads = ("side", "trained", "clip", "s/step", "peak GiB (reserved)", "TFLOP/s", "how")
    say("\n" + table(heads, [*rows, PEER]))
    say("\n" + "\n".join(told))


if __name__ == "__main__":
    main()
