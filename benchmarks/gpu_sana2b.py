"""SANA-Video 2B on a GPU: seconds per step, peak memory and TFLOP/s of vtrain and of a bare loop on the same card.

Nothing is downloaded: the weights are random, in the real model's shapes. LoRA (rank 16) keeps them in bf16, full
training in fp32; both train under bf16 autocast, batch 1, with gradient checkpointing, fused AdamW. vtrain's side is its
own step, loop and feed; its caches are not measured, so random latents in memory stand in for them. The bare loop
(bare.py) has its batches on the card.

Two more sides are vtrain with CREPA on block 10 (of the tiny model: 1), DINOv2-giant as its teacher, a patch for each
token: with features as from a cache (random ones of the true shape, in memory), and made at each step from the latents,
decoded by the Wan VAE whose encoder is let go. Both have random weights in the real shapes.

--rows takes groups of other rows: every precision and what saves memory, each a configuration of vtrain's (gpu_rows.py). Each group
has the bare loop with it, and takes under 4 minutes on a machine that has nothing but the wheels (tests/gpu/wheels.py); times
are reckoned, and are of 832x480x49:

{groups}

--json FILE is completed by later calls: a group that is measured again replaces the older figures, and those of another card,
driver or version stay beside. The table at the end has all that the file has of this card.

Memory is measured with each side alone in memory. Times are of blocks of steps, the card synchronised before and after,
in turn where all models fit on the card (LoRA), else one side after the other (full, groups whose rows would not fit together,
and where they turn out not to); the table says which. "estimate" is the plan's, of tensors at the peak of a training step, as
soon as vtrain's plan has one. TFLOP/s rest on a forward of 121 TFLOP at 832x480, 81 frames, and work in proportion to the tokens:
backward is twice that, or once under LoRA, whose frozen weights need no gradients, and checkpointing adds a forward.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from gpu_results import Measured, Results, ratios, row
from gpu_rows import GROUPS, ROWS, estimated, groups_help
from gpu_sides import REAL, SAVING, SIDES, TINY, Block, Clip, Setup, applies
from report import machine, say

from vtrain.contract import ConfigError, Device
from vtrain.train.processes import Processes

ALL = SIDES | SAVING


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
    found = Measured(side, setup.mode, str(setup.clip), setup.tflop(), setup.in_turn)
    device = Device.of(setup.device)
    try:
        if side in ROWS:
            found.estimate = estimated(setup.plan(side)) or 0
        device.reset_peak()
        with ALL[side](setup, processes) as block:
            block()
            if not setup.in_turn:
                found.seconds = [seconds(setup, block) for _ in range(blocks)]
    except torch.OutOfMemoryError:
        found.note = "out of memory"
    except ConfigError as error:  # most likely a library that this machine has not
        found.note = "; ".join(problem.what for problem in error.problems)
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # such as one that compiles kernels where there is no compiler
        found.note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'without a word'}"
    if device.accelerated:
        found.allocated, found.reserved = device.peak(), torch.cuda.max_memory_reserved()
    return found


def measure_in_turn(setup: Setup, found: dict[str, Measured], processes: Processes, blocks: int) -> bool:
    """Add times to all sides, from one process with all models in memory, after a block of each to warm up.

    False: there is no room for all of them.
    """
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
        return False
    return True


def measure(setup: Setup, processes: Processes, blocks: int, sides: Iterable[str] = ()) -> dict[str, Measured]:
    """The sides of a setup, by default the first ones. Too little memory is a note, not an error; too little for all models at once
    means that they are timed one after the other."""

    def alone(each: Setup, side: str) -> Measured:
        measured = measure_alone(each, side, processes, blocks)
        Device.of(setup.device).release()
        return measured

    found = {side: alone(setup, side) for side in sides or SIDES if applies(side, setup)}
    whole = {side: each for side, each in found.items() if not each.note}
    if setup.in_turn and whole:
        fits = measure_in_turn(setup, whole, processes, blocks)
        Device.of(setup.device).release()
        if not fits:
            found |= {side: alone(replace(setup, turns=False), side) for side in whole}
    return found


def card() -> dict[str, str]:
    """The GPU and its driver."""
    if not torch.cuda.is_available():
        return {"gpu": "none"}
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=False) if shutil.which(query[0]) else None
    return {"gpu": told.stdout.strip() if told else torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}


def arguments() -> argparse.Namespace:
    told = (__doc__ or "").format(groups=groups_help())
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and clip, to see that the script works")
    parser.add_argument(
        "--rows", nargs="+", choices=[*GROUPS, "all"], metavar="GROUP", help="groups of rows, see above"
    )
    parser.add_argument("--modes", nargs="+", choices=("lora", "full"), default=["lora", "full"], help="without --rows")
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=ALL,
        metavar="ROW",
        default=list(SIDES),
        help="without --rows: bare, vtrain, CREPA; or any row",
    )
    parser.add_argument("--frames", nargs="+", type=int, help="of a clip (default: 49 81, with --rows 49)")
    parser.add_argument("--size", default="832x480", help="of a clip, WxH (default: 832x480)")
    parser.add_argument("--blocks", type=int, help="timed blocks of each side (default: 6, with --rows 4)")
    parser.add_argument("--steps", type=int, help="steps of a block (default: 4, with --rows 2)")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument(
        "--deterministic", action="store_true", help="all sides as under run.deterministic: what it costs"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file, or add them to what it has")
    return parser.parse_args()


def works(chosen: argparse.Namespace) -> Iterator[tuple[str, Setup, tuple[str, ...]]]:
    """(name, setup, sides) of what is asked for."""
    width, height = map(int, ("64x64" if chosen.tiny else chosen.size).split("x"))
    device, steps = Device.of(chosen.device).torch, chosen.steps or (2 if chosen.rows else 4)
    all_frames = (9,) if chosen.tiny else chosen.frames or ((49,) if chosen.rows else (49, 81))
    asked = [(mode, mode, tuple(chosen.sides), True) for mode in chosen.modes]
    if chosen.rows:
        names = GROUPS if "all" in chosen.rows else chosen.rows
        groups = {name: GROUPS[name] for name in names}
        asked = [(name, each.mode, ("bare", *each.rows), each.in_turn) for name, each in groups.items()]
    marks = [word for word in ("no_checkpointing", "deterministic") if vars(chosen)[word]]
    for name, mode, sides, turns in asked:
        for frames in all_frames:
            clip = Clip(width, height, frames)
            setup = Setup(mode, clip, TINY if chosen.tiny else REAL, device, steps, not chosen.no_checkpointing, turns)
            yield " ".join([name, str(clip), *(word.replace("_", " ") for word in marks)]), setup, sides


def main() -> None:
    chosen = arguments()
    processes = Processes("bf16")
    if chosen.deterministic:
        processes.device.deterministic()
    if processes.device.kind != chosen.device:
        sys.exit(
            f"this process computes on {processes.device}, not on {chosen.device} (a GPU hides behind CUDA_VISIBLE_DEVICES=)"
        )
    here, versions = card(), machine()
    results = Results(chosen.json, here, versions)
    say("; ".join(f"{name} {value}" for name, value in {**here, **versions}.items()))
    for name, setup, sides in works(chosen):
        begun, blocks = time.monotonic(), chosen.blocks or (4 if chosen.rows else 6)
        found = measure(setup, processes, blocks, sides)
        took = round(time.monotonic() - begun, 1)
        compared = ratios(found)
        say("\n".join(str(row(each, compared)) for each in found.values()) + f"\n{name}: {took} s")
        how = {"measured": f"{datetime.now(UTC):%Y-%m-%d}", "steps": setup.steps, "blocks": blocks, "took": took}
        results.add(name, found, how)
    say("\n" + results.text())


if __name__ == "__main__":
    main()
