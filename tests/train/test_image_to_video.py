"""Image-to-video in training: which draws, the clean first frame, its loss; alone, mixed and resumed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vtrain.config import load
from vtrain.contract import Condition, Device, LatentShape, NoiseLevel, RunLength, Text
from vtrain.plan.make import make_plan
from vtrain.registry import discover
from vtrain.train.loop import Loop
from vtrain.train.prefetch import Prefetcher, given_clean
from vtrain.train.settings import Setting, settings
from vtrain.train.step import Step, StepInput, flow_loss

Run = Callable[..., subprocess.CompletedProcess[str]]
HALF = "\n[data.video]\nimage_to_video = 0.5\n"


@pytest.fixture
def level() -> NoiseLevel:
    return NoiseLevel(torch.tensor([0.25, 0.5, 0.75]), torch.tensor([250.0, 500.0, 750.0]))


LATENTS = LatentShape(2, 3, 2, 2)


class Hundreds:
    """A family for which a clean frame has timestep 7."""

    def timestep(self, sigma: Tensor) -> Tensor:
        return 7 + 100 * sigma


FAMILY: Any = Hundreds()


def test_a_batch_without_any_keeps_one_level_for_a_clip_and_no_mask(level: NoiseLevel) -> None:
    assert given_clean(FAMILY, level, None, (0,) * 3, LATENTS) == (level, None)
    mask = torch.rand(3, 3, 2, 2)
    found, same = given_clean(FAMILY, level, mask, (0,) * 3, LATENTS)
    assert found is level
    assert same is mask
    picture = mask[:, :1]
    assert given_clean(FAMILY, level, picture, (0,) * 3, LATENTS._replace(frames=1))[1] is picture


def test_the_first_frames_are_at_level_0_and_out_of_the_loss_of_those_that_are_drawn_so(level: NoiseLevel) -> None:
    found, mask = given_clean(FAMILY, level, None, (1, 0, 2), LATENTS)
    assert found.sigma.tolist() == [[0, 0.25, 0.25], [0.5, 0.5, 0.5], [0, 0, 0.75]]
    assert found.timestep.tolist() == [[7, 250, 250], [500, 500, 500], [7, 7, 750]]
    assert mask is not None
    assert mask.shape == (3, 3, 2, 2)
    assert mask[:, :, 0, 0].tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]
    assert level.sigma.tolist() == [0.25, 0.5, 0.75], "what was drawn is not written to"


def test_a_mask_of_the_data_counts_after_the_first_frame(level: NoiseLevel) -> None:
    own = torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    kept = own.clone()
    _, mask = given_clean(FAMILY, level, own, (1, 0, 1), LATENTS)
    assert mask is not None
    assert torch.equal(mask[1], own[1])
    assert torch.equal(mask[[0, 2], 1:], own[[0, 2], 1:])
    assert not mask[[0, 2], 0].any()
    assert torch.equal(own, kept)


def test_levels_that_differ_by_frame_already_stay_so(level: NoiseLevel) -> None:
    each = NoiseLevel(torch.rand(3, 3), torch.rand(3, 3))
    found, _ = given_clean(FAMILY, each, None, (0, 1, 0), LATENTS)
    assert torch.equal(found.sigma[[0, 2]], each.sigma[[0, 2]])
    assert torch.equal(found.sigma[1, 1:], each.sigma[1, 1:])
    assert (found.sigma[1, 0], found.timestep[1, 0]) == (0, 7)


@pytest.fixture
def stepped(denoiser: Any, sampler: Any) -> Callable[[StepInput], Any]:
    step = Step(denoiser, sampler, {}, RunLength(10, 1.0))
    return lambda given: step(given)


def drawn(given: StepInput, *first_frame: bool) -> StepInput:
    level, mask = given_clean(
        FAMILY, given.level, None, tuple(map(int, first_frame)), LatentShape(*given.clean.shape[1:])
    )
    return replace(given, level=level, mask=mask)


def row(given: StepInput, number: int) -> StepInput:
    """One clip of a micro-batch, alone."""
    one = slice(number, number + 1)
    text = given.condition.text
    return StepInput(
        given.clean[one],
        given.noise[one],
        NoiseLevel(given.level.sigma[one], given.level.timestep[one]),
        Condition(text.map(lambda tensor: tensor[one])),
        given.step,
    )


def test_the_noisy_first_frame_is_the_clean_one_bit_for_bit(given: Callable[[int], StepInput], sampler: Any) -> None:
    mixed = drawn(given(2), True, False)
    noisy, _ = sampler.corrupt(mixed.clean, mixed.noise, mixed.level)
    assert torch.equal(noisy[0, :, 0], mixed.clean[0, :, 0])
    assert not torch.equal(noisy[0, :, 1], mixed.clean[0, :, 1])
    plain, _ = sampler.corrupt(mixed.clean, mixed.noise, given(2).level)
    assert torch.equal(noisy[:, :, 1:], plain[:, :, 1:])
    assert torch.equal(noisy[1], plain[1])


def test_the_first_frames_loss_has_no_gradient(given: Callable[[int], StepInput]) -> None:
    mixed = drawn(given(2), True, False)
    prediction = torch.zeros_like(mixed.clean).requires_grad_()
    loss = flow_loss(prediction, mixed.noise - mixed.clean, mixed.mask)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    assert not gradient[0, :, 0].any()
    assert (gradient[0, :, 1:] != 0).all()
    assert (gradient[1] != 0).all()
    assert loss[0].item() == pytest.approx((mixed.noise - mixed.clean)[0, :, 1:].square().mean().item(), rel=1e-6)


def test_noise_and_target_of_the_frames_that_are_given_change_nothing_in_the_loss(
    given: Callable[[int], StepInput], stepped: Callable[[StepInput], Any]
) -> None:
    mixed = drawn(given(2), True, True)
    noise = mixed.noise.clone()
    noise[:, :, 0] = 100.0
    assert torch.equal(stepped(replace(mixed, noise=noise)).loss, stepped(mixed).loss)
    plain = given(2)
    assert not torch.equal(stepped(replace(plain, noise=noise)).loss, stepped(plain).loss)


def test_clips_of_a_mixed_batch_have_the_loss_that_they_have_alone(
    given: Callable[[int], StepInput], stepped: Callable[[StepInput], Any]
) -> None:
    plain = given(3)
    mixed = stepped(drawn(plain, True, False, True)).flow
    alone = [stepped(drawn(row(plain, n), first)).flow for n, first in enumerate((True, False, True))]
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-5, atol=0)
    assert (mixed[[0, 2]] != stepped(plain).flow[[0, 2]]).all()


def test_noise_and_levels_stay_what_they_were_and_sigmas_are_told_by_frame(toy: Any, sampler: Any) -> None:
    from vtrain.contract import Latents
    from vtrain.data.batches import Batch

    text = Text.of(torch.zeros(2, 8, 4), torch.ones(2, 8, dtype=torch.bool))
    latents = torch.randn(2, 2, 3, 2, 2)

    class One:
        clean = (0, 0)

        def get(self, number: int, features: object) -> Batch:
            return Batch(number, Latents(latents), text, (4, 9), ("a", "b"), (False, False), self.clean)

    batches: Any = One()
    prefetcher = Prefetcher(batches, toy, sampler, 3, Device())
    plain = prefetcher.prepare(0, 0)
    batches.clean = (0, 1)
    mixed = prefetcher.prepare(0, 0)
    assert torch.equal(plain.given.noise, mixed.given.noise)
    assert plain.given.mask is None
    assert plain.given.level.sigma.shape == (2,)
    assert mixed.given.level.sigma.shape == (2, 3)
    first, second = plain.sigmas
    assert mixed.sigmas == [first, [0.0, second, second]]


def image_to_video(rows: list[dict[str, Any]]) -> int:
    return sum(isinstance(sigma, list) for line in rows for sigma in line["sigmas"])


def test_a_resumed_run_of_image_to_video_is_the_same_run(
    folder: Any, another: Callable[[], Any], within: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under LoRA, with dropout and gradient checkpointing. A copy made in the middle of step 8 is what a kill would leave."""
    values = {"train": "lora", "steps": 30, "save": 5, "accumulate": 2, "log_every": 4, "more": HALF}
    straight, real = another(), Loop.norm

    def copied(self: Loop, number: int) -> Tensor | None:
        if number == 7 and not folder.output.exists():
            shutil.copytree(straight.output, folder.output)
        return real(self, number)

    monkeypatch.setattr(Loop, "norm", copied)
    within("run", straight.write(**values))
    assert [path.name for path in (folder.output / "checkpoints").iterdir()] == ["step-000005"]
    assert "resuming from" in within("run", folder.write(**values)).stdout
    assert folder.rows() == straight.rows()
    share = image_to_video(straight.rows()) / (30 * 2 * 2)
    assert 0.35 < share < 0.65
    got: dict[str, Tensor] = folder.tensors(30)
    for name, value in straight.tensors(30).items():
        assert torch.equal(value, got[name]), name


def test_a_changed_share_is_applied_at_a_resume(folder: Any) -> None:
    plan = make_plan(load(folder.write(more=HALF), discover()))
    assert settings(plan)["data[0].video.image_to_video"] == Setting(0.5, "tell")


def test_the_plan_says_which_share(folder: Any, within: Run) -> None:
    printed = within("plan", folder.write(more=HALF)).stdout
    assert "50% of draws start from a clean first frame" in printed
