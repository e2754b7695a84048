"""Every rule of the regularizer kit fails for a term that breaks it."""

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
    ClipBytes,
    ClipShape,
    EncoderMemory,
    FeatureEncoder,
    FeatureShape,
    HashFile,
    LossTerm,
    Needs,
    StepView,
    TokenGrid,
)
from vtrain.testing import RegularizerTests

Subject = dict[str, Any]


counter = itertools.count(1)


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


def half_said(self: Colours, clips: int, clip: ClipShape, grid: TokenGrid) -> EncoderMemory:
    said = Colours.feature_memory(self, clips, clip, grid)
    assert said.encode is not None
    return EncoderMemory(said.weights, ClipBytes(0, said.encode.pixel / 2))


def write_clean(term: LossTerm, view: StepView) -> LossTerm:
    view.clean.mul_(2)
    return term


def changing_load(self: Smooth, widths: Mapping[int, int]) -> nn.Module:
    return Smoothness(1, RegularizerTests.tap_width, 8, 0.1 * next(counter))


class Impatient(Smoothness):
    lr_factors = 2.0


PLANTED: tuple[tuple[str, str, str, Callable[[], Subject]], ...] = (
    (
        "needs() that changes",
        "test_needs_are_pure",
        "needs() gives other taps the second time",
        lambda: regularizer(needs=lambda self: Needs(taps=(next(counter),))),
    ),
    (
        "`lr_factors` for `lr_factor`",
        "test_abilities_of_the_term_are_spelt_right",
        "for lr_factor of SupportsLearningRate?",
        lambda: smoothness(Impatient),
    ),
    (
        "a loss for each clip",
        "test_the_loss_is_a_finite_scalar",
        "its loss is float32 (2,), not a tensor of a single number",
        lambda: loss(lambda term, _: LossTerm(term.value.expand(2))),
    ),
    (
        "a loss in double precision",
        "test_the_loss_is_a_finite_scalar",
        "its loss is float64 (), not a tensor of a single number in fp32, bf16 or fp16",
        lambda: loss(lambda term, _: LossTerm(term.value.double())),
    ),
    (
        "a loss outside the graph",
        "test_the_loss_is_a_finite_scalar",
        "its loss is outside the graph",
        lambda: loss(lambda term, _: LossTerm(term.value.detach())),
    ),
    (
        "a tap that is detached",
        "test_the_loss_reaches_every_tap",
        "tap 1 gets no gradient",
        lambda: smoothness(Untapped),
    ),
    (
        "a weight of the term that nothing trains",
        "test_its_own_parameters_are_trained",
        "without a gradient: idle",
        lambda: smoothness(lambda *_: Idle()),
    ),
    (
        "a term that writes to the clean latents",
        "test_clean_clips_noise_and_targets_get_no_gradient",
        "it writes to what it is given",
        lambda: loss(write_clean),
    ),
    (
        "a term that asks for features and does not read them",
        "test_features_are_read_and_get_no_gradient",
        "other features change nothing",
        lambda: {
            "regularizer": Blind(),
            "module": Still(lambda view: LossTerm(view.prediction.square().mean())),
        },
    ),
    (
        "a feature_shape with height and width swapped",
        "test_feature_arithmetic_equals_what_the_encoder_gives",
        "48x32@5: encode gave",
        lambda: colours(feature_shape=turned),
    ),
    (
        "features that are mixed over the frames",
        "test_features_are_of_the_frames_one_for_one",
        "a frame's features depend on other frames",
        lambda: colours(open_feature_encoder=smearing),
    ),
    (
        "a fingerprint of features that is another one each time",
        "test_the_fingerprint_of_features_stays",
        "the fingerprint of features is another one the second time",
        lambda: colours(feature_fingerprint=lambda self, hash_file: str(next(counter))),
    ),
    (
        "an encoder that takes twice what it says",
        "test_the_encoder_takes_the_memory_that_it_says",
        "its work takes 46,080 bytes, and feature_memory says 23,040",
        lambda: colours(feature_memory=half_said),
    ),
    (
        "a feature encoder that stays in memory",
        "test_the_encoder_is_no_part_of_the_module_and_is_released",
        "still in memory: ColourEncoder",
        lambda: colours(open_feature_encoder=keeping),
    ),
    (
        "a metric in the graph",
        "test_metrics_are_detached_scalars",
        'its metric "loss" is float32 () in the graph',
        lambda: loss(lambda term, _: LossTerm(term.value, {"loss": term.value})),
    ),
    (
        "a division by the number of neighbouring frames",
        "test_one_latent_frame_is_enough",
        "of a picture the value is nan",
        lambda: smoothness(Neighbours),
    ),
    ("an overflow in bf16", "test_bf16_taps_are_taken", "of bf16 taps the value is inf", lambda: smoothness(Narrow)),
    (
        "a term with state outside its module",
        "test_its_state_comes_back",
        "with its state in another module",
        lambda: {
            "regularizer": type("Changing", (Smooth,), {"load": changing_load})(SmoothOptions(block=1)),
            "module": Smoothness(1, RegularizerTests.tap_width, 8, 5.0),
        },
    ),
    (
        "a number where describe() gives text",
        "test_descriptions_are_pairs_of_texts",
        "describe() gives [('weight', 0.1)]",
        lambda: regularizer(describe=lambda self: (("weight", 0.1),)),
    ),
    (
        "a root whose gradient at 0 is infinite",
        "test_a_step_without_a_difference_is_finite",
        "the gradient in tap 1 is not finite",
        lambda: loss(lambda term, _: LossTerm(term.value.sqrt())),
    ),
    (
        "a division by a norm that can be 0",
        "test_a_step_without_a_difference_is_finite",
        "the value is nan",
        lambda: loss(lambda term, view: LossTerm(term.value + view.taps[1].mean() / view.taps[1].norm())),
    ),
    (
        "a feedback that was renamed",
        "test_it_has_the_abilities_that_its_author_expects",
        "the loss module has lost SupportsFeedback: it has no",
        lambda: smoothness(Smoothness) | {"attributes": {"expects": frozenset({"SupportsFeedback"})}},
    ),
)
"""(the mistake, the rule that finds it, a piece of its message, the arguments with the mistake in them)."""


@pytest.mark.parametrize(("rule", "says", "subject"), [each[1:] for each in PLANTED], ids=[each[0] for each in PLANTED])
def test_the_rule_fails_for_a_regularizer_that_breaks_it(
    rule: str, says: str, subject: Callable[..., Subject], breaks: Callable[..., None]
) -> None:
    breaks(RegularizerTests(), rule, subject(), says)


def test_a_tap_that_a_term_says_it_stops_at_gets_no_gradient(breaks: Callable[..., None]) -> None:
    kit = RegularizerTests()
    kit.stopped = (1,)
    breaks(kit, "test_the_loss_reaches_every_tap", smoothness(Smoothness))


def test_every_rule_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(RegularizerTests) == {rule for _, rule, _, _ in PLANTED}
