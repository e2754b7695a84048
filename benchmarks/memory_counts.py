"""Peak bytes of a training step of SANA-Video, counted on fake tensors, for the estimate of a plan to be compared with.

    python benchmarks/memory_counts.py --json tests/golden/memory_counts.json

The step is vtrain's own (crepa_memory.py says how it is counted). `real` rows are the 2B model; `judged` ones models of widths,
depths and clips at which nothing that the estimate goes by was measured: that was done at widths 96 and 2240 (memory.json of the
plugin). `beside`: the first of these with all blocks recomputed and what else changes memory; of groups that are offloaded what
lies on the card is counted, a clone of what waits; teachers are a DINOv2 of the model's own width in bf16, on the source's frames
or on those that the Wan VAE decodes in fp32. Nothing is computed, so that it takes no GPU; about twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from crepa_memory import STEPS, Clip, Processes, Setup, count, inputs, loop_of, step_of
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from gpu_sides import REAL
from report import machine, say
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Dinov2Config, Dinov2Model

from vtrain.config.tables import EmaTable, OffloadTable, TrainTable
from vtrain.contract import Device, NormalizedCodec
from vtrain.contract.transfers import Arriving, Transfers
from vtrain.testing.memory import MemoryPeak
from vtrain.train.ema import Average
from vtrain.train.offload import offload
from vtrain.train.parameters import trained
from vtrain.train.prefetch import Prefetched
from vtrain.train.step import Teacher
from vtrain_sanavideo.crepa import CrepaTeacher
from vtrain_sanavideo.crepa_encoder import _AtWork
from vtrain_sanavideo.crepa_options import CrepaOptions

JUDGED = ((8, 6, Clip(256, 256, 33)), (12, 10, Clip(832, 480, 17)), (4, 14, Clip(512, 320, 49)))
"""Heads of 112, blocks, clip. All else of the model is as in the 2B model's config."""

MODES: Mapping[str, Mapping[str, object]] = {
    "blocks": {"gradient_checkpointing": True},
    "every 2nd block": {"gradient_checkpointing": True, "gradient_checkpointing_interval": 2},
    "feed-forward": {"gradient_checkpointing": "feed_forward"},
    "nothing": {"gradient_checkpointing": False},
}
"""What is recomputed, as [precision] says it."""


BESIDE: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "block offload": ("lora", {"group": "block"}),
    "block offload, two together": ("lora", {"group": "block", "blocks_per_group": 2}),
    "block offload, stream": ("lora", {"group": "block", "stream": True}),
    "leaf offload": ("lora", {"group": "leaf"}),
    "accumulate 3": ("full", {}),
    "EMA": ("full", {}),
}
"""What else changes memory: its name, what is trained, its table [offload]."""

TEACHERS = {"teacher, source": False, "teacher, decoded": True}
"""CREPA whose encoder runs at each step: whether its frames are decoded."""


def count_beside(name: str, processes: Processes) -> dict[str, object]:
    """A row of BESIDE. Of weights that wait nothing is counted, whose clones come to the card."""
    heads, blocks, clip = JUDGED[0]
    mode, table = BESIDE[name]
    sizes = {"num_attention_heads": heads, "num_cross_attention_heads": heads, "cross_attention_dim": 112 * heads}
    setup = Setup(mode, clip, REAL | sizes | {"num_layers": blocks}, torch.device("meta"), 1)
    step = step_of(setup, crepa=False, checkpointing={"gradient_checkpointing": True})
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(patch.object(Transfers, "send", _cloned))
        stack.enter_context(patch.object(Transfers, "streams", lambda _: False))
        step.to_empty(device="cpu")
        made = offload(step.denoiser, OffloadTable.model_validate(table), Device(), stack) if table else None
        if made is not None:
            made._ahead = bool(table.get("stream"))
        away = [each for group in made.groups for each in group.home.fetch()] if made else []
        loop = loop_of(setup, step, processes)
        if name == "accumulate 3":
            loop.table = TrainTable(steps=loop.last, log_every=loop.last, accumulate=3)
        if name == "EMA":
            loop.average = Average(trained(step.denoiser.module), EmaTable(), Device())
        peak = stack.enter_context(MemoryPeak("made by steps"))
        peak.count([*step.parameters(), *step.buffers()], "weights")
        peak.count(loop.average.weights.values() if loop.average else (), "average")
        peak.count(away, "away")
        fed, waiting, weights = inputs(setup, crepa=False), peak.now["away"], peak.now["weights"]
        for number in range(STEPS):
            peak.restart()
            loop.optimizer_step(number, fed)
            loop.unread.clear()
    processes.let_go()
    sizes = {"heads": heads, "blocks": blocks, "clip": [clip.frames, clip.height, clip.width]}
    row = {"beside": name, **sizes, "trained": mode, "recomputed": "blocks", "peak": peak.peak - waiting}
    return row | {"weights": weights}


