"""Three runs whose results a change of structure must not change: what they measured, made and cached, as one JSON file each.

    python benchmarks/same_bits.py record FOLDER       runs them with the vtrain that is installed
    python benchmarks/same_bits.py compare OLD NEW     what differs between two such folders; exits with 1 if anything does

The runs: the tiny world (full), the seven real clips (full, then resumed), and LoRA with CREPA, masks and image-to-video.
Two records compare bit for bit on one machine, with one torch and one number of threads. Times and memory are not compared; keys
that were renamed since are read under their new names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MEASURED = {"seconds", "data_wait", "memory"}
"""Of metrics.jsonl: what differs from run to run."""
PLANNED = (
    "steps",
    "steps_per_epoch",
    "samples_per_step",
    "cache_bytes",
    "checkpoint_bytes",
    "datasets",
    "buckets",
    "parts",
)
"""Of `vtrain plan --json`: all but its text for people."""

MIXED = """
[run]
name = "mixed"
output_dir = "run"
seed = 7
[model]
use = "sanavideo"
path = "model"
train = "lora"
[model.lora]
rank = 4
[precision]
mixed = "bf16"
[[data]]
use = "folder"
path = "clips"
resolution = ["96x64", "64x64"]
crop = "random"
[data.video]
frames = 9
fps = 8
image_to_video = 0.5
[data.masks]
folder = "masks"
[cache]
dir = "cache"
[train]
steps = 14
batch_size = 1
accumulate = 2
log_every = 4
[optimizer]
use = "adamw"
lr = 1e-3
[lr_schedule]
use = "cosine"
warmup = "3 steps"
[validation]
every = "7 steps"
size = "96x64"
frames = 9
fps = 8
steps = 4
guidance = 3.0
prompts = { rabbit = "a rabbit", city = "a city" }
images = { rabbit = "clips/bunny_00.mp4" }
[checkpoint]
every = "7 steps"
keep = "all"
[[regularizer]]
use = "crepa"
block = 2
encoder = "dino"
precision = "fp32"
"""


def prepare(folder: Path) -> dict[str, Path]:
    """Clips, models and configurations below `folder`; name -> configuration."""
    sys.path.insert(0, str(ROOT / "examples" / "world"))
    import av
    import demo
    import numpy as np
    import torch
    from PIL import Image
    from transformers import Dinov2Config, Dinov2Model

    from vtrain_sanavideo import tiny

    worlds, seven, mixed = (folder / name for name in ("world", "seven", "mixed"))
    for each in (worlds, seven, mixed / "masks"):
        each.mkdir(parents=True)
    demo.make_inputs(worlds, 24)
    length = demo.Length(24, 12)
    found = {
        "world": demo.write_config(
            demo.HERE / "world.toml", worlds / "world.toml", {**demo.moved(worlds), **length.changes}
        )
    }

    tiny.build(seven / "tiny-checkpoint")
    text = (ROOT / "examples" / "demo.toml").read_text(encoding="utf-8")
    for old, new in (
        ('"../demo-output', f'"{seven.as_posix()}'),
        ('"clips"', f'"{(ROOT / "examples" / "clips").as_posix()}"'),
        ("steps = 300", "steps = 18"),
        ('"150 steps"', '"9 steps"'),
        ('"100 steps"', '"6 steps"'),
        ("steps = 20\n", "steps = 4\n"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    found["seven"] = seven / "demo.toml"
    found["seven"].write_text(text, encoding="utf-8")

    tiny.build(mixed / "model")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"image_size": 70, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(mixed / "dino")
    (mixed / "clips").symlink_to(ROOT / "examples" / "clips")
    (mixed / "data").mkdir()
    for clip in sorted((ROOT / "examples" / "clips").glob("*_0*.*")):
        (mixed / "data" / clip.name).symlink_to(clip)
    (mixed / "data" / "masks").mkdir()
    for number, clip in enumerate(sorted((mixed / "data").glob("*.mp4"))[::2]):
        with av.open(str(clip)) as container:
            width, height = container.streams.video[0].width, container.streams.video[0].height
        white = np.zeros((height, width, 3), dtype=np.uint8)
        white[:, : width // 4 * (number % 3 + 1)] = 255
        Image.fromarray(white).save(mixed / "data" / "masks" / f"{clip.stem}.png")
    found["mixed"] = mixed / "mixed.toml"
    found["mixed"].write_text(MIXED.replace('path = "clips"', 'path = "data"'), encoding="utf-8")
    return found


def vtrain(*arguments: str) -> str:
    """What it prints. A script beside this interpreter, so that each checkout is measured with its own environment."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "vtrain"), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"vtrain {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def result(config: Path, run: Path, cache: Path, plan: str) -> dict[str, Any]:
    """All of a finished run that has to stay the same."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    planned = json.loads(plan)
    return {
        "plan": {key: planned[key] for key in PLANNED},
        "metrics": [{key: value for key, value in row.items() if key not in MEASURED} for row in rows],
        "samples": hashes(run / "samples", "*.mp4"),
        "weights": tensors(run / "checkpoints"),
        "cache": hashes(cache, "*.safetensors"),
        "settings": states(run / "checkpoints"),
    }


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    """File below the folder -> SHA-256 of its bytes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
    }


