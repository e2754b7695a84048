"""A new word by LoRA: a trained tiny world has never seen purple; twenty clips later it makes it, and still knows the rest.

    python examples/world/lora.py [--world FOLDER]

Run demo.py first. Ends by loading the adapter in plain diffusers, in a process without vtrain, and comparing the videos.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import demo
import evaluate
import numpy as np
import world

from vtrain.plan.records import Plan
from vtrain.run.prepare import planned

SOURCE = demo.HERE / "lora.toml"
CLIPS = 20
NEW = [world.Words(world.NEW_COLOUR, *rest) for rest in product(world.KNOWN_SHAPES, world.DIRECTIONS)]
SEEDS_OF_NEW = 4
"""Starting noises from which each of the new combinations is asked for: as many videos as the old words have."""
SHOWN = NEW[4]

PLAIN = """
import sys
import numpy as np, torch
from diffusers import SanaVideoPipeline
model, adapter, prompt, seed, out = sys.argv[1:]
pipeline = SanaVideoPipeline.from_pretrained(model, torch_dtype=torch.float32)
pipeline.load_lora_weights(adapter)
pipeline.set_progress_bar_config(disable=True)
video = pipeline(
    prompt, negative_prompt="", height=64, width=64, frames=9, num_inference_steps=20, guidance_scale=3.0,
    use_resolution_binning=False, generator=torch.Generator().manual_seed(int(seed)), output_type="np",
).frames[0]
assert not {"vtrain", "vtrain_sanavideo"} & set(sys.modules)
np.save(out, (video * 255).round().astype(np.uint8))
"""
"""The pipeline's own way to use an adapter. What it is given is what lora.toml's [validation] says."""


def prepare(trained: Path, checkpoint: Path, folder: Path) -> Path:
    """The trained model as a model folder, the clips of the new word, and the configuration file."""
    model = folder / "model"
    if not model.exists():
        partial = folder / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(trained / "checkpoint", partial)
        shutil.copytree(checkpoint / "transformer", partial / "transformer", dirs_exist_ok=True)
        partial.rename(model)
    if len(list((folder / "clips").glob("*.txt"))) < CLIPS:
        world.write_clips(folder / "clips", new_clips())
    return demo.write_config(SOURCE, folder / "lora.toml", demo.moved(trained))


def new_clips() -> Iterator[tuple[world.Words, np.ndarray]]:
    """Twenty clips of the new colour, every shape and direction about equally often."""
    random = np.random.default_rng(20)
    for number in range(CLIPS):
        words = NEW[number % len(NEW)]
        yield words, world.draw(world.stage(words, random))


def judged(plan: Plan, checkpoint: Path | None, folder: Path) -> dict[str, evaluate.Accuracy]:
    """Accuracy on the new word and on the old ones. checkpoint: of the adapter; None: without it."""
    model = evaluate.denoiser(plan, checkpoint)
    new = [(seed, words) for seed in evaluate.SEEDS[:SEEDS_OF_NEW] for words in NEW]
    return {
        "new word": evaluate.accuracy(evaluate.answers(plan, model, new, folder / "new")),
        "old words": evaluate.accuracy(evaluate.answers(plan, model, evaluate.fixed(32), folder / "old")),
    }


def difference(plan: Plan, adapter: Path, folder: Path) -> int:
    """Largest difference of a pixel, of 255, between vtrain's video of SHOWN in fp32 and that of plain diffusers."""
    ours = evaluate.frames(plan, evaluate.denoiser(plan, adapter), SHOWN.caption, evaluate.SEEDS[0])
    out, prompt = folder / "plain.npy", f"{SHOWN.caption} motion score: 30."
    arguments = (folder / "model", adapter, prompt, evaluate.SEEDS[0], out)
    subprocess.run([sys.executable, "-c", PLAIN, *map(str, arguments)], check=True)
    return int(np.abs(ours.astype(int) - np.load(out).astype(int)).max())


def main() -> int:
    parser = argparse.ArgumentParser(description="Teach a trained tiny world a new colour by LoRA.")
    parser.add_argument("--world", type=Path, default=demo.OUTPUT, help="demo.py's output folder")
    trained = parser.parse_args().world.resolve()
    if not (trained / "world.toml").exists():
        parser.error(f"{trained} holds no tiny world: run demo.py first")
    checkpoint = evaluate.newest(planned(trained / "world.toml").config.run.output_dir)
    folder = trained / "lora"
    folder.mkdir(exist_ok=True)
    print("20 clips of purple, 200 steps of LoRA on the demo's model; then a judge, before and after", flush=True)
    config = prepare(trained, checkpoint, folder)
    if (code := demo.train(config)) != 0:
        return code
    plan = planned(config)
    adapter = evaluate.newest(plan.config.run.output_dir)
    result: dict[str, object] = {"clips": CLIPS}
    for label, weights in (("before", None), ("after", adapter)):
        for kind, shares in judged(plan, weights, folder / "judged" / label).items():
            result[f"{kind}, {label}"] = asdict(shares)
            print(f"{kind}, {label}: colour {shares.colour:.0%}, all three words {shares.all:.0%} of {shares.prompts}")
    exact = planned(
        demo.write_config(SOURCE, folder / "exact.toml", {**demo.moved(trained), 'mixed = "bf16"': 'mixed = "no"'})
    )
    result["largest difference from plain diffusers, of 255"] = worst = difference(exact, adapter, folder)
    print(f"the same prompt and noise in plain diffusers, fp32: largest difference of a pixel {worst} of 255")
    (folder / "lora.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"everything is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
