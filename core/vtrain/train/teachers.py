"""Teachers that run at each step: frozen encoders of regularizers, on the clean frames of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from vtrain.contract import (
    Device,
    Family,
    FeatureEncoder,
    LatentShape,
    Regularizer,
    SupportsDecoderOnly,
    SupportsFeatures,
    SupportsTokenGrid,
    TokenGrid,
    VideoCodec,
)
from vtrain.data.decoding.decode import unit_range
from vtrain.plan.records import Plan
from vtrain.plan.tokens import token_frames
from vtrain.train.step import StepInput, Teach


@dataclass(frozen=True)
class Teacher:
    """Features of a micro-batch, from the source's frames, or from those that `codec` decodes if there is one."""

    family: Family
    encoder: FeatureEncoder
    codec: VideoCodec | None

    def __call__(self, given: StepInput) -> Tensor:
        assert isinstance(self.family, SupportsTokenGrid)  # the plan refuses others
        latents = LatentShape(*given.clean.shape[1:])
        grid = self.family.token_grid(latents)
        with torch.no_grad(), Device.of(given.clean).autocast(None):
            if self.codec is None:
                assert given.frames is not None
                return self.encoder.encode(unit_range(given.frames), grid)
            chosen = token_frames(self.family, latents.frames, grid)
            # One clip after the other: a decoded clip is hundreds of times its latents.
            return torch.cat([self._decoded(self.codec, clip[None], chosen, grid) for clip in given.clean.unbind()])

    def _decoded(self, codec: VideoCodec, clip: Tensor, chosen: Sequence[int], grid: TokenGrid) -> Tensor:
        pixels = codec.decode(clip)
        # Not by a list of numbers as the index: it would be copied to the device, which waits for it.
        return self.encoder.encode(torch.stack([pixels[:, :, number] for number in chosen], 2), grid)


def open_teachers(plan: Plan, device: str, stack: ExitStack) -> Mapping[str, Teach]:
    """By regularizer, those that run at each step, in memory until `stack` closes. One codec serves them all.

    Raises ModelError.
    """
    online = [(name, part) for name, part in plan.regularizers if part.needs().features in ("decoded", "source")]
    decoding = [part for _, part in online if part.needs().features == "decoded"]
    codec = _codec(plan.family, decoding, device, stack) if decoding else None
    found: dict[str, Teach] = {}
    for name, part in online:
        assert isinstance(part, SupportsFeatures)
        encoder = stack.enter_context(part.open_feature_encoder(device))
        found[name] = Teacher(plan.family, encoder, codec if part in decoding else None)
    return found


def _codec(family: Family, decoding: list[Regularizer], device: str, stack: ExitStack) -> VideoCodec:
    codec = stack.enter_context(family.open_video_codec(device))
    if all(part.needs().decoder_only for part in decoding) and isinstance(codec, SupportsDecoderOnly):
        codec.drop_encoder()
    return codec
