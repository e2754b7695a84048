"""The regularizer `crepa`: hidden states of a block are aligned with a frozen encoder's features of neighbouring frames.

Cross-frame Representation Alignment, arXiv 2506.09229. It knows no family: taps and features come to it, folded to tokens.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vtrain.contract import (
    ClipBytes,
    ClipShape,
    Device,
    DType,
    EncoderMemory,
    FeatureShape,
    FeatureSource,
    HashFile,
    Needs,
    Problem,
    RunLength,
    TokenGrid,
    torch_type,
)
from vtrain.contract.measured import dtype_bytes
from vtrain_sanavideo.crepa_encoder import Dinov2, EncodePictures, Encoder, KnowsMemory
from vtrain_sanavideo.crepa_options import CrepaOptions, Schedule

if TYPE_CHECKING:
    from torch import Tensor, nn

VERSION = "crepa features 1"
"""Of how features are made from an encoder: a new one makes all of them anew."""


class Crepa:
    """A Regularizer, SupportsFeatures, SupportsFeatureMemory, SupportsCheck, SupportsWeight.

    encoder: takes the place of the one that the options name.
    """

    def __init__(self, options: CrepaOptions, encoder: Encoder | None = None) -> None:
        self._options = options
        self._encoder = encoder or Dinov2(options)

    def needs(self) -> Needs:
        return Needs(
            taps=(self._options.block,),
            features=self._features_from,
            decoder_only=self._options.drop_vae_encoder,
        )

    @property
    def _features_from(self) -> FeatureSource:
        if self._options.teacher == "cached":
            return "cached"
        return "decoded" if self._options.online_from == "latents" else "source"

    @property
    def feature_dtype(self) -> DType:
        return self._options.precision

    def feature_shape(self, clip: ClipShape, grid: TokenGrid) -> FeatureShape:
        height, width = self._encoder.grid(grid)
        if self._options.pooling:
            height, width = pooled(height), pooled(width)
        return FeatureShape(grid.frames, height, width, self._encoder.width)

    def feature_memory(self, clips: int, clip: ClipShape, grid: TokenGrid) -> EncoderMemory | None:
        """SupportsFeatureMemory: of `encoder_batch` frames at once, and of the features of all of them."""
        frames = clips * grid.frames
        if not isinstance(self._encoder, KnowsMemory):
            return None
        found = self._encoder.memory(min(self._options.encoder_batch, frames), clip, grid)
        if found is None:
            return None
        weights, work = found
        features = clips * math.prod(self.feature_shape(clip, grid)) * dtype_bytes(self._options.precision)
        area = clip.height * clip.width
        # Features wait in parts, and are there twice when these are put together. Frames of several clips are put in one row.
        row = 12 * frames * area if clips > 1 else 0
        return EncoderMemory(weights, ClipBytes(max(work, features) / area, (features + row) / (area * clip.frames)))

    def feature_fingerprint(self, hash_file: HashFile) -> str:
        parts = [VERSION, self._encoder.fingerprint(hash_file), self._options.pooling, self._options.precision]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @contextmanager
    def open_feature_encoder(self, device: str) -> Iterator[CrepaTeacher]:
        with self._encoder.open(device) as encode:
            yield CrepaTeacher(encode, self._options)

    def weight_at(self, step: int, run: RunLength) -> float:
        """SupportsWeight: as the schedule alone has it; the similarity's threshold may end it before."""
        return Schedule(self._options.weight, self._options.schedule).weight(step, run)

    def load(self, tap_widths: Mapping[int, int]) -> nn.Module:
        """A CrepaLoss."""
        from vtrain_sanavideo.crepa_loss import CrepaLoss

        return CrepaLoss(self._options, tap_widths[self._options.block], self._encoder.width)

    def check(self, clips: Sequence[tuple[ClipShape, TokenGrid | None]]) -> Sequence[Problem]:
        problems = list(self._encoder.check())
        longest = max((grid.frames for _, grid in clips if grid is not None), default=0)
        distance = self._options.adjacent_distance
        if longest and distance >= longest:
            frames = f"{longest} frame{'s' if longest > 1 else ''} of tokens"
            reach = f"no two are more than {longest - 1} apart" if longest > 1 else "no frame has a neighbour"
            what = f"adjacent_distance is {distance}, and the longest clip has {frames}: {reach}."
            remedy = f"Write at most {longest - 1}; 0 aligns each frame with itself alone."
            problems.append(Problem("", what, remedy))
        return problems

    def warnings(self) -> Sequence[str]:
        options = self._options
        found = [f"schedule.{key} has no effect." for key in Schedule(options.weight, options.schedule).idle_keys()]
        if options.drop_vae_encoder and self._features_from != "decoded":
            found.append(f"drop_vae_encoder has no effect: {self._resident()}.")
        if options.teacher == "cached" and "online_from" in options.model_fields_set:
            found.append('online_from has no effect with teacher = "cached".')
        if options.projector.layers == 1 and options.projector.hidden is not None:
            found.append("projector.hidden has no effect with one layer.")
        if not options.adjacent_distance and "temporal_decay" in options.model_fields_set:
            found.append("temporal_decay has no effect with an adjacent_distance of 0.")
        if options.encoder_revision is not None and Path(options.encoder).is_absolute():
            found.append("encoder_revision has no effect: it is of a hub id, and encoder is a file or folder here.")
        if options.cumulative_neighbors and options.adjacent_distance < 2:
            found.append("cumulative_neighbors has no effect with an adjacent_distance below 2.")
        return found

    def describe(self) -> Sequence[tuple[str, str]]:
        options = self._options
        layers, hidden = options.projector.layers, options.projector.hidden or "the block's width (at most 1024)"
        inner = f", {hidden} between them" if layers > 1 else ""
        pooling = ", pooled 2x2" if options.pooling else ""
        return (
            ("aligned", f"block {options.block}, {self._frames()}, weight {options.weight:g}"),
            ("schedule", Schedule(options.weight, options.schedule).describe()),
            ("encoder", f"{self._encoder.describe()}{pooling}"),
            ("teacher", f"{options.teacher}: {self._resident()}"),
            (
                "projector",
                f"MLP of {layers} linear layer{'s' if layers > 1 else ''}{inner}, fp32, "
                f"learning rate x {options.projector.lr_factor:g}",
            ),
        )

    def _frames(self) -> str:
        distance = self._options.adjacent_distance
        if not distance:
            return "each frame with itself"
        reach = f"1 to {distance}" if self._options.cumulative_neighbors and distance > 1 else f"{distance}"
        return f"each frame with itself and those {reach} away (tau {self._options.temporal_decay:g})"

    def _resident(self) -> str:
        """What stays in memory while training."""
        if self._features_from == "cached":
            return "neither the encoder nor the video codec is in memory while training"
        if self._features_from == "source":
            return "the encoder stays in memory while training, the video codec does not"
        half = "the half of the video codec that decodes" if self._options.drop_vae_encoder else "the whole video codec"
        return f"the encoder and {half} stay in memory while training"


