"""Peak bytes of a training step of SANA-Video, counted on fake tensors, for the estimate of a plan to be compared with.

    python benchmarks/memory_counts.py --json tests/golden/memory_counts.json

The step is vtrain's own (crepa_memory.py says how it is counted). `real` rows are the 2B model; `judged` ones models of widths,
depths and clips at which nothing that the estimate goes by was measured: that was done at widths 96 and 2240 (memory.json of the
plugin). Nothing is computed, so that it takes no GPU; about twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from crepa_memory import Clip, Processes, Setup, count
from gpu_sides import REAL
from report import machine, say

JUDGED = ((8, 6, Clip(256, 256, 33)), (12, 10, Clip(832, 480, 17)), (4, 14, Clip(512, 320, 49)))
"""Heads of 112, blocks, clip. All else of the model is as in the 2B model's config."""

MODES: Mapping[str, Mapping[str, object]] = {
    "blocks": {"gradient_checkpointing": True},
    "every 2nd block": {"gradient_checkpointing": True, "gradient_checkpointing_interval": 2},
    "feed-forward": {"gradient_checkpointing": "feed_forward"},
    "nothing": {"gradient_checkpointing": False},
}
"""What is recomputed, as [precision] says it."""


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
            chosen.json.write_text(_lines({"machine": machine(), "config": REAL, "rows": rows}), encoding="utf-8")


def _lines(content: Mapping[str, object]) -> str:
    """JSON with a line for each row."""
    parts = []
    for key, value in content.items():
        rows = ",\n".join(f"    {json.dumps(row)}" for row in value) if isinstance(value, list) else ""
        parts.append(f"  {json.dumps(key)}: " + (f"[\n{rows}\n  ]" if rows else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
