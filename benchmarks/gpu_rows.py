"""The rows of gpu_sana2b.py: ways to train that are told apart by precision and by what saves memory, each a configuration file.

A row's settings are read from its file by vtrain itself: what cannot work is refused as everywhere, and the plan's estimate of its
memory is that of the very settings that are measured. The model folder has the model's real headers and no weights.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from vtrain.plan.records import Plan
from vtrain.plan.workload import memory_estimate
from vtrain.run.prepare import planned
from vtrain_sanavideo import tiny
from vtrain_sanavideo.geometry import SanaVideoConfig

CONFIG = """
[run]
output_dir = "run"
[model]
use = "sanavideo"
path = "{model}"
train = "{mode}"
{lora}
[precision]
mixed = "bf16"
{precision}
[[data]]
use = "folder"
path = "clips"
resolution = ["{size}"]
[data.video]
frames = {frames}
[train]
steps = 1000000
caption_dropout = 0
log_every = {steps}
{train}
[optimizer]
use = "{optimizer}"
lr = {lr}
{more}
"""
RANK = 16
LR = 1e-5
BOTH = ("lora", "full")


@dataclass(frozen=True)
class Row:
    """modes: of training, that it is for. precision: lines of [precision], apart from `mixed`. optimizer: its name.

    more: tables. train: lines of [train]. recomputes: whether its precision says what is recomputed; else it is the call's.
    """

    modes: tuple[str, ...] = BOTH
    precision: str = ""
    optimizer: str = "adamw"
    more: str = ""
    train: str = ""

    @property
    def recomputes(self) -> bool:
        return "gradient_checkpointing" in self.precision


ROWS: Mapping[str, Row] = {
    "vtrain": Row(),
    "no checkpointing": Row(precision="gradient_checkpointing = false"),
    "every 2nd block": Row(precision="gradient_checkpointing = true\ngradient_checkpointing_interval = 2"),
    "every 4th block": Row(precision="gradient_checkpointing = true\ngradient_checkpointing_interval = 4"),
    "feed-forward": Row(precision='gradient_checkpointing = "feed_forward"'),
    "block offload": Row(("lora",), more='[offload]\ngroup = "block"'),
    "block offload, stream": Row(("lora",), more='[offload]\ngroup = "block"\nstream = true'),
    "leaf offload": Row(("lora",), more='[offload]\ngroup = "leaf"'),
    "states on CPU": Row(more="[offload]\noptimizer = true"),
    "adamw8bit": Row(optimizer="adamw8bit"),
    "skip-and-count": Row(train="skip_nonfinite = 10"),
    "EMA": Row(more="[ema]"),
    "EMA on CPU": Row(more='[ema]\non = "cpu"'),
    "base int8": Row(("lora",), 'base = "int8"\nquantize_on = "accelerator"'),
    "base fp8": Row(("lora",), 'base = "fp8"\nquantize_on = "accelerator"'),
    "base int4": Row(("lora",), 'base = "int4"\nquantize_on = "accelerator"'),
    "base fp32": Row(("lora",), 'base = "fp32"'),
    "pure bf16": Row(("full",), 'base = "bf16"', "adamw_bf16"),
    "pure bf16, Kahan": Row(("full",), 'base = "bf16"', "optimi-adamw"),
}
"""All under bf16 autocast. "vtrain": LoRA on a bf16 base, or fp32 weights; AdamW, every block recomputed."""


@dataclass(frozen=True)
class Group:
    """Rows that are measured together, and the bare loop with them. in_turn: whether their steps take turns, all models in memory.

    minutes: about how long it takes at 832x480x49, reckoned from the steps of an H200; no group was timed.
    """

    mode: str
    rows: tuple[str, ...]
    minutes: float
    in_turn: bool = False


GROUPS: Mapping[str, Group] = {
    "lora": Group(
        "lora", ("vtrain", "EMA", "EMA on CPU", "adamw8bit", "states on CPU", "skip-and-count"), 3.0, in_turn=True
    ),
    "lora-recompute": Group(
        "lora", ("vtrain", "every 2nd block", "every 4th block", "feed-forward", "no checkpointing"), 2.0
    ),
    "lora-base": Group("lora", ("vtrain", "base fp32", "base int8", "base fp8", "base int4"), 3.0, in_turn=True),
    "lora-offload": Group("lora", ("vtrain", "block offload", "block offload, stream", "leaf offload"), 3.0),
    "full": Group("full", ("vtrain", "EMA", "pure bf16", "pure bf16, Kahan", "skip-and-count"), 2.5),
    "full-states": Group("full", ("vtrain", "adamw8bit", "states on CPU", "EMA on CPU"), 3.5),
    "full-recompute": Group("full", ("vtrain", "every 2nd block", "every 4th block", "feed-forward"), 2.0),
    "crepa": Group("lora", ("vtrain", "CREPA cached", "CREPA decoded"), 2.5, in_turn=True),
}
"""What --rows takes."""


def groups_help() -> str:
    lines = [
        f"  {name:15} {each.minutes:g} min  {each.mode}: bare, {', '.join(each.rows)}" for name, each in GROUPS.items()
    ]
    return "\n".join(lines)


@cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="vtrain-gpu-rows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def headers(config: Mapping[str, Any]) -> Path:
    """A checkpoint's folder whose transformer has this config and the headers of its weights, with holes for values."""
    name = f"{config['num_layers']}x{config['num_attention_heads']}x{config['attention_head_dim']}-{config['caption_channels']}"
    folder = _scratch() / name
    if not folder.exists():
        tiny.build(folder, layers=1, text_width=config["caption_channels"])
        place = folder / "transformer"
        before = json.loads((place / "config.json").read_text(encoding="utf-8"))
        (place / "config.json").write_text(json.dumps(before | dict(config)), encoding="utf-8")
        head, size = {}, 0
        for weight, shape in SanaVideoConfig.model_validate(dict(config)).shapes().items():
            head[weight] = {"dtype": "F32", "shape": shape, "data_offsets": [size, size + 4 * prod(shape)]}
            size += 4 * prod(shape)
        text = json.dumps(head).encode()
        with (place / "diffusion_pytorch_model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
    return folder


def plan_of(
    name: str,
    mode: str,
    config: Mapping[str, Any],
    clip: tuple[int, int, int],
    *,
    steps: int = 1,
    checkpointing: bool = True,
) -> Plan:
    """The plan of a row. clip: width, height, frames. Raises ConfigError, for a library that is missing too."""
    row = ROWS[name]
    width, height, frames = clip
    own = "" if row.recomputes else f"gradient_checkpointing = {json.dumps(checkpointing)}\n"
    text = CONFIG.format(
        model=headers(config).as_posix(),
        mode=mode,
        lora=f"[model.lora]\nrank = {RANK}" if mode == "lora" else "",
        precision=own + row.precision,
        size=f"{width}x{height}",
        frames=frames,
        steps=steps,
        train=row.train,
        optimizer=row.optimizer,
        lr=LR,
        more=row.more,
    )
    path = _scratch() / f"{name}-{mode}.toml".replace(" ", "-").replace(",", "")
    path.write_text(text, encoding="utf-8")
    return planned(path)


def estimated(plan: Plan) -> int | None:
    """Bytes on the card at the peak of a training step, as the plan reckons them, tensors alone. None: blocks were not measured."""
    phase = memory_estimate(plan).training
    return phase.tensors if phase.device.get("activations") else None
