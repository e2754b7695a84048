# %% [markdown]
# # The tiny world in a notebook
#
# A model of random weights learns to make "a red square moves right". Nothing is downloaded; some minutes on two cores. It
# needs matplotlib: `pip install ".[plot]" ./sanavideo_plugin`. Open this file as a notebook in VS Code, PyCharm or Jupyter (with
# jupytext), or run it: `python examples/notebook.py`.

# %%
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from vtrain import api
from vtrain.contract import Device, Ended, Filled, Logged, Saved, Validated, Warned

# Jupyter starts in the notebook's folder.
sys.path.append(str(Path(__file__).parent / "world") if "__file__" in globals() else "world")

import checkpoint
import judge
import world

OUTPUT = Path(world.__file__).parents[2] / "demo-output" / "notebook"
STEPS = 600
CLIPS = 384

# %% [markdown]
# ## Clips and a checkpoint
#
# Each clip is a small mp4 with its caption beside it. The checkpoint has SANA-Video's own classes; its transformer is untrained.

# %%
if not (OUTPUT / "clips").exists():
    world.write_clips(OUTPUT / "clips", world.clips(CLIPS, seed=0))
if not (OUTPUT / "checkpoint" / "model_index.json").exists():
    checkpoint.build(OUTPUT / "checkpoint")

# %% [markdown]
# ## The configuration
#
# The same file that `vtrain run` takes; [world.toml](world/world.toml) is a longer one.

# %%
CONFIG = OUTPUT / "notebook.toml"
CONFIG.write_text(
    f"""
[run]
name = "notebook"
output_dir = "run"

[model]
use = "sanavideo"
path = "checkpoint"
train = "full"
text_precision = "fp32"

[precision]
mixed = "{"bf16" if torch.accelerator.is_available() or Device().has_bf16 else "no"}"
gradient_checkpointing = false

[[data]]
use = "folder"
path = "clips"
resolution = ["64x64"]

[data.video]
frames = 9
fps = 8

[cache]
dir = "cache"

[train]
steps = {STEPS}
batch_size = 16
caption_dropout = 0.1
log_every = {min(25, STEPS // 2)}
gradient_clip = {{ method = "norm", max = 1.0 }}

[optimizer]
use = "adamw"
lr = 3e-3
betas = [0.9, 0.95]
weight_decay = 0.0

[lr_schedule]
use = "linear"
warmup = "50 steps"

[validation]
every = "{STEPS // 2} steps"
size = "64x64"
frames = 9
fps = 8
steps = 20
guidance = 3.0

[validation.prompts]
red-square-right = "a red square moves right"
blue-circle-up = "a blue circle moves up"

[checkpoint]
every = "{STEPS // 2} steps"
""",
    encoding="utf-8",
)
plan = api.plan(CONFIG)
print(
    f"{plan.estimate.steps} steps of {plan.estimate.samples_per_step} clips, {plan.estimate.steps_per_epoch:g} an epoch"
)

# %% [markdown]
# ## Training
#
# The run continues when the loop takes the next event. Interrupt the kernel (Ctrl-C) whenever you like, and run this cell again: it
# resumes from the last checkpoint, to the same numbers. To stop it with a checkpoint, write `stop` into `run/control`.

# %%
with api.run(CONFIG) as events:
    for event in events:
        match event:
            case Filled():
                print(f"{event.clips} clips are cached")
            case Logged():
                newest = event.steps[-1]
                print(f"step {newest.step}  loss {newest.loss:.3f}  {newest.seconds:.2f} s/step")
            case Saved():
                print(f"saved {event.folder}")
            case Validated():
                print(f"made {len(event.files)} videos after step {event.step}")
            case Warned():
                print(f"WARNING: {event.text}")
            case Ended():
                print(f"{event.reason}: step {event.step} of {event.steps}")

# %% [markdown]
# ## The loss
#
# Of all steps, also those before the run was resumed.

# %%
RUN = OUTPUT / "run"
rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
steps, losses = [row["step"] for row in rows], np.array([row["loss"] for row in rows])
width = min(25, len(losses))
figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
axes.plot(steps, losses, color="0.8", label="each step")
axes.plot(steps[width - 1 :], np.convolve(losses, np.ones(width) / width, "valid"), label=f"mean of {width}")
axes.set(xlabel="optimizer step", ylabel="loss", yscale="log")
axes.legend()
figure.savefig(RUN / "loss.png", dpi=120)
plt.show()

# %% [markdown]
# ## What it makes
#
# The videos of the last validation, each as a strip of its frames.

# %%
folder = sorted((RUN / "samples").iterdir())[-1]
videos = {path.stem: judge.read(path) for path in sorted(folder.glob("*.mp4"))}
figure, rows_of_axes = plt.subplots(len(videos), 1, figsize=(9, 1.4 * len(videos)), squeeze=False, layout="constrained")
for (name, frames), axes in zip(videos.items(), rows_of_axes[:, 0], strict=True):
    axes.imshow(np.concatenate(list(frames), axis=1))
    axes.set_title(name)
    axes.axis("off")
figure.savefig(RUN / "strips.png", dpi=120)
plt.show()
