"""An optimizer step never waits for the device: no number is read from a tensor until numbers are logged."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vtrain.config.tables import EmaTable, GradientClipTable, LoraTable, TrainTable
from vtrain.contract import (
    Caption,
    ClipShape,
    Condition,
    Denoiser,
    Device,
    Family,
    Logged,
    RunLength,
    Sampler,
    Text,
    timed,
)
from vtrain.data.batches import pad
from vtrain.run.inbox import Inbox
from vtrain.train.ema import Average
from vtrain.train.loop import Ends, Loop
from vtrain.train.parameters import add_lora, groups, trained
from vtrain.train.prefetch import Prefetched
from vtrain.train.saving import Unsaved
from vtrain.train.step import Step, StepInput

READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal"}
"""What .item(), .tolist() of a scalar, bool() and shapes that depend on values come down to."""


class Reads(TorchDispatchMode):
    """Counts operations that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in READS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@dataclass
class OneProcess:
    """What the loop asks of Processes, for one process on the CPU."""

    count: int = 1
    rank: int = 0
    device: Device = field(default_factory=Device)

    def unsynchronised(self, step: object, *, when: bool) -> nullcontext[None]:
        return nullcontext()

    def gathered(self, values: list[Any]) -> list[Any]:
        return values

    def any(self, *votes: bool) -> tuple[bool, ...]:
        return votes


def fed(family: Family, sampler: Sampler) -> Iterator[Prefetched]:
    shape = family.latent_shape(ClipShape(5, 64, 64))
    (spec,) = family.text_encoders().values()
    with spec.open("cpu") as encoder:
        words = encoder.encode([Caption("a clip")], "prompt").only.embeds[0]
    text: Text = pad([{"text": words}], family.text_encoders())
    for number in itertools.count():
        generator = torch.Generator().manual_seed(number)
        level = timed(family, sampler.draw(1, generator))
        clean, noise = (torch.randn((1, *shape), generator=generator) for _ in range(2))
        given = StepInput(clean, noise, level, Condition(text), number)
        yield Prefetched(given, number, ("clip",), level.sigma.tolist())


def toy() -> tuple[Family, Denoiser, Sampler]:
    from vtrain_toy.family import TOY

    from vtrain_builtin.flow import FLOW

    family = TOY.build(TOY.options())
    return family, family.load_denoiser("cpu", "fp32"), FLOW.build(FLOW.options(), {})


def sana(folder: Path) -> tuple[Family, Denoiser, Sampler]:
    from vtrain_sanavideo.plugin import FLOW, SANAVIDEO
    from vtrain_sanavideo.tiny import build

    family = SANAVIDEO.build(SANAVIDEO.options.model_validate({"path": str(build(folder / "tiny"))}))
    return family, family.load_denoiser("cpu", "fp32"), FLOW.build(FLOW.options(), family.scheduler_config())


@pytest.mark.parametrize(
    "clip", [None, GradientClipTable(method="norm", max=1.0), GradientClipTable(method="value", max=0.1)]
)
@pytest.mark.parametrize("kind", ["toy", "sana", "sana lora", "toy ema"])
def test_an_optimizer_step_reads_nothing_from_the_device(
    tmp_path: Path, kind: str, clip: GradientClipTable | None
) -> None:
    family, denoiser, sampler = toy() if kind.startswith("toy") else sana(tmp_path)
    if kind == "sana lora":
        add_lora(denoiser, LoraTable(rank=2, dropout=0.1), 1, "")
    denoiser.gradient_checkpointing(True)
    step = Step(denoiser, sampler, {}, RunLength(100, 10.0))
    step.train()
    named = trained(step)
    from vtrain_builtin.adamw import ADAMW

    optimizer = ADAMW.build(ADAMW.options.model_validate({"lr": 1e-3}), groups(named))
    table = TrainTable.model_validate({"steps": 100, "log_every": 1, "accumulate": 2, "gradient_clip": clip})
    loop = Loop(
        step,
        optimizer,
        [parameter for _, parameter in named],
        lambda step: 1.0,
        None,  # type: ignore[arg-type] - the test feeds the loop itself
        OneProcess(),  # type: ignore[arg-type]
        table,
        Ends(Unsaved(), None, Inbox()),
        first=0,
        last=100,
        micro_batch=0,
        steps_per_epoch=10,
        seed=1,
        average=Average(trained(denoiser.module), EmaTable(), Device()) if kind == "toy ema" else None,
    )
    source = fed(family, sampler)
    items = [next(source) for _ in range(6)]
    loop.optimizer_step(0, iter(items[:2]))
    with Reads() as reads:
        loop.optimizer_step(1, iter(items[2:4]))
        loop.optimizer_step(2, iter(items[4:6]))
    assert reads.found == []
    (logged,) = loop.read()
    assert isinstance(logged, Logged)
    assert [each.step for each in logged.steps] == [1, 2, 3]


def test_the_counter_counts() -> None:
    with Reads() as reads:
        tensor = torch.ones(2).sum()
        float(tensor)
        bool(tensor > 1)
    assert len(reads.found) == 2