def count_teacher(name: str, processes: Processes) -> dict[str, object]:
    """A row of TEACHERS, under LoRA. weights: of the denoiser, the adapter and CREPA's module; encoder, codec: theirs."""
    heads, blocks, clip = JUDGED[0]
    width = 112 * heads
    sizes = {"num_attention_heads": heads, "num_cross_attention_heads": heads, "cross_attention_dim": width}
    setup = Setup("lora", clip, REAL | sizes | {"num_layers": blocks}, torch.device("meta"), 1)
    step = step_of(setup, crepa=True, checkpointing={"gradient_checkpointing": True})
    with torch.device("meta"):
        sides = {"hidden_size": width, "num_attention_heads": width // 64, "image_size": 518, "patch_size": 14}
        model = Dinov2Model(Dinov2Config(**sides)).bfloat16().eval()
        vae = AutoencoderKLWan().eval() if TEACHERS[name] else None
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for each in (step, model, vae):
            if each is not None:
                each.to_empty(device="cpu")
        encode = _AtWork(model, 1, 14, lambda tokens: (tokens.height, tokens.width))
        teacher = CrepaTeacher(encode, CrepaOptions())
        codec = NormalizedCodec(vae, [0.0] * 16, [1.0] * 16, setup.geometry, "the Wan VAE") if vae is not None else None
        term = step.terms["crepa"]
        step.terms["crepa"] = replace(term, teach=Teacher(setup.geometry, teacher, codec))
        loop = loop_of(setup, step, processes)
        peak = stack.enter_context(MemoryPeak("made by steps"))
        peak.count([*step.parameters(), *step.buffers()], "weights")
        peak.count(model.parameters(), "encoder")
        peak.count(vae.parameters() if vae is not None else (), "codec")
        there = {label: size for label, size in peak.now.items() if size}
        fed = (_with_frames(each, clip) for each in inputs(setup, crepa=False))
        for number in range(STEPS):
            peak.restart()
            loop.optimizer_step(number, fed)
            loop.unread.clear()
    processes.let_go()
    row = {"beside": name, "heads": heads, "blocks": blocks, "clip": [clip.frames, clip.height, clip.width]}
    return row | {"trained": "lora", "recomputed": "blocks", "peak": peak.peak, **there}


def _with_frames(fed: Prefetched, clip: Clip) -> Prefetched:
    """With the source's frame for each frame of tokens."""
    frames = torch.empty(1, 3, clip.latents[1], clip.height, clip.width, dtype=torch.uint8)
    return replace(fed, given=replace(fed.given, frames=frames))


def _cloned(_: Transfers, tensors: tuple[torch.Tensor, ...]) -> Arriving:
    return Arriving(tuple(each.clone() for each in tensors))


def setups() -> Iterator[tuple[str, Setup]]:
    models = [("judged", heads, blocks, clip) for heads, blocks, clip in JUDGED]
    models += [("real", 20, 20, Clip(832, 480, frames)) for frames in (49, 81)]
    for name, heads, blocks, clip in models:
        sizes = {"num_attention_heads": heads, "num_cross_attention_heads": heads, "cross_attention_dim": 112 * heads}
        for mode in ("lora", "full"):
            yield name, Setup(mode, clip, REAL | sizes | {"num_layers": blocks}, torch.device("meta"), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file that is written")
    chosen = parser.parse_args()
    processes = Processes("bf16")
    processes.accelerator.device_placement = False
    beside = [count_beside(name, processes) for name in BESIDE]
    beside += [count_teacher(name, processes) for name in TEACHERS]
    rows = []
    for name, setup in setups():
        for recomputed, table in MODES.items():
            peak, parts = count(setup, processes, crepa=False, checkpointing=table)
            row = {
                "model": name,
                "heads": setup.config["num_attention_heads"],
                "blocks": setup.config["num_layers"],
                "clip": [setup.clip.frames, setup.clip.height, setup.clip.width],
                "trained": setup.mode,
                "recomputed": recomputed,
                "peak": peak,
                "weights": parts["weights"],
            }
            rows.append(row)
            say(f"{row}")
            chosen.json.write_text(
                _lines({"machine": machine(), "config": REAL, "beside": beside, "rows": rows}), encoding="utf-8"
            )


def _lines(content: Mapping[str, object]) -> str:
    """JSON with a line for each row."""
    parts = []
    for key, value in content.items():
        rows = ",\n".join(f"    {json.dumps(row)}" for row in value) if isinstance(value, list) else ""
        parts.append(f"  {json.dumps(key)}: " + (f"[\n{rows}\n  ]" if rows else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
