"""Twenty steps of the tiny SANA-Video checkpoint on the real clips, one thread; prints losses and norms as JSON.

Run `OMP_NUM_THREADS=1 python tests/golden/record.py > tests/golden/losses.json` after a change that is meant to change numbers, and
say so in the commit.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

CLIPS = Path(__file__).parents[2] / "examples" / "clips"
CONFIG = """
[run]
output_dir = "out"
seed = 1234
[model]
use = "sanavideo"
path = "model"
train = "full"
text_precision = "fp32"
[precision]
mixed = "no"
[[data]]
use = "folder"
path = "{clips}"
resolution = ["96x64", "64x64"]
[data.video]
frames = 9
fps = 8
[train]
steps = 20
batch_size = 2
caption_dropout = 0.2
log_every = 1
gradient_clip = {{ method = "norm", max = 1.0 }}
[optimizer]
use = "adamw"
lr = 1e-3
[lr_schedule]
use = "cosine"
warmup = "5 steps"
"""


KERNELS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
"""Variables by which MKL and oneDNN take other kernels than the processor's own."""


def machine() -> dict[str, str]:
    """What bit-identical numbers depend on. A virtual machine may name every generation of a processor alike."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    known = {key.strip(): value.strip() for key, value in reversed(lines)}
    generation = f"{known.get('model name')}, family {known.get('cpu family')}, model {known.get('model')}"
    return {
        "cpu": generation if "model name" in known else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": " ".join(f"{variable}={os.environ[variable]}" for variable in KERNELS if variable in os.environ),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }


def record() -> dict[str, object]:
    """Run in a fresh folder and collect the numbers."""
    from vtrain_sanavideo.tiny import build

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "model")
        (folder / "config.toml").write_text(CONFIG.format(clips=CLIPS.as_posix()), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-m", "vtrain.cli", "run", str(folder / "config.toml")],
            check=True,
            stdout=sys.stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return {"machine": machine(), "losses": [row["loss"] for row in rows], "norms": [row["grad_norm"] for row in rows]}


if __name__ == "__main__":
    print(json.dumps(record(), indent=1))
