"""The rules of a denoiser: its prediction, its adapter where it has one, its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vtrain.contract import (
    Condition,
    Denoiser,
    Device,
    Family,
    ModelError,
    NoiseLevel,
    SupportsAdapterNames,
    SupportsBlockWeights,
    SupportsLora,
    SupportsOriginalNames,
    TextPart,
    comfyui_names,
    takes_frame_levels,
    timesteps,
    with_clean,
)
from vtrain.contract.run_rules import prediction_fault
from vtrain.testing.sampler import check_names, gap, noise
from vtrain.testing.subject import Example, FamilySubject

RANK = 4


def adapted(family: Family) -> tuple[Denoiser, SupportsLora]:
    """A fresh denoiser with peft's adapter on its own targets, twice typed. Skips when it takes none."""
    from peft import LoraConfig, inject_adapter_in_model  # it imports transformers, which most kits do not need

    denoiser = family.load_denoiser("cpu", "fp32")
    if not isinstance(denoiser, SupportsLora):
        pytest.skip("this family's denoiser takes no adapters (SupportsLora)")
    denoiser.module.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(denoiser.lora_targets))
    inject_adapter_in_model(config, denoiser.module)
    return denoiser, denoiser


def settings_of(lora: SupportsLora) -> dict[str, object]:
    """Of that adapter, as peft has them. Its alpha is not its rank: whoever takes the one for the other is found."""
    return {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": sorted(lora.lora_targets), "lora_dropout": 0.0}


class LoraTests(FamilySubject):
    """Adapters through peft."""

    def test_every_adapter_target_names_a_module(self, family: Family) -> None:
        """Each of lora_targets matches modules of the denoiser, and only those get an adapter."""
        denoiser, lora = adapted(family)
        found = {name.split(".lora_")[0] for name, _ in denoiser.module.named_parameters() if ".lora_" in name}
        for target in lora.lora_targets:
            assert any(name == target or name.endswith("." + target) for name in found), f"{target} matches no module"

    def test_what_a_plan_knows_of_the_denoiser_is_what_is_loaded(self, family: Family) -> None:
        """weight_shapes, lora_targets and original_names (SupportsAdapterNames) are those of the denoiser."""
        if not isinstance(family, SupportsAdapterNames):
            pytest.skip(
                "this family does not name its denoiser's weights before they are loaded (SupportsAdapterNames)"
            )
        denoiser = family.load_denoiser("cpu", "fp32")
        own = {name: tuple(value.shape) for name, value in denoiser.module.state_dict().items()}
        said = {name: tuple(shape) for name, shape in family.weight_shapes().items()}
        assert said == own, f"weight_shapes differs: {sorted(said.items() ^ own.items())[:4]}"
        targets = denoiser.lora_targets if isinstance(denoiser, SupportsLora) else ()
        assert tuple(family.lora_targets) == tuple(targets), "lora_targets are not the denoiser's"
        names = denoiser.original_names if isinstance(denoiser, SupportsOriginalNames) else {}
        assert dict(family.original_names) == dict(names), "original_names are not the denoiser's"

    def test_what_a_plan_knows_of_the_blocks_is_what_is_loaded(self, family: Family) -> None:
        """block_weights (SupportsBlockWeights) are the weights of Denoiser.blocks: their names in its module, their shapes."""
        if not isinstance(family, SupportsBlockWeights):
            pytest.skip("this family does not name its blocks' weights before they are loaded (SupportsBlockWeights)")
        denoiser = family.load_denoiser("cpu", "fp32")
        within = {id(weight) for block in denoiser.blocks for weight in block.parameters()}
        own = {name: tuple(weight.shape) for name, weight in denoiser.module.named_parameters() if id(weight) in within}
        said = {name: tuple(shape) for name, shape in family.block_weights().items()}
        assert said == own, f"block_weights differs: {sorted(said.items() ^ own.items())[:4]}"

    def test_a_new_adapter_changes_nothing_and_is_trained(self, family: Family, example: Example) -> None:
        """With its fresh adapter the denoiser predicts what it did, and a loss reaches all of the adapter's outer weights."""
        denoiser, _ = adapted(family)
        prediction = example.run(denoiser)
        with torch.no_grad():
            plain = example.run(family.load_denoiser("cpu", "fp32"))
        assert torch.allclose(prediction, plain, atol=1e-6), "a fresh adapter changes the prediction"
        torch.autograd.backward(prediction.float().square().mean())
        outer = {name: w.grad for name, w in denoiser.module.named_parameters() if ".lora_B." in name}
        dry = [name for name, grad in outer.items() if grad is None]
        assert not dry, f"without a gradient: {', '.join(dry)}"

    def test_a_saved_adapter_loads_unchanged(self, family: Family, tmp_path: Path) -> None:
        """load_lora gives back what save_lora wrote: the same names, the same values."""
        from peft import get_peft_model_state_dict

        denoiser, lora = adapted(family)
        given = get_peft_model_state_dict(denoiser.module)
        state = {name: noise(value.shape, seed) for seed, (name, value) in enumerate(given.items())}
        lora.save_lora(tmp_path / "adapter", state, settings_of(lora))
        loaded = lora.load_lora(tmp_path / "adapter")
        assert loaded.keys() == state.keys(), f"names differ: {sorted(loaded.keys() ^ state.keys())[:4]}"
        odd = [name for name in state if not torch.equal(loaded[name], state[name])]
        assert not odd, f"values differ: {', '.join(odd)}"

    def test_every_adapter_weight_has_a_name_of_its_authors(self, family: Family) -> None:
        """original_names (SupportsOriginalNames) give each adapter weight a name for ComfyUI, and no two the same."""
        from peft import get_peft_model_state_dict

        denoiser, _ = adapted(family)
        if not isinstance(denoiser, SupportsOriginalNames):
            pytest.skip("this denoiser's modules have no other names (SupportsOriginalNames)")
        own = get_peft_model_state_dict(denoiser.module)
        found = comfyui_names(own, denoiser.original_names)
        modules = {
            name.rsplit(".", 2)[0]: new.removeprefix("diffusion_model.").rsplit(".", 2)[0]
            for name, new in found.items()
        }
        assert any(name != new for name, new in modules.items()), "original_names names no module that has an adapter"


def masked_parts(example: Example) -> Iterator[tuple[str, TextPart]]:
    """Those of the text that come with a mask. Skips when there are none."""
    found = [(name, part) for name, part in example.condition.text.parts.items() if part.mask is not None]
    if not found:
        pytest.skip("no part of this family's text comes with a mask")
    yield from found


class DenoiserTests(FamilySubject):
    """The model being trained.

    batch_tolerance, mask_tolerance: largest difference, relative to the largest value, between predictions that must agree.
    without_gradient: names of parameters that get no gradient by design; name them with a comment that says why.
    """

    batch_tolerance: float = 1e-5
    mask_tolerance: float = 1e-5
    without_gradient: frozenset[str] = frozenset()

    def test_abilities_of_the_denoiser_are_spelt_right(self, denoiser: Denoiser) -> None:
        """No public name of the denoiser is almost that of an ability which it lacks."""
        check_names("denoiser", denoiser)

    def test_a_prediction_is_shaped_like_its_input(self, denoiser: Denoiser, example: Example) -> None:
        """predict gives finite values in the shape of `noisy`, in fp32, bf16 or fp16: a run ends at others."""
        with torch.no_grad():
            prediction = example.run(denoiser)
            fault = prediction_fault(prediction, example.noisy)
        assert not fault, fault
        assert prediction.isfinite().all(), "the prediction is not finite"

    def test_clips_in_a_batch_do_not_see_each_other(self, denoiser: Denoiser, example: Example) -> None:
        """Changing one clip, its level, its text and its conditions leaves the other's prediction (within batch_tolerance)."""
        text = example.condition.text
        other = replace(
            example,
            noisy=torch.stack([example.noisy[0], noise(example.latents, seed=9)]),
            level=NoiseLevel(example.level.sigma[[0, 0]], timesteps(example.level)[[0, 0]]),
            condition=Condition(
                text.map(lambda tensor: tensor[[0, 0]]),
                {name: each[[0, 0]] for name, each in example.condition.extras.items()},
            ),
        )
        with torch.no_grad():
            found, wanted = other.run(denoiser)[0], example.run(denoiser)[0]
        assert gap(found, wanted) <= self.batch_tolerance, f"differ by {gap(found, wanted):.1e}"

    def test_masked_text_does_not_matter(self, denoiser: Denoiser, example: Example) -> None:
        """What stands in text embeddings behind a mask changes no prediction (within mask_tolerance)."""
        for name, part in masked_parts(example):
            embeds, mask = part.masked
            rubbish = torch.where(mask[..., None], embeds, 3 * noise(embeds.shape, seed=5).to(embeds))
            with torch.no_grad():
                found = example.with_part(name, TextPart(rubbish, mask)).run(denoiser)
                wanted = example.run(denoiser)
            assert gap(found, wanted) <= self.mask_tolerance, f"{name}: differ by {gap(found, wanted):.1e}"

    def test_padding_of_text_does_not_matter(self, denoiser: Denoiser, example: Example) -> None:
        """More padding behind the real tokens changes no prediction (within mask_tolerance)."""
        for name, part in masked_parts(example):
            embeds, mask = part.masked
            longest = int(mask.sum(dim=1).max())
            with torch.no_grad():
                found = example.with_part(name, TextPart(embeds[:, :longest], mask[:, :longest])).run(denoiser)
                wanted = example.run(denoiser)
            assert gap(found, wanted) <= self.mask_tolerance, f"{name}: differ by {gap(found, wanted):.1e}"

    def test_text_padded_in_full_is_seen_to_its_end(self, family: Family, denoiser: Denoiser, example: Example) -> None:
        """What stands behind the text in a part padded in full changes the prediction: else padding it costs for nothing."""
        full = [
            name
            for encoder in family.text_encoders().values()
            for name, spec in encoder.parts.items()
            if spec.padding == "full"
        ]
        if not full:
            pytest.skip("no part of this family's text is padded in full")
        for name in full:
            given = example.condition.text.parts[name]
            changed = given.embeds.clone()
            changed[:, -1] += 3
            with torch.no_grad():
                other = example.with_part(name, TextPart(changed)).run(denoiser)
                assert gap(other, example.run(denoiser)) > 1e-6, f'padding of {name} is ignored: it could be "longest"'

    def test_text_matters(self, denoiser: Denoiser, example: Example) -> None:
        """Another text, in any of its parts, gives another prediction."""
        for name, part in example.condition.text.parts.items():
            other = TextPart(part.embeds.flip(0), None if part.mask is None else part.mask.flip(0))
            with torch.no_grad():
                found = example.with_part(name, other).run(denoiser)
                assert gap(found, example.run(denoiser)) > 1e-6, f"{name} is ignored"

    def test_the_level_matters(self, denoiser: Denoiser, example: Example) -> None:
        """Another noise level gives another prediction."""
        level = NoiseLevel(example.level.sigma.flip(0), timesteps(example.level).flip(0))
        with torch.no_grad():
            other = replace(example, level=level).run(denoiser)
            assert gap(other, example.run(denoiser)) > 1e-6, "the level is ignored"

    def test_levels_by_frame_that_agree_are_one_level(
        self, family: Family, denoiser: Denoiser, example: Example
    ) -> None:
        """A level (B, f) that is the same for all frames of a clip gives the prediction of (B,) (within batch_tolerance)."""
        with torch.no_grad():
            found = self._by_frame(family, example).run(denoiser)
            wanted = example.run(denoiser)
        assert gap(found, wanted) <= self.batch_tolerance, f"differ by {gap(found, wanted):.1e}"

    def test_the_level_of_one_frame_matters(self, family: Family, denoiser: Denoiser, example: Example) -> None:
        """Level 0 at the first frame alone gives another prediction."""
        each = self._by_frame(family, example)
        clean = torch.arange(example.latents.frames).expand(2, -1) == 0
        first = with_clean(family, each.level, clean)
        with torch.no_grad():
            other = replace(each, level=first).run(denoiser)
            assert gap(other, each.run(denoiser)) > 1e-6, "the level of the first frame is ignored"

    def _by_frame(self, family: Family, example: Example) -> Example:
        """The same with a level for each latent frame, if the family takes that."""
        if not takes_frame_levels(family):
            pytest.skip("this family takes one level for a clip (SupportsFrameLevels)")
        return self.by_frame(family, example)

    def test_gradients_reach_every_parameter(self, denoiser: Denoiser, example: Example) -> None:
        """A loss on the prediction gives every parameter a gradient that is not all zero, but those in without_gradient."""
        denoiser.module.zero_grad()
        prediction = example.run(denoiser)
        fault = prediction_fault(prediction, example.noisy)
        assert not fault, fault
        torch.autograd.backward(prediction.float().square().mean())
        dry = {
            name
            for name, weight in denoiser.module.named_parameters()
            if weight.requires_grad and (weight.grad is None or not weight.grad.any())
        }
        denoiser.module.zero_grad()
        lacking, reached = sorted(dry - self.without_gradient), sorted(self.without_gradient - dry)
        assert not lacking, f"without a gradient: {', '.join(lacking)}"
        assert not reached, f"without_gradient names what gets one, or is not trained: {', '.join(reached)}"

    def test_loading_is_reproducible(self, family: Family) -> None:
        """Loaded twice, the weights are the same, bit for bit."""
        first, second = (family.load_denoiser("cpu", "fp32").module.state_dict() for _ in range(2))
        assert first.keys() == second.keys()
        odd = [name for name in first if not torch.equal(first[name], second[name])]
        assert not odd, f"differ: {', '.join(odd)}"

    def test_a_saved_denoiser_loads_to_equal_predictions(
        self, family: Family, denoiser: Denoiser, example: Example, tmp_path: Path
    ) -> None:
        """save of the denoiser's own weights, then load_denoiser(weights=): the same predictions, bit for bit."""
        folder = tmp_path / "saved"
        denoiser.save(folder, denoiser.module.state_dict())
        loaded = family.load_denoiser("cpu", "fp32", weights=folder)
        with torch.no_grad():
            assert torch.equal(example.run(loaded), example.run(denoiser)), (
                "saved and loaded it predicts something else"
            )

    def test_saving_writes_the_weights_that_are_given(self, family: Family, denoiser: Denoiser, tmp_path: Path) -> None:
        """save writes its `state`, whatever the module's own weights are, and leaves those as they are."""
        own = {name: value.clone() for name, value in denoiser.module.state_dict().items()}
        given = {name: value + 1 if value.is_floating_point() else value for name, value in own.items()}
        denoiser.save(tmp_path / "given", given)
        loaded = family.load_denoiser("cpu", "fp32", weights=tmp_path / "given").module.state_dict()
        odd = [name for name in given if not torch.equal(loaded[name], given[name])]
        assert not odd, f"not the weights that were given: {', '.join(odd)}"
        moved = [name for name, value in denoiser.module.state_dict().items() if not torch.equal(value, own[name])]
        assert not moved, f"saving changed the module: {', '.join(moved)}"

    def test_an_empty_weights_folder_is_an_error(self, family: Family, tmp_path: Path) -> None:
        """load_denoiser raises ModelError for a folder that holds no weights."""
        with pytest.raises(ModelError):
            family.load_denoiser("cpu", "fp32", weights=tmp_path)

    def test_bf16_is_a_storage_type(self, family: Family, example: Example) -> None:
        """Loaded in bf16, most weights are bf16, and predictions under autocast are finite and as a run takes them."""
        denoiser = family.load_denoiser("cpu", "bf16")
        weights = list(denoiser.module.parameters())
        stored = sum(weight.numel() for weight in weights if weight.dtype is torch.bfloat16)
        share = stored / sum(weight.numel() for weight in weights)
        assert share > 0.5, f"{share:.0%} of the weights are bf16"
        with torch.no_grad(), Device().autocast("bf16"):
            prediction = example.run(denoiser)
            fault = prediction_fault(prediction, example.noisy)
        assert not fault, fault
        assert prediction.isfinite().all(), "the prediction is not finite"
