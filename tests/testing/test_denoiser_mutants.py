"""Every rule of the family kit about denoisers, their taps and their adapters fails for a toy denoiser that breaks it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vtrain_toy.denoiser import DuoDenoiser, DuoTransformer, ToyDenoiser, build_denoiser
from vtrain_toy.duo import DuoFamily
from vtrain_toy.family import ToyFamily, ToyOptions
from vtrain_toy.transformer import ToyTransformer

from vtrain.contract import (
    ClipShape,
    Condition,
    LatentShape,
    NoiseLevel,
    Text,
    TextPart,
    timesteps,
)
from vtrain.testing import FamilyTests
from vtrain.testing.family_denoiser import DenoiserTests, LoraTests, TapTests
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


class Decaying(Denoiser):
    def decay(self, name: str, shape: tuple[int, ...]) -> bool:
        return True


class Misshapen(Denoiser):
    def predict(self, *inputs: Any) -> Tensor:
        return super().predict(*inputs)[:, :, :-1]


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


class Reentrant(ToyTransformer):
    """The old form of checkpointing, in which a hook on a block sees a tensor outside the graph."""

    def _through(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            again: Tensor = checkpoint(block, *inputs, use_reentrant=True)
            return again
        return super()._through(block, *inputs)


class RunningTwice(ToyTransformer):
    def _through(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        return super()._through(block, super()._through(block, *inputs), *inputs[1:])


class Scaling(ToyTransformer):
    """Checkpointing changes the result a little."""

    def _through(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        return super()._through(block, *inputs) * (1.001 if self.checkpointing else 1.0)


class Swapped(Denoiser):
    def fold(self, tap: Tensor, latents: LatentShape) -> Tensor:
        return super().fold(tap, latents).transpose(2, 3)


class NeverCheckpointing(Denoiser):
    def gradient_checkpointing(self, on: bool) -> None:
        return


class OddTarget(ToyDenoiser):
    lora_targets = ("to_q", "to_gate")  # type: ignore[assignment]


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


MUTANTS: Mapping[str, Callable[[Path], Subject]] = {
    "test_abilities_of_the_denoiser_are_spelt_right": lambda _: kit(denoiser=Decaying()),
    "test_text_padded_in_full_is_seen_to_its_end": lambda _: kit(
        family=DuoFamily(ToyOptions()), denoiser=CuttingDuo(DuoTransformer(32, 3)), example=duo_example()
    ),
    "test_a_prediction_is_shaped_like_its_input": lambda _: example_with(Misshapen()),
    "test_clips_in_a_batch_do_not_see_each_other": lambda _: example_with(Mixing()),
    "test_masked_text_does_not_matter": lambda _: example_with(Unmasked()),
    "test_padding_of_text_does_not_matter": lambda _: example_with(Unmasked()),
    "test_text_matters": lambda _: example_with(Textless()),
    "test_the_level_matters": lambda _: example_with(Levelless()),
    "test_levels_by_frame_that_agree_are_one_level": lambda _: example_with(Shifting(), family=family()),
    "test_the_level_of_one_frame_matters": lambda _: example_with(OneLevel(), family=family()),
    "test_gradients_reach_every_parameter": lambda _: example_with(Denoiser(WithIdleWeight)),
    "test_loading_is_reproducible": lambda _: kit(family=family(load_denoiser=another)),
    "test_a_saved_denoiser_loads_to_equal_predictions": lambda folder: example_with(
        SavingOthers(), family=family(), tmp_path=folder
    ),
    "test_saving_writes_the_weights_that_are_given": lambda folder: kit(
        denoiser=SavingItself(), family=family(), tmp_path=folder
    ),
    "test_an_empty_weights_folder_is_an_error": lambda folder: (
        kit(family=family(load_denoiser=another)) | kit(tmp_path=folder)
    ),
    "test_bf16_is_a_storage_type": lambda _: kit(
        family=family(load_denoiser=always_fp32), example=FamilyTests.example_of(family(), CLIP)
    ),
    "test_every_block_can_be_tapped": lambda _: example_with(Denoiser(Reentrant), on=True),
    "test_a_tap_folds_to_the_token_grid": lambda _: example_with(Swapped(), family=family()),
    "test_checkpointing_changes_no_gradient": lambda _: example_with(Denoiser(Scaling)),
    "test_checkpointing_recomputes_each_block": lambda _: example_with(NeverCheckpointing()),
    "test_every_adapter_target_names_a_module": lambda _: kit(family=with_denoiser(OddTarget)),
    "test_a_new_adapter_changes_nothing_and_is_trained": lambda _: kit(
        family=family(load_denoiser=another), example=FamilyTests.example_of(family(), CLIP)
    ),
    "test_a_saved_adapter_loads_unchanged": lambda folder: kit(family=with_denoiser(Forgetful), tmp_path=folder),
}
"""Rule -> the arguments that break it."""


@pytest.mark.parametrize("rule", MUTANTS)
def test_the_rule_fails_for_a_denoiser_that_breaks_it(rule: str, tmp_path: Path, breaks: Callable[..., None]) -> None:
    breaks(FamilyTests(), rule, MUTANTS[rule](tmp_path))


def test_every_rule_of_denoisers_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert set().union(*map(rules_of, (DenoiserTests, TapTests, LoraTests))) == MUTANTS.keys()


def test_a_tap_outside_the_graph_is_called_detached() -> None:
    with pytest.raises(AssertionError, match="what a hook on a block sees is detached"):
        FamilyTests().test_every_block_can_be_tapped(**example_with(Denoiser(Reentrant), on=True))


def test_a_block_that_runs_twice_is_found(breaks: Callable[..., None]) -> None:
    subject = example_with(Denoiser(RunningTwice), on=False)
    breaks(FamilyTests(), "test_every_block_can_be_tapped", subject)


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
