"""SANA-Video 2B on a GPU: seconds per step, peak memory and TFLOP/s of vtrain and of a bare loop on the same card.

Nothing is downloaded: the weights are random, in the real model's shapes. LoRA (rank 16) keeps them in bf16, full
training in fp32; both train under bf16 autocast, batch 1, with gradient checkpointing, fused AdamW. vtrain's side is its
own step, loop and feed; its caches are not measured, so random latents in memory stand in for them. The bare loop
(bare.py) has its batches on the card.

Memory is measured with each side alone in memory. Times are of blocks of steps, the card synchronised before and after,
in turn where both models fit on the card (LoRA), else one side after the other (full); the table says which.
TFLOP/s rest on a forward of 121 TFLOP at 832x480, 81 frames, and work in proportion to the tokens: backward is twice
that, or once under LoRA, whose frozen weights need no gradients, and checkpointing adds a forward.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import bare
import torch
from accelerate import init_empty_weights
from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel
from report import Ratio, machine, ratio, say, table, write_json

from vtrain.config.tables import CheckpointTable, LoraTable, TrainTable
from vtrain.contract import Duration, Latents, RunLength, Text
from vtrain.data.batches import Batch
from vtrain.train.adapters import add_lora
from vtrain.train.feed import Feed
from vtrain.train.loop import Ends, Logged, Loop
from vtrain.train.parameters import groups, trained
from vtrain.train.processes import Processes
from vtrain.train.signals import StopRequest
from vtrain.train.step import Step
from vtrain_builtin.adamw import AdamWOptions, build_adamw
from vtrain_sanavideo.denoiser import SanaVideoDenoiser
from vtrain_sanavideo.flow import SanaVideoFlow
from vtrain_sanavideo.geometry import TransformerConfig
from vtrain_sanavideo.options import SanaVideoFlowOptions

RANK = 16
LR = 1e-5
TEXT_TOKENS, REAL_TOKENS = 300, 120
FORWARD_TFLOP, FORWARD_TOKENS = 121.0, 32_760
LIMITS = {"seconds": 1.02, "memory": 1.05}
PEER = ("SimpleTuner 4, as published", "lora", "832x480x49", "0.599", "59.15 (-)", "-", "H100, checkpointing said on")
NEVER = 10**9

REAL = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 20, "attention_head_dim": 112, "num_layers": 20,
    "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240,
    "caption_channels": 2304, "mlp_ratio": 3.0, "attention_bias": False, "sample_size": 30, "patch_size": (1, 2, 2),
    "norm_elementwise_affine": False, "guidance_embeds": False, "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}  # fmt: skip
"""transformer/config.json of SANA-Video_2B_480p: 2,056,862,144 parameters."""

TINY = REAL | {
    "num_attention_heads": 2, "attention_head_dim": 48, "num_layers": 2, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 48, "cross_attention_dim": 96, "caption_channels": 64,
}  # fmt: skip

Block = Callable[[], None]
"""Runs a block of steps and reads their loss, so that they are done."""


@dataclass(frozen=True)
class Clip:
    """Size of what is trained on, in pixels."""

    width: int
    height: int
    frames: int

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """(C, f, h, w)."""
        return 16, (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        _, frames, height, width = self.latents
        return frames * (height // 2) * (width // 2)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True)
class Setup:
    """What is measured. mode: "lora" or "full". steps: of a block."""

    mode: str
    clip: Clip
    config: dict[str, Any]
    device: torch.device
    steps: int
    checkpointing: bool = True

    @property
    def in_turn(self) -> bool:
        """Whether two models with their states are held at once."""
        return self.mode == "lora" or self.device.type == "cpu"

    def tflop(self) -> float | None:
        """Work of a step; None for a model that is not the real one."""
        if self.config is not REAL:
            return None
        forwards = (3 if self.mode == "full" else 2) + self.checkpointing
        return FORWARD_TFLOP * forwards * self.clip.tokens / FORWARD_TOKENS


@dataclass
class Measured:
    """One side of a setup. seconds: per step, one for each block. Peaks in bytes, 0 on a CPU. note: what went wrong."""

    side: str
    setup: Setup
    seconds: list[float] = field(default_factory=list)
    allocated: int = 0
    reserved: int = 0
    note: str = ""


def build(setup: Setup) -> SanaVideoTransformer3DModel:
    """The transformer with random weights, made on the device. Its rotary tables are computed, so they are real."""
    with init_empty_weights(include_buffers=False):
        model = SanaVideoTransformer3DModel(**setup.config)
    dtype = torch.bfloat16 if setup.mode == "lora" else torch.float32
    state = {}
    for name, weight in model.named_parameters():
        made = torch.empty(weight.shape, dtype=dtype, device=setup.device)
        is_norm = weight.ndim == 1 and name.endswith("weight")
        state[name] = made.fill_(1.0 if is_norm else 0.0) if weight.ndim == 1 else made.normal_(std=0.02)
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(setup.device)


class RandomBatches:
    """In the place of vtrain's Batches: batches[m] of batch 1 from a few random samples in memory."""

    def __init__(self, setup: Setup, samples: int = 4) -> None:
        random = torch.Generator().manual_seed(0)
        width = setup.config["caption_channels"]
        self.latents = [torch.randn((1, *setup.clip.latents), generator=random) for _ in range(samples)]
        self.embeds = [torch.randn((1, TEXT_TOKENS, width), generator=random).bfloat16() for _ in range(samples)]
        self.mask = torch.arange(TEXT_TOKENS)[None] < REAL_TOKENS

    def __getitem__(self, number: int) -> Batch:
        which = number % len(self.latents)
        text = Text(self.embeds[which], self.mask)
        return Batch(number, Latents(self.latents[which]), text, (number,), (f"random/{which}",), (False,))


