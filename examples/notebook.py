# %% [markdown]
# # A run from Python
#
# The tiny world, trained from a notebook: open this file in an editor that knows cells, or run it whole:
# `python examples/notebook.py [FOLDER]`. Interrupted in the middle, a second run of the cell resumes from the last checkpoint.

# %%
from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import vtrain.api
from vtrain.contract import Event, Logged, Saved, Validated

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "world"))
import demo  # noqa: E402 - it lies beside this file

# %% [markdown]
# Clips, a checkpoint of random weights, and a configuration: all made here.

# %%
OUTPUT = Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "demo-output" / "notebook").resolve()
STEPS = 30

OUTPUT.mkdir(parents=True, exist_ok=True)
demo.make_inputs(OUTPUT, 24)
changes = {
    **demo.moved(OUTPUT),
    **demo.Length(STEPS, STEPS // 2).changes,
    **demo.precision(),
    "log_every = 50": "log_every = 5",
}
config = demo.write_config(demo.HERE / "world.toml", OUTPUT / "world.toml", changes)

# %% [markdown]
# What a run would do, before it does anything.

# %%
planned = vtrain.api.plan(config)
print(f"{planned.estimate.steps} steps, {planned.estimate.epochs:.1f} epochs of {len(planned.scan.samples)} clips")

# %% [markdown]
# The run. Each event is what just happened; the run goes on when the next one is taken.

# %%
losses: dict[int, float] = {}
sheet: Path | None = None


def follow(event: Event) -> None:
    """Keep the numbers, say the rest."""
    global sheet
    if isinstance(event, Logged):
        losses.update({step.step: step.loss for step in event.steps})
    elif isinstance(event, Saved):
        print(f"step {event.step}: saved {event.folder.name}, loss {losses[event.step]:.3f}")
    elif isinstance(event, Validated):
        sheet = event.sheet


with vtrain.api.run(config) as run:
    for event in run:
        follow(event)

# %% [markdown]
# The loss, and what the model makes of its prompts.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.plot(list(losses), list(losses.values()))
left.set_xlabel("optimizer step")
left.set_ylabel("loss")
if sheet is not None:
    right.imshow(plt.imread(sheet))
right.set_axis_off()
figure.savefig(OUTPUT / "notebook.png", dpi=120)
print(OUTPUT / "notebook.png")
