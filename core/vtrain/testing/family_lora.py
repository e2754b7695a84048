"""The rules of a denoiser that takes adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vtrain.contract import Denoiser, Family, SupportsLora
from vtrain.testing.draws import noise
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


class LoraTests(FamilySubject):
    """Adapters through peft."""

    def test_every_adapter_target_names_a_module(self, family: Family) -> None:
        """Each of lora_targets matches modules of the denoiser, and only those get an adapter."""
        denoiser, lora = adapted(family)
        found = {name.split(".lora_")[0] for name, _ in denoiser.module.named_parameters() if ".lora_" in name}
        for target in lora.lora_targets:
            assert any(name == target or name.endswith("." + target) for name in found), f"{target} matches no module"

    def test_a_new_adapter_changes_nothing_and_is_trained(self, family: Family, example: Example) -> None:
        """With its fresh adapter the denoiser predicts what it did, and a loss reaches all of the adapter's outer weights."""
        denoiser, _ = adapted(family)
        prediction = example.run(denoiser)
        with torch.no_grad():
            assert torch.allclose(prediction, example.run(family.load_denoiser("cpu", "fp32")), atol=1e-6)
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
        settings = {
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "target_modules": sorted(lora.lora_targets),
            "lora_dropout": 0.0,
        }
        lora.save_lora(tmp_path / "adapter", state, settings)
        loaded = lora.load_lora(tmp_path / "adapter")
        assert loaded.keys() == state.keys(), f"names differ: {sorted(loaded.keys() ^ state.keys())[:4]}"
        odd = [name for name in state if not torch.equal(loaded[name], state[name])]
        assert not odd, f"values differ: {', '.join(odd)}"
