"""The demo: make a tiny checkpoint in the real format, train it on real clips, draw the loss, say where everything is."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vtrain_sanavideo import tiny

HERE = Path(__file__).parent


def draw_loss(metrics: Path, picture: Path) -> None:
    """The loss of every step, its running mean, and the learning rate below."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth, value = [], losses[0]
    for loss in losses:
        value = 0.95 * value + 0.05 * loss
        smooth.append(value)
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, height_ratios=(3, 1), figsize=(8, 5), layout="constrained")
    top.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    top.plot(steps, smooth, color="tab:blue", label="running mean (0.95)")
    top.set_ylabel("loss")
    top.legend()
    bottom.plot(steps, [row["lr"] for row in rows], color="tab:orange")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    figure.savefig(picture, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=HERE.parent / "demo-output", help="folder for everything it makes"
    )
    output = parser.parse_args().output.resolve()
    checkpoint, run = output / "tiny-checkpoint", output / "run"
    print(
        "Seven real clips through everything: scanning, encoding, 300 steps of training, videos, checkpoints. The model is\n"
        "too small to learn them. It takes about a minute; Ctrl-C saves, and the same command resumes.",
        flush=True,
    )
    if not (checkpoint / "model_index.json").exists():
        print(f"making a tiny checkpoint in the real format: {checkpoint}", flush=True)
        tiny.build(checkpoint)
    config = output / "demo.toml"
    text = (HERE / "demo.toml").read_text(encoding="utf-8")
    text = text.replace('"../demo-output', f'"{output.as_posix()}').replace(
        '"clips"', f'"{(HERE / "clips").as_posix()}"'
    )
    config.write_text(text, encoding="utf-8")
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # vtrain inherits what is ignored, not what is caught
        signal.signal(signal.SIGINT, lambda number, frame: None)  # a Ctrl-C is for vtrain, which saves what is done
    done = subprocess.run(["vtrain", "run", str(config)], check=False)
    if done.returncode != 0:
        return done.returncode
    draw_loss(run / "metrics.jsonl", run / "loss.png")
    sheet = max((run / "samples").glob("*/sheet.png"))
    print("\nThe demo is done. Look at:")
    for label, path in (
        ("checkpoints", run / "checkpoints"),
        ("videos", sheet.parent),
        ("contact sheet", sheet),
        ("loss plot", run / "loss.png"),
        ("numbers", run / "metrics.jsonl"),
        ("plan", run / "plan.json"),
    ):
        print(f"  {label:14} {path}")
    print(f"  TensorBoard    tensorboard --logdir {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
