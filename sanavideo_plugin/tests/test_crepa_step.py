"""CREPA on SANA-Video's own transformer, and the codec whose encoding half is let go of."""

# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vtrain.contract import (
    ClipShape,
    Condition,
    LatentShape,
    NoiseLevel,
    Regularizer,
    RunLength,
    Spec,
    StepView,
    SupportsDecoderOnly,
    Text,
)
from vtrain.testing import RegularizerTests, SpecTests
from vtrain_sanavideo.crepa import Crepa
from vtrain_sanavideo.crepa_options import CrepaOptions
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.plugin import CREPA


def crepa(encoder: Path, **values: object) -> Crepa:
    return Crepa(CrepaOptions.model_validate({"block": 1, "encoder": str(encoder), **values}))


EXPECTED = frozenset(
    {
        "SupportsCheck",
        "SupportsFeatureMemory",
        "SupportsFeatures",
        "SupportsFeedback",
        "SupportsLearningRate",
        "SupportsPauses",
    }
)
"""What CREPA and its module are meant to be able to do."""


class TestCached(RegularizerTests):
    expects = EXPECTED

    @pytest.fixture(scope="class")
    @classmethod
    def regularizer(cls, dino: Path) -> Regularizer:
        return crepa(dino)


class TestSquare(RegularizerTests):
    expects = EXPECTED

    @pytest.fixture(scope="class")
    @classmethod
    def regularizer(cls, dino: Path) -> Regularizer:
        return crepa(dino, size=56, pooling=True, adjacent_distance=2, cumulative_neighbors=True, teacher="online")


class TestScheduled(RegularizerTests):
    step = 30
    expects = EXPECTED

    @pytest.fixture(scope="class")
    @classmethod
    def regularizer(cls, dino: Path) -> Regularizer:
        schedule = {"decay": "cosine", "warmup": "20 steps", "threshold": 0.9, "threshold_mode": "recoverable"}
        return crepa(dino, projector={"layers": 2, "hidden": 8}, schedule=schedule)


class TestCrepaSpec(SpecTests):
    table: Mapping[str, object] = {"schedule": {"decay": "cosine", "cutoff": "300 steps"}, "size": 518}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return CREPA


def gradients(
    family: SanaVideoFamily, part: Crepa, *, checkpointing: bool
) -> tuple[float, dict[str, Tensor], nn.Module]:
    """Flow loss and CREPA on two clips of random numbers: the value and each gradient of model and projector."""
    denoiser = family.load_denoiser("cpu", "fp32")
    denoiser.module.requires_grad_(True).train()
    denoiser.gradient_checkpointing(checkpointing)
    torch.manual_seed(0)
    module = part.load({1: family.block_width})
    clip = ClipShape(9, 64, 96)
    latents = family.latent_shape(clip)
    grid = family.token_grid(latents)
    draw = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(2, *latents, generator=draw) for _ in range(2))
    with part.open_feature_encoder("cpu") as encoder:
        features = encoder.encode(torch.rand(2, 3, grid.frames, 64, 96, generator=draw) * 2 - 1, grid)
    level = NoiseLevel(torch.tensor([0.3, 0.8]), torch.tensor([300.0, 800.0]))
    condition = Condition(Text.of(torch.randn(2, 5, 64, generator=draw), torch.ones(2, 5, dtype=torch.bool)))
    taps: dict[int, Tensor] = {}
    hook = denoiser.blocks[1].register_forward_hook(lambda _, __, out: taps.__setitem__(1, out))
    noisy = 0.5 * (clean + noise)
    prediction = denoiser.predict(noisy, level, condition)
    hook.remove()
    folded = {1: denoiser.fold(taps[1], LatentShape(*latents))}
    none = torch.zeros(())
    view = StepView(
        clean, noise, noisy, none, prediction, level, condition, folded, 0, RunLength(10, 5.0), None, features
    )
    term = module(view)
    ((prediction - (noise - clean)).square().mean() + term.value).backward()
    named = [*denoiser.module.named_parameters(), *module.named_parameters()]
    return (
        float(term.value.detach()),
        {name: value.grad for name, value in named if value.grad is not None},
        denoiser.module,
    )


def test_checkpointing_changes_no_gradient(family: SanaVideoFamily, dino: Path) -> None:
    value, plain, model = gradients(family, crepa(dino), checkpointing=False)
    again, checkpointed, _ = gradients(family, crepa(dino), checkpointing=True)
    assert value == again != 0
    assert plain.keys() == checkpointed.keys()
    assert plain.keys() >= {name for name, _ in model.named_parameters()}
    assert any(name.startswith("projector.") for name in plain)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_only_blocks_up_to_the_aligned_one_are_pulled(family: SanaVideoFamily, dino: Path) -> None:
    """A change of the weight changes gradients of blocks 0 and 1, and of nothing after."""
    _, weak, _ = gradients(family, crepa(dino, weight=0.5), checkpointing=False)
    _, strong, _ = gradients(family, crepa(dino, weight=5.0), checkpointing=False)

    def changed(prefix: str) -> bool:
        return any(not torch.equal(weak[name], strong[name]) for name in weak if name.startswith(prefix))

    assert [changed(f"transformer_blocks.{number}.") for number in range(4)] == [True, True, False, False]
    assert changed("projector.")
    assert changed("patch_embedding.")
    assert not changed("proj_out.")


def test_one_frame_of_features_comes_for_each_frame_of_tokens(family: SanaVideoFamily, dino: Path) -> None:
    clip = ClipShape(9, 64, 96)
    grid = family.token_grid(family.latent_shape(clip))
    assert grid.frames == 3
    assert crepa(dino).feature_shape(clip, grid).frames == 3


def test_without_its_encoding_half_the_codec_decodes_the_same_bits(family: SanaVideoFamily) -> None:
    latents = torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    with family.open_video_codec("cpu") as codec:
        assert isinstance(codec, SupportsDecoderOnly)
        whole = codec.decode(latents)
        assert codec._vae is not None
        gone = [weakref.ref(module) for module in (codec._vae.encoder, codec._vae.quant_conv)]
        before = sum(weight.numel() for weight in codec._vae.parameters())
        codec.drop_encoder()
        gc.collect()
        assert all(module() is None for module in gone)
        assert sum(weight.numel() for weight in codec._vae.parameters()) < before
        assert torch.equal(codec.decode(latents), whole)
        assert torch.equal(codec.decode(latents), whole)
        with pytest.raises(RuntimeError, match="has let go of what encodes"):
            codec.encode(torch.zeros(1, 3, 5, 32, 32))
        codec.drop_encoder()
        assert torch.equal(codec.decode(latents), whole)


def test_a_tiling_codec_decodes_the_same_without_its_encoding_half(checkpoint: Path) -> None:
    from vtrain_sanavideo.options import SanaVideoOptions

    family = SanaVideoFamily(SanaVideoOptions.model_validate({"path": str(checkpoint), "vae_tiling": True}))
    latents = torch.randn(1, 16, 1, 36, 36, generator=torch.Generator().manual_seed(0))
    with family.open_video_codec("cpu") as codec:
        whole = codec.decode(latents)
        codec.drop_encoder()
        assert torch.equal(codec.decode(latents), whole)