@contextmanager
def bare_side(setup: Setup, _processes: Processes) -> Iterator[Block]:
    batches = RandomBatches(setup)
    samples = [
        bare.Sample(latents.to(setup.device), embeds.to(setup.device), batches.mask.to(setup.device))
        for latents, embeds in zip(batches.latents, batches.embeds, strict=True)
    ]
    model = bare.prepare(build(setup), RANK if setup.mode == "lora" else None)
    if setup.checkpointing:
        model.enable_gradient_checkpointing()
    losses = bare.train(model, bare.adamw(model, LR), samples)

    def block() -> None:
        for _ in range(setup.steps):
            loss = next(losses)
        check(float(loss))

    yield block


@contextmanager
def vtrain_side(setup: Setup, processes: Processes) -> Iterator[Block]:
    denoiser = SanaVideoDenoiser(build(setup), TransformerConfig.model_validate(setup.config))
    if setup.mode == "lora":
        add_lora(denoiser, LoraTable(rank=RANK), 0, "")
    denoiser.gradient_checkpointing(setup.checkpointing)
    sampler = SanaVideoFlow(SanaVideoFlowOptions(), {})
    step = Step(denoiser, sampler, {}, RunLength(100, 10.0))
    step.train()
    named = trained(step)
    optimizer = build_adamw(AdamWOptions(lr=LR), groups(named))
    stop = StopRequest()
    loop = Loop(
        processes.wrap(step),
        optimizer,
        [parameter for _, parameter in named],
        lambda _step: 1.0,
        Feed(RandomBatches(setup), sampler, 0, processes.device),  # type: ignore[arg-type]
        processes,
        TrainTable(steps=NEVER, log_every=setup.steps),
        Ends(lambda _step, _micro: (Path(), ()), None, stop),
        first=0,
        last=NEVER,
        micro_batch=0,
        steps_per_epoch=4.0,
        seed=0,
    )
    events = loop.run(CheckpointTable(every=Duration(NEVER, "steps")), None, at_start=False)

    def block() -> None:
        event = next(events)
        assert isinstance(event, Logged)
        assert len(event.rows) == setup.steps
        check(event.rows[-1].loss)

    try:
        yield block
    finally:
        events.close()  # type: ignore[attr-defined]