class CrepaTeacher:
    """A FeatureEncoder: an encoder on a clip's frames, a few at a time, pooled if the options say so."""

    def __init__(self, encode: EncodePictures, options: CrepaOptions) -> None:
        self._encode = encode
        self._options = options

    def encode(self, frames: Tensor, grid: TokenGrid) -> Tensor:
        """In the storage type of the options. Raises ValueError for frames that are not the grid's."""
        import torch

        if frames.ndim != 5 or frames.shape[1] != 3 or frames.shape[2] != grid.frames:
            raise ValueError(f"frames are (B, 3, {grid.frames}, H, W), not {tuple(frames.shape)}")
        pictures = frames.transpose(1, 2).flatten(0, 1)
        with torch.no_grad(), Device.of(frames).autocast(None):
            parts = [self._some(some, grid) for some in pictures.split(self._options.encoder_batch)]
            features: Tensor = torch.cat(parts).unflatten(0, (frames.shape[0], grid.frames))
        return features

    def _some(self, pictures: Tensor, grid: TokenGrid) -> Tensor:
        """Features (N, h', w', D') of N pictures."""
        found = self._encode(pictures, grid)
        if self._options.pooling:
            from torch.nn import functional as F

            size = pooled(found.shape[1]), pooled(found.shape[2])
            # Means in fp32, rounded once to the storage type.
            found = F.adaptive_avg_pool2d(found.float().permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
        return found.to(torch_type(self._options.precision))


def pooled(edge: int) -> int:
    """How many means of two a row of features gives. An odd row is divided evenly, its means overlap."""
    return (edge + 1) // 2