def tensors(folder: Path) -> dict[str, str]:
    """File below the folder -> SHA-256 of its tensors and of what it says of itself, which safetensors writes in any order."""
    import torch
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        digest = hashlib.sha256()
        with safe_open(path, "pt") as file:
            digest.update(json.dumps(file.metadata(), sort_keys=True).encode())
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                digest.update(
                    f"{name} {tensor.dtype} {tensor.shape}".encode()
                    + tensor.flatten().view(torch.uint8).numpy().tobytes()
                )
        found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def states(folder: Path) -> dict[str, Any]:
    """Checkpoint -> what its state says, without paths of this machine."""
    found = {}
    for path in sorted(folder.glob("*/state.json")):
        state = json.loads(path.read_text(encoding="utf-8"))
        state["settings"] = {
            key: value for key, value in state["settings"].items() if not isinstance(value, str) or "/" not in value
        }
        found[path.parent.name] = state
    return found


def record(folder: Path) -> None:
    """Run everything; `folder`/<name>.json each."""
    for name, config in prepare(folder / "work").items():
        plan = vtrain("plan", "--json", str(config))
        assert '"status": "failed"' not in vtrain("data", "list", "--json", str(config)), "a clip or a mask is not used"
        vtrain("run", str(config))
        if name == "seven":  # and a resume: the last checkpoint taken away, the same steps again
            resume(config.parent / "run")
            vtrain("run", str(config))
        text = json.dumps(result(config, config.parent / "run", config.parent / "cache", plan), indent=1)
        (folder / f"{name}.json").write_text(text.replace(str(folder.resolve()), ""), encoding="utf-8")
        print(f"recorded {folder / name}.json", flush=True)


def resume(run: Path) -> None:
    """Put a finished run back to an earlier checkpoint."""
    folders = sorted((run / "checkpoints").glob("step-*[0-9]"))
    folders[-1].rename(folders[-1].with_name("taken-away"))


def differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Places at which two JSON values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            if key not in old or key not in new:
                yield f"{at}.{key}: only in the {'new' if key in new else 'old'}"
            else:
                yield from differences(old[key], new[key], f"{at}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{at}[{number}]")
    elif old != new:
        yield f"{at}: {old!r} -> {new!r}"[:200]


def compare(old: Path, new: Path) -> int:
    """Print what differs. Exits with 2 where a folder holds no records."""
    names = [sorted(path.name for path in folder.glob("*.json")) for folder in (old, new)]
    if names[0] != names[1] or not names[0]:
        print(f"{old} holds {names[0]}, {new} holds {names[1]}")
        return 2
    count = 0
    for name in names[0]:
        one, other = (current(json.loads((folder / name).read_text(encoding="utf-8"))) for folder in (old, new))
        found = list(differences(one, other))
        print(f"{name}: {len(found)} differences" if found else f"{name}: the same")
        for line in found[:20]:
            print(f"  {line}")
        count += len(found)
    return int(count > 0)


def current(record: Any) -> Any:
    """A record with its settings under the keys of today: renamed ones, and tables of free keys, once one value each."""
    for dataset in record.get("plan", {}).get("datasets", ()):
        if "left_out" in dataset:
            dataset["skipped"] = dataset.pop("left_out")
    for state in record["settings"].values():
        leaves: dict[str, Any] = {}
        for key, value in state["settings"].items():
            for old, new in RENAMED.items():
                key = key.replace(old, new)
            leaves |= (
                {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
            )
        state["settings"] = {
            key: value for key, value in leaves.items() if not isinstance(value, str) or "/" not in value
        }
    return record


RENAMED = {
    "train.clip": "train.gradient_clip",
    "video.frame_interval": "video.frame_step",
    "regularizer.crepa": "regularizer[0]",
}
"""Parts of keys as checkpoints had them -> as they have them now."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("folder", type=Path)
    both = commands.add_parser("compare")
    both.add_argument("old", type=Path)
    both.add_argument("new", type=Path)
    chosen = parser.parse_args()
    if chosen.command == "compare":
        return compare(chosen.old, chosen.new)
    chosen.folder.mkdir(parents=True)
    record(chosen.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
