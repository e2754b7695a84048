"""The rules of a regularizer that reads features of its own encoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from vtrain.contract import ClipShape, Regularizer, SupportsFeatures, TokenGrid
from vtrain.testing.draws import digest, gap, moving_picture
from vtrain.testing.memory import survivors


def encoding(regularizer: Regularizer) -> SupportsFeatures:
    """The regularizer, if it has an encoder; skips otherwise."""
    if regularizer.needs().features is None:
        pytest.skip("this regularizer asks for no features")
    assert isinstance(regularizer, SupportsFeatures), "features are asked for and SupportsFeatures is missing"
    return regularizer


class FeatureTests:
    """A frozen encoder of pictures, on small clips. Skipped by a regularizer that asks for no features.

    feature_tolerance: largest difference, relative to the largest value, between a frame encoded alone and among others.
    """

    patch: int
    pixels: int
    feature_tolerance: float = 1e-4

    if TYPE_CHECKING:

        def loaded(self, regularizer: Regularizer) -> nn.Module: ...

    def clips(self) -> Iterator[tuple[ClipShape, TokenGrid]]:
        """Small clips, wide and high, with their tokens, as a family of this patch and pixels has them."""
        edge = self.pixels * self.patch
        for frames, height, width in ((2, 2, 3), (1, 3, 2)):
            yield ClipShape(4 * frames - 3, height * edge, width * edge), TokenGrid(frames, height, width)

    def test_feature_arithmetic_equals_what_the_encoder_gives(self, regularizer: Regularizer) -> None:
        """feature_shape is the shape of what encode returns; features are finite and carry no gradient."""
        part = encoding(regularizer)
        with part.open_feature_encoder("cpu") as encoder:
            for clip, grid in self.clips():
                found = encoder.encode(moving_picture(clip._replace(frames=grid.frames), batch=2), grid)
                assert tuple(found.shape) == (2, *part.feature_shape(clip, grid)), f"{clip}: encode gave {found.shape}"
                assert found.isfinite().all()
                assert not found.requires_grad

    def test_features_are_of_the_frames_one_for_one(self, regularizer: Regularizer) -> None:
        """A clip's features are the same each time, alone and in a batch; another clip's are others."""
        part = encoding(regularizer)
        clip, grid = next(self.clips())
        frames = moving_picture(clip._replace(frames=grid.frames), batch=2)
        with part.open_feature_encoder("cpu") as encoder:
            together = encoder.encode(frames, grid)
            assert gap(encoder.encode(frames[:1], grid), together[:1]) <= self.feature_tolerance
            assert gap(encoder.encode(frames[1:], grid), together[1:]) <= self.feature_tolerance
            first = encoder.encode(frames[:, :, :1], grid._replace(frames=1))
            assert gap(first, together[:, :1]) <= self.feature_tolerance, "a frame's features depend on other frames"
            assert not torch.equal(together[0], together[1])

    def test_the_fingerprint_of_features_stays(self, regularizer: Regularizer) -> None:
        """feature_fingerprint gives the same text each time, and the storage type is fp32 or bf16."""
        part = encoding(regularizer)
        first, second = (part.feature_fingerprint(digest) for _ in range(2))
        assert first == second
        assert first
        assert part.feature_dtype in ("fp32", "bf16")

    def test_the_encoder_is_no_part_of_the_module_and_is_released(self, regularizer: Regularizer) -> None:
        """Nothing of the encoder is in memory after its with block, a module loaded before and after included."""
        part = encoding(regularizer)
        clip, grid = next(self.clips())
        frames = moving_picture(clip._replace(frames=grid.frames))
        module = self.loaded(regularizer)
        with part.open_feature_encoder("cpu") as encoder:
            if isinstance(encoder, nn.Module):
                own = {id(weight) for weight in module.parameters()}
                assert own.isdisjoint(map(id, encoder.parameters())), "the module shares the encoder's weights"
            del encoder
        left = survivors(lambda: part.open_feature_encoder("cpu"), lambda encoder: encoder.encode(frames, grid))
        assert not left, f"still in memory: {', '.join(left)}"
