"""The rules that compare a family with the model's original code: what no other rule can know.

Everything else in this kit asks whether a family agrees with itself. A timestep in another unit, a flipped sign, latents that are
not normalised, a prompt without its instruction or an adapter that no other tool reads agree with themselves too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vtrain.contract import (
    Caption,
    Condition,
    Denoiser,
    Family,
    NoiseLevel,
    Role,
    SupportsLora,
    Text,
    TextEncoder,
    TextPart,
    VideoCodec,
    timesteps,
)
from vtrain.testing.family_denoiser import RANK, adapted, settings_of
from vtrain.testing.sampler import gap, moving_picture, noise, padded, unproved
from vtrain.testing.subject import Example, FamilySubject

Original = Callable[[Tensor, Tensor, Condition], Tensor]
"""(noisy (B, C, f, h, w), sigma (B,), condition) -> the original model's prediction, as its own sampler takes it."""

OriginalText = Callable[[Sequence[str], Role], Text]
"""(captions, "prompt" or "negative") -> the parts as the original denoiser is given them, with a mask where it is given one."""

OriginalCodec = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""(pixels (B, 3, F, H, W) in [-1, 1] -> latents as the original denoiser is given them, latents -> pixels)."""


def unlike(found: Tensor, wanted: Tensor, tolerance: float) -> str:
    """How `found` differs from what the original gives, with the mistake that explains it; "" where it does not."""
    if found.shape != wanted.shape:
        return f"it is {tuple(found.shape)}, and the original's is {tuple(wanted.shape)}"
    found, wanted = found.float(), wanted.float()
    off = gap(found, wanted)
    if off <= tolerance:
        return ""
    if gap(-found, wanted) <= tolerance:
        return "it is the original's with the sign flipped"
    if found.ndim == 5 and gap(_fitted(found, wanted), wanted) <= 10 * tolerance:
        return "each channel is the original's times a number, plus a number: normalisation differs (mean, std, scaling factor)"
    return f"it differs from the original's by {off:.1e} of the largest value"


def _fitted(found: Tensor, wanted: Tensor) -> Tensor:
    """`found` (B, C, ...) with the scale and the shift of each channel that bring it nearest to `wanted`."""
    axes = [axis for axis in range(found.ndim) if axis != 1]
    mean, goal = found.mean(axes, keepdim=True), wanted.mean(axes, keepdim=True)
    spread = ((found - mean) ** 2).mean(axes, keepdim=True).clamp(min=1e-12)
    return goal + (found - mean) * ((found - mean) * (wanted - goal)).mean(axes, keepdim=True) / spread


class ReferenceTests(FamilySubject):
    """A family against the model's original code, on the small model folder, in fp32. Each fixture is optional; a rule without its
    fixture is skipped and says what is not proved.

    The kit's inputs are the same each time, so what the original gave once may be stored and given back.

    reference_tolerance: largest difference, relative to the largest value. reference_captions: what is encoded: plain words, spaces
    and HTML that a pipeline may clean, nothing at all, and more than any encoder takes.
    """

    reference_tolerance: float = 1e-4
    reference_captions: tuple[str, ...] = (
        "a cat walks slowly over the wet grass",
        "  Tom &amp; Jerry\n run over the FIELD ",
        "",
        "a small dog runs along the beach while waves roll in " * 60,
    )

    @pytest.fixture(scope="class")
    @classmethod
    def reference_predict(cls) -> Original:
        """(noisy, sigma, condition) -> the prediction of the original model on the same folder. Override it."""
        unproved("that predict and timestep are right", "reference_predict", "the original model's prediction")

    @pytest.fixture(scope="class")
    @classmethod
    def reference_text(cls) -> OriginalText:
        """(captions, role) -> Text, as the original pipeline encodes prompts and negative prompts. Override it."""
        unproved(
            "that captions are encoded as the model was trained", "reference_text", "the original pipeline's embeddings"
        )

    @pytest.fixture(scope="class")
    @classmethod
    def reference_latents(cls) -> OriginalCodec:
        """(pixels -> latents, latents -> pixels) of the original pipeline, normalisation included. Override it."""
        unproved(
            "that latents are normalised and decoded right", "reference_latents", "the original's encode and decode"
        )

    @pytest.fixture(scope="class")
    @classmethod
    def reference_lora(cls, denoiser: Denoiser) -> Callable[[Path], Original]:
        """(folder that save_lora wrote) -> the prediction of the original with that adapter loaded. Override it."""
        if not isinstance(denoiser, SupportsLora):
            pytest.skip("this family's denoiser takes no adapters (SupportsLora)")
        unproved(
            "that other tools read its adapters", "reference_lora", "what the original predicts with the adapter loaded"
        )

    def test_predictions_are_the_originals(self, family: Family, example: Example, reference_predict: Original) -> None:
        """predict, given the timesteps of Family.timestep, gives what the original does at two noise levels."""
        denoiser = family.load_denoiser("cpu", "fp32")
        with torch.no_grad():
            wanted = reference_predict(example.noisy, example.level.sigma, example.condition)
            found = example.run(denoiser)
            assert wanted.std() > 0, "the original predicts one number everywhere: that proves nothing"
            fault = unlike(found, wanted, self.reference_tolerance)
            assert not fault, f"the prediction: {fault}{self.unit(denoiser, example, wanted) if fault else ''}"

    def unit(self, denoiser: Denoiser, example: Example, wanted: Tensor) -> str:
        """Says so if only the unit of timesteps is wrong."""
        for factor in (1000.0, 0.001):
            level = NoiseLevel(example.level.sigma, timesteps(example.level) * factor)
            found = denoiser.predict(example.noisy, level, example.condition)
            if not unlike(found, wanted, self.reference_tolerance):
                return f"; with timesteps times {factor:g} it is the same: Family.timestep gives another unit"
        return ""

    @pytest.mark.parametrize("role", ["prompt", "negative"])
    def test_embeddings_are_the_originals(
        self, family: Family, text_encoders: Mapping[str, TextEncoder], reference_text: OriginalText, role: Role
    ) -> None:
        """What the denoiser is given of a caption is what the original pipeline gives its own: wording, cut, padding, values."""
        with torch.no_grad():
            theirs = reference_text(self.reference_captions, role).parts
        captions = [Caption(text) for text in self.reference_captions]
        for name, spec in family.text_encoders().items():
            with torch.no_grad():
                ours = padded(text_encoders[name].encode(captions, role), spec)
            for part, found in ours.parts.items():
                assert part in theirs, f"reference_text gives no part {part}, only {', '.join(sorted(theirs))}"
                for row, text in enumerate(self.reference_captions):
                    fault = self.part_fault(found, theirs[part], row)
                    assert not fault, f"{part} of {text[:40]!r}: {fault}"

    def part_fault(self, ours: TextPart, theirs: TextPart, row: int) -> str:
        if ours.mask is None and theirs.mask is not None:
            return 'the original masks what stands behind the text: the part\'s padding is "longest"'
        if ours.mask is not None and theirs.mask is None:
            return 'the original gives no mask, and sees what stands behind the text: the part\'s padding is "full"'
        found, wanted = (
            part.embeds[row] if part.mask is None else part.embeds[row][part.mask[row].bool()]
            for part in (ours, theirs)
        )
        if len(found) != len(wanted):
            return f"{len(found)} tokens, and the original has {len(wanted)}"
        return unlike(found, wanted, self.reference_tolerance)

    def test_latents_are_the_originals(
        self, family: Family, codec: VideoCodec, example: Example, reference_latents: OriginalCodec
    ) -> None:
        """encode gives the latents that the original denoiser is trained on: same range of pixels, same normalisation."""
        pixels = moving_picture(example.clip, batch=2)
        with torch.no_grad():
            fault = unlike(codec.encode(pixels).mean, reference_latents[0](pixels), self.reference_tolerance)
        assert not fault, f"the latents: {fault}"

    def test_decoded_pixels_are_the_originals(
        self, codec: VideoCodec, example: Example, reference_latents: OriginalCodec
    ) -> None:
        """decode gives the pixels that the original shows, cut to [-1, 1]."""
        latents = noise((1, *example.latents), seed=4)
        with torch.no_grad():
            fault = unlike(codec.decode(latents), reference_latents[1](latents).clamp(-1, 1), self.reference_tolerance)
        assert not fault, f"the pixels: {fault}"

    def test_adapters_do_the_same_in_the_original(
        self, family: Family, example: Example, reference_lora: Callable[[Path], Original], tmp_path: Path
    ) -> None:
        """An adapter that save_lora wrote, of an alpha that is not its rank, gives the original the prediction that it has here."""
        from peft import get_peft_model_state_dict

        denoiser, lora = adapted(family)
        with torch.no_grad():
            plain = example.run(denoiser)
            for seed, (name, weight) in enumerate(denoiser.module.named_parameters()):
                if ".lora_" in name:
                    weight.copy_(noise(weight.shape, seed) / weight.shape[1] ** 0.5)
            lora.save_lora(tmp_path / "adapter", get_peft_model_state_dict(denoiser.module), settings_of(lora))
            theirs = reference_lora(tmp_path / "adapter")(example.noisy, example.level.sigma, example.condition)
            found = example.run(denoiser)
        assert gap(found, plain) > 100 * self.reference_tolerance, "the adapter changes too little to prove anything"
        taken = gap(theirs, plain) > self.reference_tolerance
        assert taken, f"the original predicts as without the adapter: it takes none of its keys (rank {RANK})"
        fault = unlike(found, theirs, self.reference_tolerance)
        assert not fault, f"the prediction with the adapter: {fault}"
