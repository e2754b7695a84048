"""CREPA's peak memory: bytes of a training step of the 2B model with it and without, counted without computing anything.

The step is vtrain's own, in the real shapes, on fake tensors (torch's FakeTensorMode): every operator's result is counted from when
it is made until it is freed (vtrain.testing.memory.MemoryPeak), whatever device it would be on, so the count needs no GPU and takes
seconds. What kernels take for themselves, and what an allocator keeps in reserve, is not in it. Features are as from a
cache: DINOv2-giant's, a vector of 1536 for each token, of one micro-batch on the device (those ahead wait on the host).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_sides import LR, NEVER, RANK, REAL, TEXT_TOKENS, TINY, Clip, Setup, build
from report import Ratio, ratio, say, say_machine, table, write_json
from torch._subclasses.fake_tensor import FakeTensorMode

from vtrain.config.tables import LoraTable, PrecisionTable, TrainTable
from vtrain.contract import Condition, NoiseLevel, RunLength, Text
from vtrain.run.inbox import Inbox
from vtrain.testing.memory import MemoryPeak
from vtrain.train.checkpointing import checkpoint_gradients
from vtrain.train.loop import Ends, Loop
from vtrain.train.parameters import add_lora, groups, trained
from vtrain.train.prefetch import Prefetched
from vtrain.train.processes import Processes
from vtrain.train.saving import Unsaved
from vtrain.train.step import Step, StepInput, Term
from vtrain_builtin.adamw import AdamWOptions, build_adamw
from vtrain_sanavideo.crepa_loss import CrepaLoss
from vtrain_sanavideo.crepa_options import CrepaOptions
from vtrain_sanavideo.denoiser import SanaVideoDenoiser
from vtrain_sanavideo.flow import SanaVideoFlow
from vtrain_sanavideo.options import SanaVideoFlowOptions

LIMIT = 1.05
WIDTH = 1536
"""Of DINOv2-giant's vectors."""

STEPS = 2
"""The first makes the optimizer's state; the peak of the second is what is told."""


def step_of(setup: Setup, *, crepa: bool, checkpointing: Mapping[str, object] | None = None) -> Step:
    """Denoiser, flow loss and CREPA's module, weightless (on the meta device).

    checkpointing: of [precision], where it is not the setup's.
    """
    denoiser = SanaVideoDenoiser(build(setup), setup.geometry)
    if setup.mode == "lora":
        add_lora(denoiser, LoraTable(rank=RANK), 0, "")
    precision = {"gradient_checkpointing": setup.checkpointing, **(checkpointing or {})}
    checkpoint_gradients(denoiser, PrecisionTable.model_validate(precision), "")
    terms = {}
    if crepa:
        block = setup.config["num_layers"] // 2
        width = setup.config["num_attention_heads"] * setup.config["attention_head_dim"]
        module = CrepaLoss(CrepaOptions.model_validate({"block": block}), width, WIDTH if setup.is_real else width)
        terms["crepa"] = Term(module.to("meta"), (block,))
    step = Step(denoiser, SanaVideoFlow(SanaVideoFlowOptions(), {}), terms, RunLength(NEVER, 10.0))
    step.train()
    return step


def inputs(setup: Setup, *, crepa: bool) -> Iterator[Prefetched]:
    """Micro-batches of one clip, with features where CREPA is."""
    latents = (1, *setup.clip.latents)
    _, frames, height, width = setup.clip.latents
    wide = WIDTH if setup.is_real else setup.config["num_attention_heads"] * setup.config["attention_head_dim"]
    while True:
        features = (
            {"crepa": torch.empty(1, frames, height // 2, width // 2, wide, dtype=torch.bfloat16)} if crepa else {}
        )
        embeds = torch.empty(1, TEXT_TOKENS, setup.config["caption_channels"], dtype=torch.bfloat16)
        text = Text.of(embeds, torch.ones(1, TEXT_TOKENS, dtype=torch.bool))
        level = NoiseLevel(torch.empty(1), torch.empty(1))
        given = StepInput(torch.empty(latents), torch.empty(latents), level, Condition(text), 0, features=features)
        yield Prefetched(given, 0, ("fake",), [0.5])


def loop_of(setup: Setup, step: Step, processes: Processes) -> Loop:
    named = trained(step)
    return Loop(
        processes.wrap(step),
        build_adamw(AdamWOptions(lr=LR), groups(named, denoiser=step.denoiser)),
        [parameter for _, parameter in named],
        lambda _step: 1.0,
        None,  # type: ignore[arg-type]  # steps are fed by hand
        processes,
        TrainTable(steps=NEVER, log_every=NEVER),
        Ends(Unsaved(), None, Inbox()),
        first=0,
        last=NEVER,
        micro_batch=0,
        steps_per_epoch=4.0,
        seed=0,
    )


def count(
    setup: Setup, processes: Processes, *, crepa: bool, checkpointing: Mapping[str, object] | None = None
) -> tuple[int, dict[str, int]]:
    """(bytes at the peak of a step, label -> bytes of them): weights, and all that steps make."""
    step = step_of(setup, crepa=crepa, checkpointing=checkpointing)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        step.to_empty(device="cpu")
        loop = loop_of(setup, step, processes)
        peak = stack.enter_context(MemoryPeak("made by steps"))
        peak.count([*step.parameters(), *step.buffers()], "weights")
        fed = inputs(setup, crepa=crepa)
        for number in range(STEPS):
            peak.restart()
            loop.optimizer_step(number, fed)
            loop.unread.clear()
    processes.let_go()
    return peak.peak, dict(peak.at_peak)


def setups(chosen: argparse.Namespace) -> Iterator[Setup]:
    clips = [Clip(64, 64, 9)] if chosen.tiny else [Clip(832, 480, frames) for frames in chosen.frames]
    for clip in clips:
        for mode in ("lora", "full"):
            for checkpointing in (True, False):
                config: dict[str, Any] = TINY if chosen.tiny else REAL
                yield Setup(mode, clip, config, torch.device("meta"), 1, checkpointing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", nargs="+", type=int, default=[49, 81], help="of a clip of 832x480 (default: 49 81)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and clip, to see that the script works")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    chosen = parser.parse_args()
    say_machine()
    processes = Processes("bf16")
    processes.accelerator.device_placement = False
    rows, content = [], []
    for setup in setups(chosen):
        (without, _), (beside, parts) = (count(setup, processes, crepa=crepa) for crepa in (False, True))
        found: Ratio = ratio([beside], [without], LIMIT)
        kept = "checkpointing" if setup.checkpointing else "none"
        gib = [f"{size / 2**30:.2f}" for size in (without, beside)]
        rows.append((str(setup.clip), setup.mode, kept, *gib, str(found)))
        numbers = {"clip": str(setup.clip), "mode": setup.mode, "checkpointing": setup.checkpointing, "parts": parts}
        content.append({**numbers, "without": without, "with": beside, "ratio": asdict(found)})
        write_json(chosen.json, {"rows": content})
    say(table(("clip", "trained", "recompute", "GiB", "GiB with CREPA", "ratio"), rows))


if __name__ == "__main__":
    main()
