"""Every rule of the family kit about denoisers, their taps and their adapters fails for a toy denoiser that breaks it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vtrain_toy.denoiser import DuoDenoiser, DuoTransformer, ToyDenoiser, build_denoiser
from vtrain_toy.duo import DuoFamily
from vtrain_toy.family import ToyFamily, ToyOptions
from vtrain_toy.transformer import ToyTransformer

from vtrain.contract import (
    ClipShape,
    Condition,
    NoiseLevel,
    Text,
    TextPart,
    timesteps,
)
from vtrain.testing import FamilyTests
from vtrain.testing.family_denoiser import DenoiserTests, LoraTests
from vtrain.testing.subject import Example

CLIP = ClipShape(9, 32, 48)
counter = itertools.count()
Subject = dict[str, Any]


def family(**members: object) -> ToyFamily:
    """A toy family with methods replaced."""
    made: ToyFamily = type("BrokenFamily", (ToyFamily,), members)(ToyOptions())
    return made


def kit(**subject: object) -> Subject:
    return subject


class Denoiser(ToyDenoiser):
    """A denoiser with methods replaced, on a fresh network."""

    def __init__(self, transformer: type[ToyTransformer] = ToyTransformer) -> None:
        torch.manual_seed(0)
        super().__init__(transformer(32, 3))


def known(**said: object) -> ToyFamily:
    """A family that knows its denoiser before it is loaded, and says something else of it."""
    module = ToyFamily(ToyOptions()).load_denoiser("cpu", "fp32").module
    own = {
        "weight_shapes": lambda self: {name: tuple(value.shape) for name, value in module.state_dict().items()},
        "lora_targets": ToyDenoiser.lora_targets,
        "original_names": getattr(ToyDenoiser, "original_names", {}),
    }
    return family(**{**own, **said})


class Decaying(Denoiser):
    def decay(self, name: str, shape: tuple[int, ...]) -> bool:
        return True


class Misshapen(Denoiser):
    def predict(self, *inputs: Any) -> Tensor:
        return super().predict(*inputs)[:, :, :-1]


class Precise(Denoiser):
    def predict(self, *inputs: Any) -> Tensor:
        return super().predict(*inputs).double()


class Wrapped(Denoiser):
    def predict(self, *inputs: Any) -> Any:
        return (super().predict(*inputs),)


class Gradless(Denoiser):
    @torch.no_grad()
    def predict(self, *inputs: Any) -> Tensor:
        return super().predict(*inputs)


class Mixing(Denoiser):
    def predict(self, *inputs: Any) -> Tensor:
        prediction = super().predict(*inputs)
        return prediction + 0.01 * prediction.mean(0, keepdim=True)


class Unmasked(Denoiser):
    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        everything = Text.of(condition.text.only.embeds, torch.ones_like(condition.text.only.mask))
        return super().predict(noisy, level, Condition(everything))


class Textless(Denoiser):
    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        nothing = Text.of(torch.zeros_like(condition.text.only.embeds), torch.ones_like(condition.text.only.mask))
        return super().predict(noisy, level, Condition(nothing))


class Levelless(Denoiser):
    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        return super().predict(noisy, NoiseLevel(level.sigma, torch.zeros_like(level.sigma)), condition)


class OneLevel(Denoiser):
    """Of levels by frame it takes the last."""

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        last = NoiseLevel(level.sigma[..., -1], timesteps(level)[..., -1]) if level.sigma.ndim == 2 else level
        return super().predict(noisy, last, condition)


class Shifting(Denoiser):
    """A level for each frame is taken for that of the next one; the last is at 0."""

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        if level.sigma.ndim == 2:
            timestep = torch.cat([timesteps(level)[:, 1:], torch.zeros_like(level.sigma[:, :1])], 1)
            level = NoiseLevel(level.sigma, timestep)
        return super().predict(noisy, level, condition)


class WithIdleWeight(ToyTransformer):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__(width, blocks)
        self.idle = nn.Parameter(torch.ones(3))


class SavingOthers(Denoiser):
    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        super().save(folder, build_denoiser(32, 3, 7, None).module.state_dict())


class SavingItself(Denoiser):
    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        super().save(folder, self.module.state_dict())


class TakingOver(Denoiser):
    """Its module has the saved weights afterwards."""

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        super().save(folder, state)
        self.module.load_state_dict(state)


class OddTarget(ToyDenoiser):
    lora_targets = ("to_q", "to_gate")  # type: ignore[assignment]


class Misnamed(ToyDenoiser):
    original_names: Mapping[str, str] = {"to_query": "q"}


class Forgetful(ToyDenoiser):
    def load_lora(self, folder: Path) -> dict[str, Tensor]:
        return dict(list(super().load_lora(folder).items())[1:])


def another(self: ToyFamily, device: str, dtype: str, weights: Path | None = None) -> ToyDenoiser:
    return build_denoiser(32, 3, next(counter), None)


def always_fp32(self: ToyFamily, device: str, dtype: str, weights: Path | None = None) -> ToyDenoiser:
    return build_denoiser(32, 3, 0, None)


class CuttingDuo(DuoDenoiser):
    """It looks at the first words alone."""

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        words = TextPart(condition.text.parts["words"].embeds[:, :9])
        return super().predict(noisy, level, Condition(Text({**condition.text.parts, "words": words})))


def duo_example() -> Example:
    return FamilyTests.example_of(DuoFamily(ToyOptions()), CLIP)


def with_denoiser(kind: type[ToyDenoiser]) -> ToyFamily:
    def load(self: ToyFamily, device: str, dtype: str, weights: Path | None = None) -> ToyDenoiser:
        return kind(ToyTransformer(32, 3))

    return family(load_denoiser=load)


def example_with(denoiser: ToyDenoiser, **more: object) -> Subject:
    return kit(denoiser=denoiser, example=FamilyTests.example_of(family(), CLIP), **more)


PLANTED: tuple[tuple[str, str, str, Callable[[Path], Subject]], ...] = (
    (
        "`decay` for `decays`",
        "test_abilities_of_the_denoiser_are_spelt_right",
        "for decays of SupportsDecayRule?",
        lambda _: kit(denoiser=Decaying()),
    ),
    (
        "text padded in full, of which the denoiser reads the first tokens",
        "test_text_padded_in_full_is_seen_to_its_end",
        'padding of words is ignored: it could be "longest"',
        lambda _: kit(
            family=DuoFamily(ToyOptions()), denoiser=CuttingDuo(DuoTransformer(32, 3)), example=duo_example()
        ),
    ),
    (
        "a prediction that lacks the last frame",
        "test_a_prediction_is_shaped_like_its_input",
        "its predict gave float32 (2, 12, 2, 4, 6) where (2, 12, 3, 4, 6) of fp32,",
        lambda _: example_with(Misshapen()),
    ),
    (
        "a prediction in double precision",
        "test_a_prediction_is_shaped_like_its_input",
        "its predict gave float64 (2, 12, 3, 4, 6) where",
        lambda _: example_with(Precise()),
    ),
    (
        "a prediction in a tuple, as diffusers gives it",
        "test_a_prediction_is_shaped_like_its_input",
        "its predict gave a tuple where",
        lambda _: example_with(Wrapped()),
    ),
    (
        "a norm over the batch",
        "test_clips_in_a_batch_do_not_see_each_other",
        "differ by",
        lambda _: example_with(Mixing()),
    ),
    (
        "the mask of text that is not handed on",
        "test_masked_text_does_not_matter",
        "text: differ by",
        lambda _: example_with(Unmasked()),
    ),
    (
        "padding of text that is attended to",
        "test_padding_of_text_does_not_matter",
        "text: differ by",
        lambda _: example_with(Unmasked()),
    ),
    ("a denoiser that ignores its text", "test_text_matters", "text is ignored", lambda _: example_with(Textless())),
    (
        "a denoiser that ignores the noise level",
        "test_the_level_matters",
        "the level is ignored",
        lambda _: example_with(Levelless()),
    ),
    (
        "levels by frame that are shifted by a frame",
        "test_levels_by_frame_that_agree_are_one_level",
        "differ by",
        lambda _: example_with(Shifting(), family=family()),
    ),
    (
        "levels by frame of which only the last is read",
        "test_the_level_of_one_frame_matters",
        "the level of the first frame is ignored",
        lambda _: example_with(OneLevel(), family=family()),
    ),
    (
        "a weight that nothing uses",
        "test_gradients_reach_every_parameter",
        "without a gradient: idle",
        lambda _: example_with(Denoiser(WithIdleWeight)),
    ),
    (
        "without_gradient that names a weight which learns",
        "test_gradients_reach_every_parameter",
        "without_gradient names what gets one, or is not trained: patch_in.weight",
        lambda _: example_with(Denoiser(), attributes={"without_gradient": frozenset({"patch_in.weight"})}),
    ),
    (
        "a prediction under no_grad",
        "test_gradients_reach_every_parameter",
        "outside the graph, from which no weight learns",
        lambda _: example_with(Gradless()),
    ),
    (
        "weights that are drawn at random when the file lacks them",
        "test_loading_is_reproducible",
        "differ: patch_in.weight",
        lambda _: kit(family=family(load_denoiser=another)),
    ),
    (
        "save that writes other weights",
        "test_a_saved_denoiser_loads_to_equal_predictions",
        "saved and loaded it predicts something else",
        lambda folder: example_with(SavingOthers(), family=family(), tmp_path=folder),
    ),
    (
        "save that ignores its state, so that an EMA is never written",
        "test_saving_writes_the_weights_that_are_given",
        "not the weights that were given",
        lambda folder: kit(denoiser=SavingItself(), family=family(), tmp_path=folder),
    ),
    (
        "an empty folder that gives initial weights",
        "test_an_empty_weights_folder_is_an_error",
        "DID NOT RAISE ModelError",
        lambda folder: kit(family=family(load_denoiser=another)) | kit(tmp_path=folder),
    ),
    (
        "a storage type that is ignored",
        "test_bf16_is_a_storage_type",
        "0% of the weights are bf16",
        lambda _: kit(family=family(load_denoiser=always_fp32), example=FamilyTests.example_of(family(), CLIP)),
    ),
    (
        "an adapter target that names no module",
        "test_every_adapter_target_names_a_module",
        "to_gate matches no module",
        lambda _: kit(family=with_denoiser(OddTarget)),
    ),
    (
        "a denoiser that is another one with an adapter",
        "test_a_new_adapter_changes_nothing_and_is_trained",
        "a fresh adapter changes the prediction",
        lambda _: kit(family=family(load_denoiser=another), example=FamilyTests.example_of(family(), CLIP)),
    ),
    (
        "load_lora that loses a weight",
        "test_a_saved_adapter_loads_unchanged",
        "names differ",
        lambda folder: kit(family=with_denoiser(Forgetful), tmp_path=folder),
    ),
    (
        "original names of modules that it has not",
        "test_every_adapter_weight_has_a_name_of_its_authors",
        "original_names names no module that has an adapter",
        lambda _: kit(family=with_denoiser(Misnamed)),
    ),
    (
        "shapes of weights that a plan is told wrongly",
        "test_what_a_plan_knows_of_the_denoiser_is_what_is_loaded",
        "weight_shapes differs",
        lambda _: kit(family=known(weight_shapes=lambda self: {"a.weight": (1, 2)})),
    ),
    (
        "a block's weight that a plan is not told of",
        "test_what_a_plan_knows_of_the_blocks_is_what_is_loaded",
        "block_weights differs",
        lambda _: kit(family=family(block_weights=lambda self: {"a.weight": (1, 2)})),
    ),
    (
        "targets of adapters that a plan is told wrongly",
        "test_what_a_plan_knows_of_the_denoiser_is_what_is_loaded",
        "lora_targets are not the denoiser's",
        lambda _: kit(family=known(lora_targets=("to_v",))),
    ),
)
"""(the mistake, the rule that finds it, a piece of its message, the arguments with the mistake in them)."""


@pytest.mark.parametrize(("rule", "says", "subject"), [each[1:] for each in PLANTED], ids=[each[0] for each in PLANTED])
def test_the_rule_fails_for_a_denoiser_that_breaks_it(
    rule: str, says: str, subject: Callable[..., Subject], tmp_path: Path, breaks: Callable[..., None]
) -> None:
    breaks(FamilyTests(), rule, subject(tmp_path), says)


def test_every_rule_of_denoisers_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert set().union(*map(rules_of, (DenoiserTests, LoraTests))) == {rule for _, rule, _, _ in PLANTED}


def test_a_save_that_changes_the_module_is_found(tmp_path: Path, breaks: Callable[..., None]) -> None:
    subject = kit(denoiser=TakingOver(), family=family(), tmp_path=tmp_path)
    breaks(FamilyTests(), "test_saving_writes_the_weights_that_are_given", subject)


def test_a_denoiser_that_takes_no_adapters_is_skipped_with_the_reason() -> None:
    class Adapterless:
        def __init__(self, inner: ToyDenoiser) -> None:
            self.module, self.blocks = inner.module, inner.blocks

    adapterless = family(load_denoiser=lambda self, device, dtype, weights=None: Adapterless(Denoiser()))
    with pytest.raises(pytest.skip.Exception, match="SupportsLora"):
        FamilyTests().test_every_adapter_target_names_a_module(adapterless)
