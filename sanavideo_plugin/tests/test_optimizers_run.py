"""What runs with bf16 weights and with an average of weights save is read by diffusers, in a process without vtrain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """
[run]
output_dir = "out"
[model]
use = "sanavideo"
path = "{model}"
train = "full"
[precision]
base = "{base}"
[[data]]
use = "folder"
path = "{clips}"
resolution = ["96x64"]
[data.video]
frames = 5
fps = 8
[train]
steps = 2
[optimizer]
use = "{use}"
lr = 1e-3
"""
CLIPS = Path(__file__).parents[2] / "examples" / "clips"
READ = """
import pathlib, sys
from safetensors.torch import load_file
from diffusers import SanaVideoTransformer3DModel
assert not any(name.startswith("vtrain") for name in sys.modules)
for folder in sys.argv[1:]:
    (file,) = pathlib.Path(folder, "transformer").glob("*.safetensors")
    kinds = {str(value.dtype) for value in load_file(file).values()}
    model, info = SanaVideoTransformer3DModel.from_pretrained(folder, subfolder="transformer", output_loading_info=True)
    assert not any(info.values()), info
    print(kinds, sum(float(weight.double().sum()) for weight in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("use", "base"), [("adamw_bf16", "bf16"), ("schedulefree-adamw", "fp32")])
def test_diffusers_reads_the_checkpoint(checkpoint: Path, tmp_path: Path, use: str, base: str) -> None:
    """Two processes that import diffusers, one after the other: half a minute."""
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(model=checkpoint, clips=CLIPS, use=use, base=base), encoding="utf-8")
    code = "from vtrain.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "run", str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "out" / "checkpoints" / "step-000002"
    folders = [folder, *([folder / "averaged"] if use == "schedulefree-adamw" else [])]
    read = subprocess.run([sys.executable, "-c", READ, *map(str, folders)], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    lines = read.stdout.splitlines()
    assert all(("torch.bfloat16" if base == "bf16" else "torch.float32") in line for line in lines)
    assert len(set(lines)) == len(folders)
