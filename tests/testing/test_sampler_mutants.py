"""Every rule of the sampler kit fails for a sampler that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vtrain.contract import (
    NoiseLevel,
)
from vtrain.testing import SamplerTests
from vtrain.testing.sampler import noise
from vtrain_builtin.flow import Flow, FlowOptions

Subject = dict[str, Any]


def sampler(**members: object) -> Subject:
    """A flow sampler with methods replaced."""
    return {"sampler": type("BrokenFlow", (Flow,), members)(FlowOptions(), {})}


def against_the_paper(**members: object) -> Subject:
    return clips(**members) | {"reference_target": lambda clean, drawn, sigma: drawn - clean}


def clips(**members: object) -> Subject:
    shape = (2, *SamplerTests.latents)
    return sampler(**members) | {"clean": noise(shape, 1), "start": noise(shape, 2)}


def started(**members: object) -> Subject:
    return {name: part for name, part in clips(**members).items() if name != "clean"}


def _by_frame(level: NoiseLevel) -> Tensor:
    sigma = level.sigma
    return sigma[:, None, :, None, None] if sigma.ndim == 2 else sigma[:, None, None, None, None]


def global_draw(self: Flow, n: int, generator: torch.Generator) -> NoiseLevel:
    return NoiseLevel(torch.rand(n))


def wide_draw(self: Flow, n: int, generator: torch.Generator) -> NoiseLevel:
    return NoiseLevel(torch.randn(n, generator=generator))


def constant_draw(self: Flow, n: int, generator: torch.Generator) -> NoiseLevel:
    return NoiseLevel(torch.full((n,), 0.5))


def swapped(self: Flow, clean: Tensor, drawn: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    return Flow.corrupt(self, drawn, clean, level)


def in_place(self: Flow, clean: Tensor, drawn: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    noisy, target = Flow.corrupt(self, clean, drawn, level)
    return clean.copy_(noisy), target


def in_double(self: Flow, clean: Tensor, drawn: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    noisy, target = Flow.corrupt(self, clean, drawn, level)
    return noisy, target.double()


def as_a_list(self: Flow, clean: Tensor, drawn: Tensor, level: NoiseLevel) -> list[Tensor]:
    return list(Flow.corrupt(self, clean, drawn, level))


def scaled(self: Flow, clean: Tensor, drawn: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    noisy, target = Flow.corrupt(self, clean, drawn, level)
    return noisy, -7 * target


def unscaling(self: Flow, predict: Any, start: Tensor, steps: int, on_step: Any = None) -> Tensor:
    return Flow.solve(self, lambda noisy, level: predict(noisy, level) / -7, start, steps, on_step)


def noise_alone(self: Flow, clean: Tensor, drawn: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    return Flow.corrupt(self, clean, drawn, level)[0], drawn


def first_level(self: Flow, clean: Tensor, drawn: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    return Flow.corrupt(self, clean, drawn, NoiseLevel(level.sigma[:1]))


def first_frame(self: Flow, clean: Tensor, drawn: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    sigma = level.sigma[:, 0] if level.sigma.ndim == 2 else level.sigma
    return Flow.corrupt(self, clean, drawn, NoiseLevel(sigma))


def wrong_sign(self: Flow, predict: Any, start: Tensor, steps: int, on_step: Any = None) -> Tensor:
    return Flow.solve(self, lambda noisy, level: -predict(noisy, level), start, steps, on_step)


def wrong_level(self: Flow, predict: Any, start: Tensor, steps: int, on_step: Any = None) -> Tensor:
    return Flow.solve(self, lambda noisy, level: predict(noisy, NoiseLevel(level.sigma * 0.95)), start, steps, on_step)


def extra_call(self: Flow, predict: Any, start: Tensor, steps: int, on_step: Any = None) -> Tensor:
    return Flow.solve(self, predict, start, steps + 1, on_step)


def counting_from_zero(self: Flow, predict: Any, start: Tensor, steps: int, on_step: Any = None) -> Tensor:
    report = None if on_step is None else (lambda done, state: on_step(done - 1, state))
    return Flow.solve(self, predict, start, steps, report)


def writing_noise(self: Flow, predict: Any, start: Tensor, steps: int, on_step: Any = None) -> Tensor:
    return start.copy_(Flow.solve(self, predict, start, steps, on_step))


def one_too_few(self: Flow, predict: Any, start: Tensor, steps: int, on_step: Any = None) -> Tensor:
    """As diffusers at 150 steps, where it looks up the first step by its timestep and finds the second."""
    return Flow.solve(self, predict, start, steps - (steps == 150), on_step)


def all_at_once(self: Flow, predict: Any, start: Tensor, steps: int) -> Iterator[Tensor]:
    yield from list(Flow.solving(self, predict, start, steps))


def with_a_unit(self: Flow, n: int, generator: torch.Generator) -> NoiseLevel:
    level = Flow.draw(self, n, generator)
    return NoiseLevel(level.sigma, 1000 * level.sigma)


PLANTED: tuple[tuple[str, str, str, Callable[[], Subject]], ...] = (
    (
        "levels that are not between 0 and 1",
        "test_drawn_levels_are_fp32_in_the_unit_range",
        "levels lie from",
        lambda: sampler(draw=wide_draw),
    ),
    (
        "timesteps in a unit of the sampler's own",
        "test_timesteps_are_given_only_in_the_unit_of_a_named_family",
        "timesteps_of is not set",
        lambda: started(draw=with_a_unit),
    ),
    (
        "`check_step` for `check_steps`",
        "test_abilities_of_the_sampler_are_spelt_right",
        "for check_steps of SupportsStepCheck?",
        lambda: sampler(check_step=lambda self, steps: ()),
    ),
    (
        "levels from the global generator",
        "test_draws_come_from_the_generator_alone",
        "the global generator was moved",
        lambda: sampler(draw=global_draw),
    ),
    ("one level for all clips", "test_draws_differ", "256 draws have 1 values", lambda: sampler(draw=constant_draw)),
    (
        "sigma that runs the other way",
        "test_level_zero_is_clean_and_level_one_is_noise",
        "at sigma 0 it is off by",
        lambda: clips(corrupt=swapped),
    ),
    (
        "noise that is added in place",
        "test_corrupt_keeps_the_shape_and_its_inputs",
        "corrupt writes to the clean clip",
        lambda: clips(corrupt=in_place),
    ),
    (
        "a target in double precision",
        "test_corrupt_keeps_the_shape_and_its_inputs",
        "its corrupt gave (float32 (2, 4, 3, 6, 8), float64 (2, 4, 3, 6, 8)) where",
        lambda: clips(corrupt=in_double),
    ),
    (
        "noisy clip and target in a list",
        "test_corrupt_keeps_the_shape_and_its_inputs",
        "its corrupt gave (a list) where (noisy, target)",
        lambda: clips(corrupt=as_a_list),
    ),
    (
        "a target with the sign flipped and another scale, which the solver undoes",
        "test_targets_are_those_of_the_paper",
        "the target is the paper's times -7",
        lambda: against_the_paper(corrupt=scaled, solve=unscaling),
    ),
    (
        "the noise for a target where the paper has a velocity",
        "test_targets_are_those_of_the_paper",
        "the target is off by",
        lambda: against_the_paper(corrupt=noise_alone),
    ),
    (
        "the first clip's level for the whole batch",
        "test_each_clip_has_its_own_level",
        "a clip corrupted in a batch differs by",
        lambda: clips(corrupt=first_level),
    ),
    (
        "the first frame's level for the whole clip",
        "test_levels_may_differ_by_latent_frame",
        "a frame at level 1 is not noise",
        lambda: clips(corrupt=first_frame),
    ),
    (
        "a solver that takes the prediction with the wrong sign",
        "test_a_perfect_denoiser_is_solved",
        "off by",
        lambda: clips(solve=wrong_sign),
    ),
    (
        "a solver that asks at another level than its input has",
        "test_predict_gets_the_level_of_its_input",
        "at call 0",
        lambda: clips(solve=wrong_level),
    ),
    (
        "a solver that predicts once too often",
        "test_solving_goes_from_noise_to_clean_in_so_many_calls",
        "10 steps took 11 predictions",
        lambda: started(solve=extra_call),
    ),
    (
        "a solver that loses a step where two timesteps round to one",
        "test_any_number_of_steps_is_solved_or_refused_before",
        "150 steps took 149 predictions",
        lambda: sampler(solve=one_too_few) | {"number": 150},
    ),
    (
        "check_steps that refuses what is asked for",
        "test_numbers_of_steps_are_refused_in_words",
        "it refuses 10 steps",
        lambda: sampler(check_steps=lambda self, steps: ("too many",)),
    ),
    (
        "solving that computes everything before its first step",
        "test_steps_one_by_one_are_what_solve_computes",
        "after each step it had predicted [10",
        lambda: started(solving=all_at_once),
    ),
    (
        "a solver step that goes up in level",
        "test_a_rolled_out_input_of_a_perfect_denoiser_is_the_corrupted_one",
        "advance is off by",
        lambda: clips(advance=lambda self, noisy, prediction, level, to: noisy - prediction * 0.3),
    ),
    (
        "a target that is divided by level 0",
        "test_a_rolled_out_input_of_a_perfect_denoiser_is_the_corrupted_one",
        "target_at is not finite",
        lambda: clips(target_at=lambda self, noisy, clean, level: (noisy - clean) / _by_frame(level)),
    ),
    (
        "the target of the noise, whatever the input is",
        "test_a_rolled_out_input_of_a_perfect_denoiser_is_the_corrupted_one",
        "target_at is off by",
        lambda: clips(target_at=lambda self, noisy, clean, level: noisy),
    ),
    (
        "steps that are counted from 0",
        "test_on_step_counts_the_steps_done",
        "on_step counted [0",
        lambda: started(solve=counting_from_zero),
    ),
    (
        "a solver that writes to its noise",
        "test_solving_is_repeatable_and_keeps_its_noise",
        "solve writes to the noise",
        lambda: started(solve=writing_noise),
    ),
    (
        "a number where describe() gives text",
        "test_descriptions_are_texts",
        "describe() gives [('shift', 1.0)]",
        lambda: sampler(describe=lambda self: (("shift", 1.0),)),
    ),
    (
        "`solving` that was renamed",
        "test_it_has_the_abilities_that_its_author_expects",
        "the sampler has lost SupportsStepwise: it has no solving",
        lambda: sampler(solving=None) | {"attributes": {"expects": frozenset({"SupportsStepwise"})}},
    ),
)
"""(the mistake, the rule that finds it, a piece of its message, the arguments with the mistake in them)."""


@pytest.mark.parametrize(("rule", "says", "subject"), [each[1:] for each in PLANTED], ids=[each[0] for each in PLANTED])
def test_the_rule_fails_for_a_sampler_that_breaks_it(
    rule: str, says: str, subject: Callable[..., Subject], breaks: Callable[..., None]
) -> None:
    breaks(SamplerTests(), rule, subject(), says)


def test_a_wrong_target_that_the_solver_undoes_passes_every_other_rule_of_it() -> None:
    given = clips(corrupt=scaled, solve=unscaling)
    kit = SamplerTests()
    kit.test_a_perfect_denoiser_is_solved(**given)
    kit.test_predict_gets_the_level_of_its_input(**given)
    kit.test_corrupt_keeps_the_shape_and_its_inputs(**given)


def test_every_rule_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(SamplerTests) == {rule for _, rule, _, _ in PLANTED}
