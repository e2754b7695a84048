"""`layersync`: against the paper's equation in float64, and which block learns."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from vtrain.contract import (
    Condition,
    Duration,
    NoiseLevel,
    RunLength,
    StepView,
    SupportsCheck,
    SupportsPauses,
    Text,
)
from vtrain_builtin.layersync import LAYERSYNC, LayerSync

View = Callable[[Tensor, Tensor], StepView]


def built(**options: object) -> LayerSync:
    return LayerSync(LAYERSYNC.options.model_validate({"student": 1, "teacher": 3, **options}))


def view(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> StepView:
    """Of latents twice as high and wide as the taps (B, f, h, w, D) are."""
    batch, frames, height, width, _ = student.shape
    latents = torch.zeros(batch, 4, frames, 2 * height, 2 * width)
    level = NoiseLevel(torch.full((batch,), 0.5), torch.full((batch,), 500.0))
    text = Text.of(torch.zeros(batch, 2, 3), torch.ones(batch, 2, dtype=torch.bool))
    return StepView(
        *(latents,) * 5, level, Condition(text), {1: student, 3: teacher}, 0, RunLength(100, 10.0), mask=mask
    )


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(student: Tensor, teacher: Tensor, weight: float, mask: Tensor | None = None) -> float:
    """The equation with Python's own floats: over clips, frames and tokens one by one."""
    batch, frames, height, width, _ = student.shape
    clips = []
    for b in range(batch):
        above, below = 0.0, 0.0
        for f in range(frames):
            for y in range(height):
                for x in range(width):
                    s, t = student[b, f, y, x].tolist(), teacher[b, f, y, x].tolist()
                    dot = math.fsum(p * q for p, q in zip(s, t, strict=True))
                    cosine = dot / (math.sqrt(math.fsum(p * p for p in s)) * math.sqrt(math.fsum(q * q for q in t)))
                    area = mask[b, f, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] if mask is not None else torch.ones(4)
                    above, below = above - cosine * float(area.mean()), below + float(area.mean())
        clips.append(above / below)
    return weight * math.fsum(clips) / batch


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 5), (2, 3, 4, 6, 24), (3, 5, 2, 3, 7)])
@pytest.mark.parametrize("weight", [0.2, 1.5])
def test_the_loss_is_the_papers_equation_in_float64(shape: tuple[int, ...], weight: float) -> None:
    student, teacher = random(shape, 1), random(shape, 2)
    term = built(weight=weight).load({1: shape[-1], 3: shape[-1]})(view(student.float(), teacher.float()))
    assert float(term.value) == pytest.approx(reference(student, teacher, weight), abs=2e-6)
    assert float(term.metrics["cosine"]) == pytest.approx(-reference(student, teacher, 1.0), abs=2e-6)


def test_a_mask_weighs_tokens_within_each_clip_and_clips_alike() -> None:
    student, teacher = random((2, 3, 2, 4, 6), 1), random((2, 3, 2, 4, 6), 2)
    mask = random((2, 3, 4, 8), 3).sigmoid().float()
    mask[1, :, :, :6] = 0
    term = built(weight=0.5).load({1: 6, 3: 6})(view(student.float(), teacher.float(), mask))
    assert float(term.value) == pytest.approx(reference(student, teacher, 0.5, mask), abs=2e-6)
    assert float(term.value) != pytest.approx(reference(student, teacher, 0.5), abs=1e-3)


def test_the_gradient_goes_to_every_token_of_the_student_and_to_none_of_the_teacher() -> None:
    student, teacher = random((2, 3, 2, 4, 6), 1).requires_grad_(), random((2, 3, 2, 4, 6), 2).requires_grad_()
    built().load({1: 6, 3: 6})(view(student, teacher)).value.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert (student.grad.abs().amax(-1) > 0).all()


def test_tokens_are_compared_in_their_places() -> None:
    student = random((1, 3, 2, 4, 6), 1).float()
    module = built(weight=1.0).load({1: 6, 3: 6})
    assert float(module(view(student, student)).value) == pytest.approx(-1.0, abs=1e-6)
    for axis in (1, 2, 3):
        assert float(module(view(student, student.roll(1, axis))).value) > -0.9


@pytest.mark.parametrize(("until", "end"), [("40 steps", 40), ("3 epochs", 30), (None, None)])
def test_it_ends_when_it_is_told_to(until: str | None, end: int | None) -> None:
    module = built(until=until and Duration.parse(until)).load({1: 6, 3: 6})
    assert isinstance(module, SupportsPauses)
    run = RunLength(100, 10.0)
    assert [module.active(step, run) for step in (0, 29, 30, 39, 40, 99)] == [
        end is None or step < end for step in (0, 29, 30, 39, 40, 99)
    ]
    assert module.over(99, run) == (end is not None)


def test_at_weight_0_it_never_runs_and_the_plan_says_so() -> None:
    part = built(weight=0.0)
    assert isinstance(part, SupportsCheck)
    module = part.load({1: 6, 3: 6})
    assert isinstance(module, SupportsPauses)
    assert module.over(0, RunLength(100, 10.0))
    assert part.warnings() == ("weight is 0: it has no effect",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"student": 3, "teacher": 3}, "teacher 3 is not deeper than student 3"),
        ({"student": 5, "teacher": 2}, "teacher 2 is not deeper than student 5"),
        ({"until": "2 h"}, 'until: "steps" or "epochs"'),
        ({"weight": -0.1}, "greater than or equal to 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        built(**options)


def test_blocks_of_unlike_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="block 1 has width 6, block 3 has 8"):
        built().load({1: 6, 3: 8})
