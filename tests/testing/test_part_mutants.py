"""Every rule of the sampler and regularizer kits fails for a part that breaks it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vtrain_toy.colouring import ColourEncoder
from vtrain_toy.colours import Colours, ColoursOptions
from vtrain_toy.smooth import Smooth, SmoothOptions
from vtrain_toy.smoothness import Smoothness

from vtrain.contract import (
    ClipShape,
    FeatureEncoder,
    FeatureShape,
    HashFile,
    LossTerm,
    Needs,
    NoiseLevel,
    StepView,
    TokenGrid,
)
from vtrain.testing import RegularizerTests, SamplerTests
from vtrain.testing.sampler import noise
from vtrain_builtin.flow import Flow, FlowOptions

Subject = dict[str, Any]


counter = itertools.count(1)


def sampler(**members: object) -> Subject:
    """A flow sampler with methods replaced."""
    return {"sampler": type("BrokenFlow", (Flow,), members)(FlowOptions(), {})}


def clips(**members: object) -> Subject:
    shape = (2, *SamplerTests.latents)
    return sampler(**members) | {"clean": noise(shape, 1), "start": noise(shape, 2)}


def started(**members: object) -> Subject:
    return {name: part for name, part in clips(**members).items() if name != "clean"}


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


SAMPLERS: Mapping[str, Callable[[], Subject]] = {
    "test_drawn_levels_are_fp32_in_the_unit_range": lambda: sampler(draw=wide_draw),
    "test_timesteps_are_given_only_in_the_unit_of_a_named_family": lambda: started(draw=with_a_unit),
    "test_abilities_of_the_sampler_are_spelt_right": lambda: sampler(check_step=lambda self, steps: ()),
    "test_draws_come_from_the_generator_alone": lambda: sampler(draw=global_draw),
    "test_draws_differ": lambda: sampler(draw=constant_draw),
    "test_level_zero_is_clean_and_level_one_is_noise": lambda: clips(corrupt=swapped),
    "test_corrupt_keeps_the_shape_and_its_inputs": lambda: clips(corrupt=in_place),
    "test_each_clip_has_its_own_level": lambda: clips(corrupt=first_level),
    "test_levels_may_differ_by_latent_frame": lambda: clips(corrupt=first_frame),
    "test_a_perfect_denoiser_is_solved": lambda: clips(solve=wrong_sign),
    "test_predict_is_told_the_level_of_its_input": lambda: clips(solve=wrong_level),
    "test_solving_goes_from_noise_to_clean_in_so_many_calls": lambda: started(solve=extra_call),
    "test_any_number_of_steps_is_solved_or_refused_before": lambda: sampler(solve=one_too_few) | {"number": 150},
    "test_numbers_of_steps_are_refused_in_words": lambda: sampler(check_steps=lambda self, steps: ("too many",)),
    "test_steps_one_by_one_are_what_solve_computes": lambda: started(solving=all_at_once),
    "test_on_step_counts_the_steps_done": lambda: started(solve=counting_from_zero),
    "test_solving_is_repeatable_and_keeps_its_noise": lambda: started(solve=writing_noise),
    "test_descriptions_are_texts": lambda: sampler(describe=lambda self: (("shift", 1.0),)),
}


class Loss(Smoothness):
    """The toy loss, passed through `change`."""

    def __init__(self, change: Callable[[LossTerm, StepView], LossTerm]) -> None:
        super().__init__(1, RegularizerTests.tap_width, 8, 0.1)
        self.change = change

    def forward(self, view: StepView) -> LossTerm:
        return self.change(super().forward(view), view)


def loss(change: Callable[[LossTerm, StepView], LossTerm]) -> Subject:
    return {"regularizer": Smooth(SmoothOptions(block=1)), "module": Loss(change)}


def regularizer(**members: object) -> Subject:
    return {"regularizer": type("BrokenSmooth", (Smooth,), members)(SmoothOptions(block=1))}


class Still(nn.Module):
    """A loss without parameters."""

    def __init__(self, found: Callable[[StepView], LossTerm]) -> None:
        super().__init__()
        self.found = found

    def forward(self, view: StepView) -> LossTerm:
        return self.found(view)


class Untapped(Smoothness):
    """It reads a detached tap."""

    def forward(self, view: StepView) -> LossTerm:
        taps = {number: tap.detach() for number, tap in view.taps.items()}
        return super().forward(StepView(**{**vars(view), "taps": taps}))


class Idle(Smoothness):
    """It has a weight that no loss reaches."""

    def __init__(self) -> None:
        super().__init__(1, RegularizerTests.tap_width, 8, 0.1)
        self.idle = nn.Parameter(torch.ones(2))


class Neighbours(Smoothness):
    """It divides by the number of neighbouring frames, 0 for a picture."""

    def forward(self, view: StepView) -> LossTerm:
        return LossTerm(super().forward(view).value / (view.taps[1].shape[1] - 1))


class Narrow(Smoothness):
    """It overflows on bf16 taps."""

    def forward(self, view: StepView) -> LossTerm:
        odd = view.taps[1].dtype is torch.bfloat16
        return LossTerm(super().forward(view).value * (float("inf") if odd else 1.0))


def smoothness(kind: Callable[..., nn.Module]) -> Subject:
    sizes = (1, RegularizerTests.tap_width, 8, 0.1)
    return {"regularizer": Smooth(SmoothOptions(block=1)), "module": kind(*sizes)}


class Blind:
    """It asks for features and does not look at them."""

    feature_dtype = "fp32"

    def needs(self) -> Needs:
        return Needs(features="cached")

    def feature_shape(self, clip: ClipShape, grid: TokenGrid) -> FeatureShape:
        return FeatureShape(*grid, 5)

    def feature_fingerprint(self, hash_file: HashFile) -> str:
        return "none"

    def open_feature_encoder(self, device: str) -> AbstractContextManager[FeatureEncoder]:
        raise AssertionError("the kit makes its own")


def colours(**members: object) -> Subject:
    """A regularizer with an encoder, with members replaced."""
    return {"regularizer": type("BrokenColours", (Colours,), members)(ColoursOptions(block=1))}


class Smearing(ColourEncoder):
    """It mixes the frames of a clip."""

    def encode(self, frames: Tensor, grid: TokenGrid) -> Tensor:
        found = super().encode(frames, grid)
        return found + found.mean(1, keepdim=True)


@contextmanager
def smearing(self: Colours, device: str) -> Iterator[ColourEncoder]:
    yield Smearing(4, 1)


@contextmanager
def keeping(self: Any, device: str) -> Iterator[ColourEncoder]:
    self.kept = ColourEncoder(4, 1)
    yield self.kept


def turned(self: Colours, clip: ClipShape, grid: TokenGrid) -> FeatureShape:
    return FeatureShape(grid.frames, grid.width, grid.height, 4)


def write_clean(term: LossTerm, view: StepView) -> LossTerm:
    view.clean.mul_(2)
    return term


def changing_load(self: Smooth, widths: Mapping[int, int]) -> nn.Module:
    return Smoothness(1, RegularizerTests.tap_width, 8, 0.1 * next(counter))


class Impatient(Smoothness):
    lr_factors = 2.0


REGULARIZERS: Mapping[str, Callable[[], Subject]] = {
    "test_needs_are_pure": lambda: regularizer(needs=lambda self: Needs(taps=(next(counter),))),
    "test_abilities_of_the_term_are_spelt_right": lambda: smoothness(Impatient),
    "test_the_loss_is_a_finite_scalar": lambda: loss(lambda term, _: LossTerm(term.value.expand(2))),
    "test_the_loss_reaches_every_tap": lambda: smoothness(Untapped),
    "test_its_own_parameters_are_trained": lambda: smoothness(lambda *_: Idle()),
    "test_clean_clips_noise_and_targets_get_no_gradient": lambda: loss(write_clean),
    "test_features_are_read_and_get_no_gradient": lambda: {
        "regularizer": Blind(),
        "module": Still(lambda view: LossTerm(view.prediction.square().mean())),
    },
    "test_feature_arithmetic_equals_what_the_encoder_gives": lambda: colours(feature_shape=turned),
    "test_features_are_of_the_frames_one_for_one": lambda: colours(open_feature_encoder=smearing),
    "test_the_fingerprint_of_features_stays": lambda: colours(
        feature_fingerprint=lambda self, hash_file: str(next(counter))
    ),
    "test_the_encoder_is_no_part_of_the_module_and_is_released": lambda: colours(open_feature_encoder=keeping),
    "test_metrics_are_detached_scalars": lambda: loss(lambda term, _: LossTerm(term.value, {"loss": term.value})),
    "test_one_latent_frame_is_enough": lambda: smoothness(Neighbours),
    "test_bf16_taps_are_taken": lambda: smoothness(Narrow),
    "test_its_state_comes_back": lambda: {
        "regularizer": type("Changing", (Smooth,), {"load": changing_load})(SmoothOptions(block=1)),
        "module": Smoothness(1, RegularizerTests.tap_width, 8, 5.0),
    },
    "test_descriptions_are_pairs_of_texts": lambda: regularizer(describe=lambda self: (("weight", 0.1),)),
}


@pytest.mark.parametrize("rule", SAMPLERS)
def test_the_rule_fails_for_a_sampler_that_breaks_it(rule: str, breaks: Callable[..., None]) -> None:
    breaks(SamplerTests(), rule, SAMPLERS[rule]())


@pytest.mark.parametrize("rule", REGULARIZERS)
def test_the_rule_fails_for_a_regularizer_that_breaks_it(rule: str, breaks: Callable[..., None]) -> None:
    breaks(RegularizerTests(), rule, REGULARIZERS[rule]())


def test_a_tap_that_a_term_says_it_stops_at_gets_no_gradient(breaks: Callable[..., None]) -> None:
    kit = RegularizerTests()
    kit.stopped = (1,)
    breaks(kit, "test_the_loss_reaches_every_tap", smoothness(Smoothness))


def test_every_rule_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(SamplerTests) == SAMPLERS.keys()
    assert rules_of(RegularizerTests) == REGULARIZERS.keys()
