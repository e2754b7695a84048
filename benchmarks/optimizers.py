"""What a step of each built-in optimizer takes beside one of `adamw`: CPU-seconds on one thread, weights of one SANA block.

The block is 896 wide, as in the 104 M model: attention's matrices, the feed-forward's convolutions and a norm; 16 M weights, in
fp32 and, where an optimizer moves them, bf16. Each takes turns with `adamw` on the same weights in fp32. State is what lies in
optimizer.state after a step.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts its threads

import argparse
import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from report import say, say_machine, table, write_json
from torch import nn

from vtrain.contract import OptimizerSpec, ParameterGroup
from vtrain_builtin.plugin import vtrain_optimizers

WIDTH = 896
SHAPES: dict[str, tuple[int, ...]] = {
    **{
        f"attn{number}.{name}.weight": (WIDTH, WIDTH)
        for number in (1, 2)
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    },
    "ff.conv_inverted.weight": (6 * WIDTH, WIDTH, 1, 1),
    "ff.conv_depth.weight": (6 * WIDTH, 1, 3, 3),
    "ff.conv_point.weight": (WIDTH, 3 * WIDTH, 1, 1),
    "ff.conv_temp.weight": (WIDTH, WIDTH, 3, 1),
    "norm.weight": (WIDTH,),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Stepped:
    """An optimizer on weights of its own."""

    def __init__(self, spec: OptimizerSpec, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            name: nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(DTYPES[kind]))
            for name, shape in SHAPES.items()
        }
        self.slopes = [torch.randn(shape, generator=generator).to(DTYPES[kind]) for shape in SHAPES.values()]
        options = spec.options.model_validate({"lr": 1.0 if spec.name == "prodigy" else 1e-4})
        groups = [
            ParameterGroup(tuple(each for each in self.weights.items() if (each[1].ndim > 1) is decay), decay=decay)
            for decay in (True, False)
        ]
        self.optimizer = spec.build(options, groups)

    def step(self) -> float:
        """CPU-seconds."""
        for weight, slope in zip(self.weights.values(), self.slopes, strict=True):
            weight.grad = slope.clone()  # which it may use as a buffer
        start = time.process_time()
        self.optimizer.step()
        return time.process_time() - start

    def state_bytes(self) -> float:
        """For each weight."""
        kept: list[Any] = [value for state in self.optimizer.state.values() for value in state.values()]
        size = sum(value.nbytes for value in kept if isinstance(value, torch.Tensor))
        return size / sum(weight.numel() for weight in self.weights.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7, help="of each, of which the median counts")
    parser.add_argument("--only", nargs="*", help="names of optimizers")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    say_machine()
    specs = {spec.name: spec for spec in vtrain_optimizers() if spec.library is None or find_spec(spec.library[0])}
    rows = []
    for spec in specs.values():
        for kind in (each for each in DTYPES if each in spec.moves):
            if given.only and spec.name not in given.only:
                continue
            base, own = Stepped(specs["adamw"], "fp32"), Stepped(spec, kind)
            times = [(base.step(), own.step()) for _ in range(given.steps + 2)][2:]  # the first make the state
            seconds, ratio = (statistics.median(each) for each in ([b for _, b in times], [b / a for a, b in times]))
            rows.append((spec.name, kind, f"{own.state_bytes():.2f}", f"{seconds:.3f}", f"{ratio:.1f}"))
    heads = ("optimizer", "weights", "bytes of state a weight", "s/step", "times adamw's")
    say(table(heads, rows))
    write_json(given.json, {"optimizers": [dict(zip(heads, row, strict=True)) for row in rows]})


if __name__ == "__main__":
    main()
