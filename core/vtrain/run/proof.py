"""That an export is the trained model: what the original library reads of it predicts the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vtrain.config.tables import LoraTable
from vtrain.contract import (
    ClipShape,
    Condition,
    Denoiser,
    Family,
    NoiseLevel,
    SupportsLora,
    Text,
    TextPart,
    conditions_of,
    tensors_of,
    timed,
    torch_type,
)
from vtrain.contract.pipelines import ExportFormat, SupportsReference
from vtrain.train.adapter import merge, round_weights
from vtrain.train.parameters import add_lora, load_lora_state

TOLERANCE = 1e-4
"""Largest difference of predictions, by the largest value, of sums in another order."""

SHARE = 0.05
"""Largest difference by what training changed: an adapter that is half loaded is found, however little it does."""

ROUNDING = 5e-2
"""What rounding whole weights may move without a word."""

NOISE = 1e-6
"""What the order of sums alone makes of a difference in fp32."""

TOKENS = 8
"""Of a text whose length is free."""


@dataclass(frozen=True)
class Probe:
    """Two calls of a denoiser, at a low and a high noise level, on random latents, text and conditions: the same each time."""

    noisy: Tensor
    level: NoiseLevel
    condition: Condition

    @classmethod
    def of(cls, family: Family) -> Probe:
        """A clip of two latent frames that is wider than high."""
        stride, rule = family.pixel_stride, family.frame_rule
        clip = ClipShape(rule.offset + rule.stride, 2 * stride, 3 * stride)
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn((2, *shape), generator=generator)

        parts: dict[str, TextPart] = {}
        for encoder in family.text_encoders().values():
            for name, spec in encoder.parts.items():
                count = spec.tokens if spec.padding == "full" else min(TOKENS, spec.tokens or 0)
                embeds = noise(spec.width) if spec.tokens is None else noise(count or 1, spec.width)
                free = spec.tokens is not None and spec.padding == "longest"
                mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if free else None
                parts[name] = TextPart(embeds.to(torch_type(spec.dtype)), mask)
        declared = tensors_of(conditions_of(family), clip)
        extras = {name: noise(*shape).to(torch_type(dtype)) for name, (shape, dtype) in declared.items()}
        level = timed(family, NoiseLevel(torch.tensor([0.3, 0.8])))
        return cls(noise(*family.latent_shape(clip)), level, Condition(Text(parts), extras))

    def run(self, denoiser: Denoiser) -> Tensor:
        """Its prediction, in the mode that it is in: what an original loader leaves in training mode, such as dropout, is found."""
        with torch.no_grad():
            return denoiser.predict(self.noisy, self.level, self.condition).float()


@dataclass(frozen=True)
class Rounded:
    """What the trained model predicts with its adapter merged, and then with its weights rounded: what a file can hold."""

    merged: Tensor
    rounded: Tensor

    @classmethod
    def of(cls, denoiser: Denoiser, probe: Probe, dtype: torch.dtype) -> Rounded:
        """denoiser: as trained; its weights are rounded in place."""
        merge(denoiser.module)
        merged = probe.run(denoiser)
        round_weights(denoiser.module, dtype)
        return cls(merged, probe.run(denoiser))


@dataclass(frozen=True)
class Proof:
    """error: largest difference between the trained model's prediction and the export's, by the largest value; effect: the same
    between the trained model and its base, None where all weights were trained. rounding: what storing the weights in fewer bits
    moves, None in fp32; the export is then compared with the trained model so rounded. tolerance: the largest error that is
    taken. original: whether the original library read it.
    """

    error: float
    effect: float | None
    tolerance: float
    rounding: float | None
    original: bool
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, trained: Tensor, plain: Tensor | None, found: Tensor, rounded: Rounded | None, original: bool) -> Proof:
        effect = None if plain is None else _gap(trained, plain)
        error = _gap(found, trained if rounded is None else rounded.rounded)
        rounding, warnings = None, []
        if rounded is not None:
            rounding = _gap(rounded.rounded, trained)
            # Merging is no rounding: it is held to the same tolerance. Not max(): it loses what is not a number.
            error = float(torch.tensor([error, _gap(rounded.merged, trained)], dtype=torch.float64).max())
        if effect is not None and effect <= NOISE:
            warnings.append("the adapter changes nothing that can be measured: the model predicts as without it")
        if rounding is not None and rounding > (ROUNDING if effect is None else SHARE * effect):
            what = f"rounding moves the prediction by {rounding:.1e} of the largest value"
            trained_by = "" if effect is None else f", and training by {effect:.1e}"
            warnings.append(f"{what}{trained_by}: export in fp32 to keep all of it")
        if not original:
            warnings.append("this model family has no loader of another library to prove it by: its own read it back")
        allowed = TOLERANCE if effect is None else min(TOLERANCE, max(SHARE * effect, 5 * NOISE))
        return cls(error, effect, allowed, rounding, original, tuple(warnings))

    @property
    def fault(self) -> str:
        """Why the export is not the trained model; "" if it is."""
        # Not `error > tolerance`: what is not a number is not the same either.
        if self.error <= self.tolerance:
            return ""
        return (
            f"what was read back predicts otherwise than the trained model: by {self.error:.1e} of the largest value, where "
            f"{self.tolerance:.1e} is allowed"
            + (f" and the adapter changes {self.effect:.1e}" if self.effect is not None else "")
            + "."
        )


def _gap(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


@dataclass(frozen=True)
class Read:
    """An export as it was read back. original: by the original library."""

    denoiser: Denoiser
    original: bool


def reread(family: Family, like: Denoiser, folder: Path, form: ExportFormat, lora: LoraTable | None) -> Read:
    """By the original library's own loader, where the family has one. like: a denoiser of the family. Raises ModelError."""
    if isinstance(family, SupportsReference):
        return Read(family.open_reference(like, folder, form), True)
    if form == "merged":
        merged = family.load_denoiser("cpu", "fp32", folder)
        merged.module.eval()
        return Read(merged, False)
    denoiser = family.load_denoiser("cpu", "fp32")
    assert lora is not None
    assert isinstance(denoiser, SupportsLora)
    add_lora(denoiser, lora, 0, str(folder))
    load_lora_state(denoiser.module, denoiser.load_lora(folder))
    denoiser.module.eval()
    return Read(denoiser, False)