SIDES = {"bare": bare_side, "vtrain": vtrain_side}


def check(loss: float) -> None:
    assert loss == loss, "the loss is not a number"


def seconds(setup: Setup, block: Block) -> float:
    """Of a step, in a block."""
    synchronise(setup)
    start = time.perf_counter()
    block()
    synchronise(setup)
    return (time.perf_counter() - start) / setup.steps


def synchronise(setup: Setup) -> None:
    if setup.device.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_alone(setup: Setup, side: str, processes: Processes, blocks: int) -> Measured:
    """Peak memory from the building of the model on; times too, where the sides cannot take turns."""
    found = Measured(side, setup)
    cuda = setup.device.type == "cuda"
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with SIDES[side](setup, processes) as block:
            block()
            if not setup.in_turn:
                found.seconds = [seconds(setup, block) for _ in range(blocks)]
    except torch.OutOfMemoryError:
        found.note = "out of memory"
    if cuda:
        found.allocated, found.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return found


def measure_in_turn(setup: Setup, found: dict[str, Measured], processes: Processes, blocks: int) -> None:
    """Add times to both sides, from one process with both models in memory, after a block of each to warm up."""
    try:
        with bare_side(setup, processes) as bare_block, vtrain_side(setup, processes) as vtrain_block:
            sides = {"bare": bare_block, "vtrain": vtrain_block}
            for block in sides.values():
                block()
            for turn in range(blocks):
                for side in sorted(sides, reverse=turn % 2 == 1):
                    found[side].seconds.append(seconds(setup, sides[side]))
    except torch.OutOfMemoryError:
        for each in found.values():
            each.seconds, each.note = [], "out of memory with both models"


def measure(setup: Setup, processes: Processes, blocks: int) -> dict[str, Measured]:
    """Both sides of a setup. Too little memory is a note, not an error."""
    found = {}
    for side in SIDES:
        found[side] = measure_alone(setup, side, processes, blocks)
        free()
    if setup.in_turn and not any(each.note for each in found.values()):
        measure_in_turn(setup, found, processes, blocks)
        free()
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
        f"{work / median:.0f}" if work and median else "-",
        each.note or ("in turn" if each.setup.in_turn else "one after the other"),
    )


def ratios(found: dict[str, Measured]) -> dict[str, Ratio]:
    """vtrain / bare: seconds in pairs of blocks, peak allocated bytes."""
    ours, theirs = found["vtrain"], found["bare"]
    pairs = {"seconds": (ours.seconds, theirs.seconds), "memory": ([ours.allocated], [theirs.allocated])}
    whole = not ours.note and not theirs.note
    return {name: ratio(a, b, LIMITS[name]) for name, (a, b) in pairs.items() if whole and a and all(b)}


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
    parser.add_argument("--frames", nargs="+", type=int, default=[49, 81], help="of a clip (default: 49 81)")
    parser.add_argument("--size", default="832x480", help="of a clip, WxH (default: 832x480)")
    parser.add_argument("--blocks", type=int, default=6, help="timed blocks of each side (default: 6)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a block (default: 4)")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
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
                torch.device(chosen.device),
                chosen.steps,
                not chosen.no_checkpointing,
            )


def main() -> None:
    chosen = arguments()
    processes = Processes("bf16")
    if processes.device.type != chosen.device:
        sys.exit(
            f"this process computes on {processes.device}, not on {chosen.device} (a GPU hides behind CUDA_VISIBLE_DEVICES=)"
        )
    say("; ".join(f"{name} {value}" for name, value in {**card(), **machine()}.items()))
    rows: list[tuple[str, ...]] = []
    told: list[str] = []
    content: list[dict[str, object]] = []
    for setup in setups(chosen):
        found = measure(setup, processes, chosen.blocks)
        rows += [row(each) for each in found.values()]
        compared = ratios(found)
        told += [f"{setup.mode} {setup.clip}, vtrain / bare, {name}: {each}" for name, each in compared.items()]
        say(f"{rows[-2]}\n{rows[-1]}")
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
