"""Regularizers in a step: pauses, rates of their own, their own numbers told back, masks in the flow loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtrain.contract import LatentShape, LossTerm, RunLength, StepMetrics, StepView, TokenGrid
from vtrain.train.parameters import groups, own_rates, trained
from vtrain.train.step import Step, StepInput, Teacher, Term, flow_loss

RUN = RunLength(100, 10.0)


class Pull(nn.Module):
    """Pulls one block towards a trained vector, until a step; ten times the rate; keeps what it is told."""

    lr_factor = 10.0

    def __init__(self, until: int = 100) -> None:
        super().__init__()
        self.wanted = nn.Parameter(torch.full((32,), 0.5))
        self.until, self.views, self.told = until, list[StepView](), list[tuple[int, dict[str, float], bool]]()

    def active(self, step: int, run: RunLength) -> bool:
        assert run == RUN
        return step < self.until

    def over(self, step: int, run: RunLength) -> bool:
        return not self.active(step, run)

    def observe(self, step: int, metrics: Mapping[str, float], *, decide: bool) -> None:
        self.told.append((step, dict(metrics), decide))

    def forward(self, view: StepView) -> LossTerm:
        self.views.append(view)
        (tap,) = view.taps.values()
        value = (tap - self.wanted).square().mean()
        return LossTerm(value, {"distance": value.detach().sqrt()})


def test_a_paused_term_is_not_called_reads_no_block_and_leaves_zero_gradients(
    denoiser: Any, given: Callable[[int], StepInput], sampler: Any
) -> None:
    module, other = Pull(until=5), Pull()
    taught: list[StepInput] = []

    def teach(step: StepInput) -> Tensor:
        taught.append(step)
        return torch.zeros(2, 3, 8, 12, 4)

    step = Step(denoiser, sampler, {"pull": Term(module, (1,), teach), "other": Term(other, (2,))}, RUN)
    working = step(replace(given(2), step=4))
    assert set(working.metrics) == {"pull/loss", "pull/distance", "other/loss", "other/distance"}
    assert [list(view.taps) for view in module.views + other.views] == [[1], [2]]
    assert module.views[0].features is not None
    assert other.views[0].features is None
    folded = []
    fold, denoiser.fold = denoiser.fold, lambda tap, latents: folded.append(1) or fold(tap, latents)
    paused = step(replace(given(2), step=5))
    assert (len(module.views), len(taught), len(folded)) == (1, 1, 1)
    assert set(paused.metrics) == {"other/loss", "other/distance"}
    assert paused.loss.item() == pytest.approx((paused.flow.mean() + paused.metrics["other/loss"]).item())
    paused.loss.backward()
    assert module.wanted.grad is not None
    assert not module.wanted.grad.any()


def test_cached_features_reach_only_the_regularizer_that_they_are_of(
    denoiser: Any, given: Callable[[int], StepInput], sampler: Any
) -> None:
    first, second = Pull(), Pull()
    step = Step(denoiser, sampler, {"first": Term(first, (0,)), "second": Term(second, (0,))}, RUN)
    features = torch.ones(2, 3, 8, 12, 4)
    step(replace(given(2), features={"second": features}))
    assert first.views[0].features is None
    assert second.views[0].features is features


def test_a_teacher_of_source_frames_is_given_them_from_minus_1_to_1(given: Callable[[int], StepInput]) -> None:
    from vtrain_toy.family import TOY

    seen: list[tuple[Tensor, TokenGrid]] = []

    class Encoder:
        def encode(self, frames: Tensor, grid: TokenGrid) -> Tensor:
            seen.append((frames, grid))
            return frames

    family, step = TOY.build(TOY.options()), given(2)
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 3, 3, 4, 3)
    Teacher(family, Encoder(), None)(replace(step, frames=frames))
    ((floats, grid),) = seen
    assert floats[1, 2, 0, 3].tolist() == pytest.approx([-1, -0.6, 1])
    assert grid == family.token_grid(LatentShape(*step.clean.shape[1:]))


def test_a_regularizer_is_told_its_own_numbers_and_when_to_conclude(denoiser: Any, sampler: Any) -> None:
    module = Pull()
    step = Step(denoiser, sampler, {"pull": Term(module, (1,)), "pull-2": Term(nn.Identity(), ())}, RUN)
    row = StepMetrics(3, 0.3, 1.0, 0.9, 1e-3, None, [], [], 0.1, 0.0, 1, {"pull/loss": 0.1, "pull-2/loss": 0.7})
    step.observe(row, True)
    step.observe(replace(row, step=4, terms={}), False)
    assert module.told == [(3, {"loss": 0.1}, True), (4, {}, False)]


def test_a_rate_of_its_own_makes_groups_of_its_own_after_the_denoisers(denoiser: Any, sampler: Any) -> None:
    modules = {"pull": Pull(), "plain": nn.Linear(2, 2)}
    step = Step(denoiser, sampler, {name: Term(module, ()) for name, module in modules.items()}, RUN)
    made = groups(trained(step), own_rates(modules))
    assert [(group.decay, group.lr_factor) for group in made] == [(True, 1.0), (False, 1.0), (False, 10.0)]
    assert [name for name, _ in made[2].parameters] == ["regularizers.pull.wanted"]
    assert sum(len(group.parameters) for group in made) == len(trained(step))


def test_a_masked_flow_loss_is_the_mean_over_the_masks_area_of_each_clip() -> None:
    generator = torch.Generator().manual_seed(1)
    prediction, target = (torch.randn(3, 4, 2, 3, 5, generator=generator) for _ in range(2))
    mask = torch.rand(3, 2, 3, 5, generator=generator)
    mask[1] = 1
    mask[2] = 0
    mask[2, 1, 2, 3:] = 1
    wanted = []
    for clip in range(3):
        error = area = 0.0
        for f in range(2):
            for y in range(3):
                for x in range(5):
                    weight = float(mask[clip, f, y, x])
                    area += weight
                    for c in range(4):
                        at = (clip, c, f, y, x)
                        error += weight * (float(prediction[at]) - float(target[at])) ** 2 / 4
        wanted.append(error / area)
    found = flow_loss(prediction, target, mask)
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    assert found[1].item() == pytest.approx(flow_loss(prediction, target, None)[1].item(), rel=1e-5)


def test_what_a_mask_leaves_out_gets_no_gradient(
    denoiser: Any, given: Callable[[int], StepInput], sampler: Any
) -> None:
    prediction = torch.randn(2, 4, 2, 3, 4, requires_grad=True)
    mask = torch.zeros(2, 2, 3, 4)
    mask[:, :, :, :2] = 1
    flow_loss(prediction, torch.zeros(2, 4, 2, 3, 4), mask).mean().backward()
    assert prediction.grad is not None
    assert prediction.grad[..., :2].all()
    assert not prediction.grad[..., 2:].any()
