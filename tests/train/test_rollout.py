"""Scheduled sampling: clips whose input the denoiser makes itself, from a noisier level."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtrain import api
from vtrain.config.tables import RolloutTable
from vtrain.contract import Condition, LatentShape, NoiseLevel, RunLength, Stepped, timed
from vtrain.train.prefetch import given_clean
from vtrain.train.rollout import RolloutDraws, evaluating, rolled_out
from vtrain.train.step import Step

Run = Callable[..., subprocess.CompletedProcess[str]]


def draws(ramp: int = 0, seed: int = 7, **values: Any) -> RolloutDraws:
    return RolloutDraws(RolloutTable(**{"probability": 1.0, "max_offset": 0.3, "steps": 3, **values}), seed, ramp)


class Recording:
    """A denoiser that is always right, or off by `error`, and notes what it is given."""

    def __init__(self, clean: Tensor, noise: Tensor, error: float = 0.0) -> None:
        self.module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.blocks: tuple[nn.Module, ...] = ()
        self.velocity, self.error = noise - clean, error
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.training: list[bool] = []
        self.graded: list[bool] = []

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        assert level.timestep is not None
        self.seen.append((noisy.clone(), level.sigma.clone(), level.timestep.clone()))
        self.training.append(any(part.training for part in self.module.modules()))
        self.graded.append(torch.is_grad_enabled())
        rows = len(noisy)
        own = self.module[0].weight.sum() * 0  # so that there is a graph
        return self.velocity[-rows:] + self.error + own


def flow() -> Any:
    from vtrain_builtin.flow import FLOW

    return FLOW.build(FLOW.options(), {})


def sana() -> Any:
    from vtrain_sanavideo.flow import SanaVideoFlow
    from vtrain_sanavideo.options import SanaVideoFlowOptions

    return SanaVideoFlow(SanaVideoFlowOptions(), {})


@pytest.mark.parametrize("sampler", [flow, sana])
@pytest.mark.parametrize("clean_frames", [0, 1])
def test_with_a_perfect_denoiser_the_input_and_the_target_are_those_of_the_corruption(
    toy, given, sampler: Callable[[], Any], clean_frames: int
) -> None:
    """To fp32 rounding; and it sees exactly the levels from s + offset down to s, of the rolled-out clips alone."""
    chosen, batch = sampler(), given(3)
    level = NoiseLevel(torch.tensor([0.05, 0.4, 0.9]))
    timed_level, _ = given_clean(toy, timed(toy, level), None, [clean_frames] * 3, LatentShape(*batch.clean.shape[1:]))
    rollout, rolled = draws().of([0, 1, 2], level, timed_level, toy, step=0)
    assert rollout is not None
    assert rolled == (False, True, True), "0.05 is below min_level"
    assert rollout.rows.tolist() == [1, 2]
    noisy, target = chosen.corrupt(batch.clean, batch.noise, timed_level)
    denoiser = Recording(batch.clean, batch.noise)
    inputs = (batch.clean, batch.noise, batch.condition, noisy, target)
    found, goal = rolled_out(denoiser, chosen, rollout, *inputs)  # type: ignore[arg-type]
    assert torch.allclose(found, noisy, atol=1e-5)
    assert torch.equal(found[0], noisy[0])
    counted = (slice(None), slice(None), slice(clean_frames, None))
    assert torch.allclose(goal[counted], target[counted], atol=1e-4)
    assert bool(goal.isfinite().all())
    if clean_frames:
        assert torch.equal(found[:, :, 0], batch.clean[:, :, 0])
    # -- the levels: three steps from the source to the clips' own, which the graded forward has
    sigmas = [sigma if sigma.ndim == 1 else sigma[:, -1] for _, sigma, _ in denoiser.seen]
    own = level.sigma[1:]
    sources = sigmas[0]
    assert bool((sources > own).all())
    assert bool((sources <= torch.clamp(own + 0.3, max=1)).all())
    assert len(sigmas) == 3
    for number, sigma in enumerate(sigmas):
        assert torch.allclose(sigma, own + (sources - own) * (3 - number) / 3, atol=1e-6)
    last = rollout.levels[-1]
    assert torch.equal(last.sigma, timed_level.sigma[1:])
    assert torch.equal(last.timestep, timed_level.timestep[1:])
    for _, sigma, time in denoiser.seen:
        assert torch.equal(time, toy.timestep(sigma)), "the timestep is that of the level"


def test_an_error_of_the_denoiser_stays_in_the_input_and_the_target_leads_back_to_the_clip(toy, given) -> None:
    """In fp64, by the definition: x_s = x0 + s v + s_0-to-s times the error, and x_s - s target = x0."""
    sampler, batch = flow(), given(1)
    level = timed(toy, NoiseLevel(torch.tensor([0.5])))
    rollout, _ = draws().of([4], level, level, toy, 0)
    assert rollout is not None
    offset = float(rollout.levels[0].sigma) - 0.5
    noisy, target = sampler.corrupt(batch.clean, batch.noise, level)
    denoiser = Recording(batch.clean, batch.noise, error=0.7)
    found, goal = rolled_out(denoiser, sampler, rollout, batch.clean, batch.noise, batch.condition, noisy, target)  # type: ignore[arg-type]
    assert torch.allclose(found.double(), noisy.double() - 0.7 * offset, atol=1e-5)
    assert torch.allclose(found.double() - 0.5 * goal.double(), batch.clean.double(), atol=1e-5)
    assert float((goal - target).abs().max()) > 0.7 * offset


def test_solver_steps_have_no_gradient_and_no_dropout_and_the_graded_forward_has_both(toy, given) -> None:
    batch = given(2)
    denoiser = Recording(batch.clean, batch.noise)
    denoiser.module.requires_grad_(True)
    off = denoiser.module[1]
    denoiser.module[0].eval()  # stays as it is
    level = timed(toy, NoiseLevel(torch.tensor([0.3, 0.6])))
    rollout, _ = draws(steps=2).of([0, 1], level, level, toy, 0)
    step = Step(denoiser, flow(), {}, RunLength(10, 1.0))  # type: ignore[arg-type]
    step(replace(batch, level=level, rollout=rollout))
    assert denoiser.graded == [False, False, True]
    assert denoiser.training == [False, False, True]
    assert off.training
    assert not denoiser.module[0].training


def test_a_part_that_fails_is_in_training_again() -> None:
    module = nn.Sequential(nn.Dropout())

    def fails() -> None:
        with evaluating(module):
            assert not module[0].training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert module.training
    assert module[0].training


@pytest.mark.parametrize("mixed", ["bf16", None])
def test_all_weights_get_their_gradient_under_autocast(toy, denoiser, given, sampler, mixed: str | None) -> None:
    """Autocast would keep the casts of the solver steps, which have no gradient."""
    from vtrain.contract import Device

    batch = given(2)
    level = timed(toy, batch.level)
    rollout, _ = draws(min_level=0.01).of([0, 1], level, level, toy, 0)
    assert rollout is not None
    step = Step(denoiser, sampler, {}, RunLength(10, 1.0)).train()
    with Device().autocast(mixed):  # type: ignore[arg-type]
        output = step(replace(batch, level=level, rollout=rollout))
    output.loss.backward()
    weights = dict(step.named_parameters())
    assert [name for name, each in weights.items() if each.requires_grad and each.grad is None] == []
    assert all(float(each.grad.abs().sum()) > 0 for name, each in weights.items() if name.endswith("weight"))


# -- which, and from where -----------------------------------------------------------------------------------------------


def shares(rolls: RolloutDraws, sigma: float, step: int = 0, count: int = 4000) -> float:
    return sum(rolls.offset(draw, torch.tensor(sigma), step) > 0 for draw in range(count)) / count


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("uniform", (0.5, 0.5, 0.5)), ("early", (0.1, 0.25, 0.45)), ("late", (0.4, 0.25, 0.05))],
)
def test_a_strategy_rolls_out_these_levels(strategy: str, expected: tuple[float, ...]) -> None:
    """At levels 0.2, 0.5, 0.9 and probability 0.5. Four standard deviations of 4000 draws are 0.032."""
    rolls = draws(probability=0.5, strategy=strategy)
    assert [shares(rolls, sigma) for sigma in (0.2, 0.5, 0.9)] == pytest.approx(expected, abs=0.04)


def test_the_probability_rises_from_nothing_over_the_ramp() -> None:
    rolls = draws(ramp=100, probability=0.8)
    assert [rolls.probability(step) for step in (0, 25, 50, 100, 5000)] == [0.0, 0.2, 0.4, 0.8, 0.8]
    assert shares(rolls, 0.5, step=0) == 0
    assert shares(rolls, 0.5, step=50) == pytest.approx(0.4, abs=0.04)
    assert draws(probability=0.3).probability(0) == 0.3


def test_offsets_fill_what_they_may_and_end_at_level_one() -> None:
    for sigma, most in ((0.5, 0.3), (0.9, 0.1), (0.99, 0.01)):
        found = [draws().offset(draw, torch.tensor(sigma), 0) for draw in range(3000)]
        assert min(found) > 0
        assert max(found) <= most + 1e-6
        assert sum(found) / len(found) == pytest.approx(most / 2, rel=0.06)
    assert draws().offset(1, torch.tensor(1.0), 0) == 0, "above 1 there is nothing"


def test_levels_below_the_least_are_left_alone() -> None:
    rolls = draws(min_level=0.25)
    assert shares(rolls, 0.2499, count=200) == 0
    assert shares(rolls, 0.25, count=200) == 1


def test_a_draw_is_a_function_of_seed_and_number_and_more_probability_keeps_those_of_less() -> None:
    few, many = draws(probability=0.2), draws(probability=0.6)
    of = [[rolls.offset(draw, torch.tensor(0.4), 0) for draw in range(500)] for rolls in (few, many, draws(seed=8))]
    assert of[0] == [few.offset(draw, torch.tensor(0.4), 9) for draw in range(500)]
    assert all(more == less for less, more in zip(of[0], of[1], strict=True) if less)
    assert sum(map(bool, of[1])) > sum(map(bool, of[0])) > 0
    assert of[2] != of[1]


def test_of_a_batch_only_the_rolled_out_clips_are_predicted_and_batches_change_nothing(toy, given) -> None:
    """Clip by clip, or together: the same input."""
    rolls, sampler, batch = draws(probability=0.5, min_level=0.01), flow(), given(6)
    level = timed(toy, NoiseLevel(torch.linspace(0.3, 0.8, 6)))
    rollout, rolled = rolls.of(range(6), level, level, toy, 0)
    assert rollout is not None
    assert 0 < sum(rolled) < 6
    alone = [
        rolls.of(
            [row], NoiseLevel(level.sigma[row : row + 1]), timed(toy, NoiseLevel(level.sigma[row : row + 1])), toy, 0
        )
        for row in range(6)
    ]
    assert tuple(each for _, (each,) in alone) == rolled
    together = iter(rollout.levels[0].sigma)
    assert all(float(one.levels[0].sigma) == float(next(together)) for one, _ in alone if one is not None)
    denoiser = Recording(batch.clean, batch.noise)
    noisy, target = sampler.corrupt(batch.clean, batch.noise, level)
    rolled_out(denoiser, sampler, rollout, batch.clean, batch.noise, batch.condition, noisy, target)  # type: ignore[arg-type]
    assert {len(seen) for seen, _, _ in denoiser.seen} == {sum(rolled)}


# -- runs ----------------------------------------------------------------------------------------------------------------

ROLLOUT = '\n[train.rollout]\nprobability = 0.7\nramp = "4 steps"\nmax_offset = 0.4\nmin_level = 0.05\n'


@pytest.mark.usefixtures("one_decoder")
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_and_tells_its_losses_apart(folder, another) -> None:
    settings = {"train": "lora", "steps": 8, "save": 8, "accumulate": 2, "log_every": 1, "more": ROLLOUT}
    straight = another()
    for _ in api.run(straight.write(**settings)).__enter__():
        pass
    with api.run(folder.write(**settings)) as session:
        for event in session:
            if isinstance(event, Stepped) and event.step == 3:
                session.ask("stop")
    with api.run(folder.config) as session:
        list(session)
    assert folder.rows() == straight.rows()
    expected, got = straight.tensors(8), folder.tensors(8)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    rows = folder.rows()
    assert rows[0]["terms"]["rollout_share"] == 0, "the ramp begins at 0"
    assert "flow_loss_rolled_out" not in rows[0]["terms"]
    later = [row["terms"] for row in rows[4:]]
    assert 0 < sum(terms["rollout_share"] for terms in later) / len(later) < 1
    for terms, row in zip(later, rows[4:], strict=True):
        share = terms["rollout_share"]
        whole = share * terms.get("flow_loss_rolled_out", 0) + (1 - share) * terms.get("flow_loss_direct", 0)
        assert whole == pytest.approx(row["flow_loss"], rel=1e-5)


@pytest.mark.usefixtures("one_decoder")
def test_a_run_without_has_no_such_numbers_and_rolled_out_it_is_another(folder, another, within: Run) -> None:
    plain = another()
    within("run", plain.write(steps=3, log_every=1))
    assert all("rollout_share" not in row["terms"] for row in plain.rows())
    within("run", folder.write(steps=3, log_every=1, more=ROLLOUT.replace('ramp = "4 steps"\n', "")))
    assert [row["sigmas"] for row in folder.rows()] == [row["sigmas"] for row in plain.rows()], "no other draw changes"
    assert folder.rows()[0]["flow_loss"] != plain.rows()[0]["flow_loss"]


def test_the_plan_says_what_is_rolled_out_and_what_it_costs(folder, within: Run) -> None:
    more = '\n[train.rollout]\nprobability = 0.5\nramp = "100 steps"\nsteps = 4\nstrategy = "early"\n'
    printed = " ".join(within("plan", folder.write(steps=1000, more=more)).stdout.split())
    assert "probability 0.5, from 0 over 100 steps, the noisier the likelier: probability x level" in printed
    assert "from up to 0.2 above, in 4 solver steps; at levels from 0.1" in printed
    # 0.5 x 4 x (1 - 50.5 / 1000) = 1.9 forward passes, of 4 that a step of full training takes with checkpointing.
    assert "at most 1.9 forward passes for each clip on average, without gradient: about 47% of a step" in printed


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('ramp = "10 min"', "a ramp in seconds would not be the same run twice"),
        ("probability = 1.5", "must be at most 1"),
        ("min_level = 0", "must be at least 0.01"),
        ('strategy = "middle"', "uniform"),
        ("max_ofset = 0.3", "max_offset"),
    ],
)
def test_nonsense_is_refused_with_its_line(folder, within: Run, line: str, words: str) -> None:
    start = "" if line.startswith("prob") else "probability = 0.5\n"
    done = within("plan", folder.write(more=f"\n[train.rollout]\n{start}{line}\n"), check=2)
    assert "config.toml:" in done.stderr
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("ramp", "words"),
    [
        ("100 steps", "train.rollout.ramp is 100 steps and the run 6: the probability never gets to 0.5"),
        ("0.01 epochs", "train.rollout.ramp = 0.01 epochs is one step here: the probability is 0.5 after it"),
    ],
)
def test_a_ramp_that_does_not_go_with_the_run_is_a_warning(folder, within: Run, ramp: str, words: str) -> None:
    more = f'\n[train.rollout]\nprobability = 0.5\nramp = "{ramp}"\n'
    assert words in " ".join(within("plan", folder.write(more=more)).stdout.split())


LACKING = ("advance", "target_at", "__dict__", "__weakref__")


def test_a_sampler_without_the_ability_is_refused_in_the_plan(
    folder, within: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtrain_builtin import plugin

    # Another class, and not an attribute less: isinstance remembers what it has found of a class.
    whole = vars(plugin.FLOW.build)
    lacking = {name: value for name, value in whole.items() if name not in LACKING}
    monkeypatch.setattr(plugin, "FLOW", replace(plugin.FLOW, build=type("Flow", (), lacking)))
    done = within("plan", folder.write(more="\n[train.rollout]\nprobability = 0.5\n"), check=2)
    assert 'the sampler "flow" cannot be rolled out: it lacks the ability SupportsRollout.' in " ".join(
        done.stderr.split()
    )
    assert "Remove [train.rollout], or use another sampler." in " ".join(done.stderr.split())
    within("plan", folder.write())
