"""Features are DINOv2's patch tokens, each where its part of the picture is."""

# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from vtrain.contract import ClipShape, ModelError, SupportsFeatures, TokenGrid
from vtrain_sanavideo.crepa import Crepa
from vtrain_sanavideo.crepa_encoder import MEAN, STD, Dinov2, imagenet
from vtrain_sanavideo.crepa_options import CrepaOptions
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.geometry import OFFICIAL_480P


def write_dino(folder: Path, *, flat: bool = False, registers: bool = False, dtype: str = "fp32") -> Path:
    """A tiny model in transformers' layout. flat: each patch's feature is a function of that patch alone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    model = (
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=3))  # type: ignore[arg-type]
        if registers
        else Dinov2Model(Dinov2Config(**sizes))  # type: ignore[arg-type]
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_scale" in name:
                weight.fill_(0.0 if flat else 1.0)
            elif "position_embeddings" in name and flat:
                weight.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dino(tmp_path_factory.mktemp("dino") / "model")


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dino(tmp_path_factory.mktemp("flat") / "model", flat=True)


def crepa(encoder: Path | str, **values: object) -> Crepa:
    return Crepa(CrepaOptions.model_validate({"encoder": str(encoder), "precision": "fp32", **values}))


def video(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def features(part: Crepa, frames: Tensor, grid: TokenGrid) -> Tensor:
    with part.open_feature_encoder("cpu") as encoder:
        return encoder.encode(frames, grid)


@pytest.mark.parametrize("registers", [False, True], ids=["plain", "registers"])
def test_features_are_transformers_own_patch_tokens(tmp_path: Path, registers: bool) -> None:
    folder = write_dino(tmp_path / "model", registers=registers)
    frames = video(2, 3, 3, 48, 80)
    pictures = imagenet(frames.transpose(1, 2).flatten(0, 1), 42, 70)
    kind, skipped = (Dinov2WithRegistersModel, 4) if registers else (Dinov2Model, 1)
    with torch.no_grad():
        states = kind.from_pretrained(folder).eval()(pictures).last_hidden_state
    assert states.shape[1] == skipped + 15
    wanted = states[:, skipped:].reshape(2, 3, 3, 5, 64)
    assert torch.allclose(features(crepa(folder), frames, TokenGrid(3, 3, 5)), wanted, atol=1e-5)


def test_frames_are_resized_as_pillow_resizes_pictures() -> None:
    """8 bits, bicubic with antialiasing, then ImageNet's mean and std: DINOv2's own preprocessing."""
    # Of a range that bicubic resampling does not leave: Pillow cuts at 0 and 255 after each direction.
    pixels = torch.randint(70, 186, (3, 96, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((140, 84), Image.Resampling.BICUBIC)
    wanted = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(84, 140, 3).permute(2, 0, 1) / 255
    found = imagenet(pixels[None] / 127.5 - 1, 84, 140)[0]
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    # It rounds to 8 bits after each direction.
    assert float((found * std + mean - wanted).abs().max()) < 1.5 / 255


def test_a_resized_frame_stays_in_the_range_of_a_picture() -> None:
    """Bicubic resampling overshoots at edges."""
    pixels = torch.full((1, 3, 32, 32), -1.0)
    pixels[..., 16:] = 1.0
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    found = imagenet(pixels, 28, 28)[0] * std + mean
    assert float(found.min()) == pytest.approx(0, abs=1e-6)
    assert float(found.max()) == pytest.approx(1, abs=1e-6)


def test_a_clip_gives_the_same_features_alone_and_among_others(dino: Path) -> None:
    frames = video(3, 3, 2, 32, 48)
    grid = TokenGrid(2, 2, 3)
    with crepa(dino, encoder_batch=4).open_feature_encoder("cpu") as encoder:
        together = encoder.encode(frames, grid)
        alone = torch.cat([encoder.encode(clip[None], grid) for clip in frames])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(features(crepa(dino, encoder_batch=1), frames, grid), together, atol=1e-5)


def test_features_of_the_cache_and_of_a_step_are_the_same(dino: Path) -> None:
    """Both come from the same encoder; only the storage type, fp32 here, is between them."""
    frames, grid = video(1, 3, 2, 32, 48), TokenGrid(2, 2, 3)
    cached, online = (crepa(dino, teacher=teacher, online_from="source") for teacher in ("cached", "online"))
    assert cached.needs().features == "cached"
    assert online.needs().features == "source"
    assert torch.equal(features(cached, frames, grid), features(online, frames, grid))
    same = features(crepa(dino, precision="bf16"), frames, grid)
    assert same.dtype == torch.bfloat16
    assert torch.allclose(same.float(), features(cached, frames, grid), atol=0.15)


@pytest.mark.parametrize("size", ["match", 56, 518, 224], ids=str)
@pytest.mark.parametrize("shape", [(48, 128), (128, 48)], ids=["wide", "high"])
@pytest.mark.parametrize("axis", [2, 3], ids=["top", "left"])
def test_half_a_picture_lands_on_that_half_of_the_tokens(
    flat: Path, size: str | int, shape: tuple[int, int], axis: int
) -> None:
    from vtrain_sanavideo.crepa_loss import on_tokens

    frames = torch.full((1, 3, 1, *shape), -1.0)
    frames.narrow(axis + 1, 0, shape[axis - 2] // 2).fill_(1.0)
    grid = TokenGrid(1, shape[0] // 16, shape[1] // 16)
    part = crepa(flat, size=size)
    with part.open_feature_encoder("cpu") as encoder:
        found = on_tokens(encoder.encode(frames, grid), grid.height, grid.width)[0, 0]
        white, black = (
            encoder.encode(torch.full_like(frames, value), grid)[0, 0, 0, 0].float() for value in (1.0, -1.0)
        )
    nearer = torch.cosine_similarity(found, white, dim=-1) > torch.cosine_similarity(found, black, dim=-1)
    length = nearer.shape[axis - 2]
    rows = nearer if axis == 2 else nearer.T
    for place in range(length):
        if place != length // 2 or length % 2 == 0:  # a middle token of an odd number has both halves
            assert bool((rows[place] == (place < length / 2)).all()), (place, rows)


@pytest.mark.parametrize("size", OFFICIAL_480P, ids=str)
def test_matched_features_are_on_the_tokens_grid_for_every_official_bucket(
    family: SanaVideoFamily, dino: Path, size: tuple[int, int]
) -> None:
    width, height = size
    clip = ClipShape(81, height, width)
    grid = family.token_grid(family.latent_shape(clip))
    shape = crepa(dino).feature_shape(clip, grid)
    assert shape == (21, height // 16, width // 16, 64)
    assert crepa(dino, size=518).feature_shape(clip, grid) == (21, 37, 37, 64)
    assert crepa(dino, size=224).feature_shape(clip, grid) == (21, 16, 16, 64)
    if (height, width) == (480, 832):
        assert shape[1:3] == (30, 52)


@pytest.mark.parametrize("given", [{}, {"size": 56}, {"pooling": True}, {"size": 42, "pooling": True}], ids=str)
@pytest.mark.parametrize("clip", [ClipShape(5, 32, 48), ClipShape(1, 80, 48), ClipShape(9, 16, 16)], ids=str)
def test_the_arithmetic_of_features_equals_what_the_encoder_gives(
    family: SanaVideoFamily, dino: Path, given: dict[str, object], clip: ClipShape
) -> None:
    part = crepa(dino, **given)
    assert isinstance(part, SupportsFeatures)
    grid = family.token_grid(family.latent_shape(clip))
    found = features(part, video(2, 3, grid.frames, clip.height, clip.width), grid)
    assert tuple(found.shape[1:]) == part.feature_shape(clip, grid)


def test_pooled_features_are_the_means_of_two_by_two(dino: Path) -> None:
    frames, grid = video(1, 3, 2, 64, 96), TokenGrid(2, 4, 6)
    plain, pooled = features(crepa(dino), frames, grid), features(crepa(dino, pooling=True), frames, grid)
    means = plain.view(1, 2, 2, 2, 3, 2, 64).mean(dim=(3, 5))
    assert torch.allclose(pooled, means, atol=1e-6)


def test_features_can_be_used_in_training_and_need_no_gradient(dino: Path) -> None:
    found = features(crepa(dino), video(1, 3, 1, 16, 16), TokenGrid(1, 1, 1))
    assert not found.requires_grad
    weight = torch.ones((), requires_grad=True)
    (found * weight).sum().backward()  # fails for tensors of inference mode
    assert weight.grad is not None


def test_autocast_around_it_changes_no_feature(dino: Path) -> None:
    frames, grid = video(1, 3, 1, 32, 32), TokenGrid(1, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = features(crepa(dino), frames, grid)
    assert torch.equal(inside, features(crepa(dino), frames, grid))


def test_frames_that_are_not_the_grids_are_refused(dino: Path) -> None:
    with crepa(dino).open_feature_encoder("cpu") as encoder:
        for frames in (video(1, 3, 3, 32, 32), video(1, 4, 2, 32, 32), video(3, 2, 32, 32)):
            with pytest.raises(ValueError, match="frames are"):
                encoder.encode(frames, TokenGrid(2, 2, 2))


def test_after_the_with_block_the_encoder_is_gone(dino: Path) -> None:
    with Dinov2(CrepaOptions(encoder=str(dino))).open("cpu") as encode:
        seen = weakref.ref(encode._model)
    gc.collect()
    assert seen() is None
    with pytest.raises(RuntimeError, match="closed"):
        encode(video(1, 3, 14, 14), TokenGrid(1, 1, 1))


def test_a_fingerprint_changes_with_whatever_changes_features(
    dino: Path, tmp_path: Path, sha256: Callable[[Path], str]
) -> None:
    plain = crepa(dino).feature_fingerprint(sha256)
    assert plain == crepa(dino, encoder_batch=2, weight=2.0, teacher="online", block=3).feature_fingerprint(sha256)
    others = [
        crepa(dino, **given).feature_fingerprint(sha256)
        for given in ({"size": 56}, {"size": 224}, {"pooling": True}, {"precision": "bf16"})
    ]
    others.append(crepa(write_dino(tmp_path / "flat", flat=True)).feature_fingerprint(sha256))
    others.append(crepa(write_dino(tmp_path / "reg", registers=True)).feature_fingerprint(sha256))
    assert len({plain, *others}) == len(others) + 1
    assert plain == crepa(write_dino(tmp_path / "elsewhere")).feature_fingerprint(sha256)


def test_weights_that_do_not_fit_the_config_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_dino(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state.pop("layernorm.weight")
    state["odd"] = torch.zeros(1)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layernorm\.weight is missing.*odd is unexpected"):
        features(crepa(folder), video(1, 3, 1, 16, 16), TokenGrid(1, 1, 1))


def test_another_encoder_takes_dinov2s_place() -> None:
    """What a third party writes: 7 x 7 features of any frozen network, here the colours' means."""
    from collections.abc import Iterator, Sequence
    from contextlib import contextmanager

    from vtrain.contract import HashFile, Problem
    from vtrain_sanavideo.crepa_encoder import EncodePictures

    class Colours:
        width = 3

        def grid(self, tokens: TokenGrid) -> tuple[int, int]:
            return 7, 7

        def fingerprint(self, hash_file: HashFile) -> str:
            return "colours 1"

        def check(self) -> Sequence[Problem]:
            return ()

        def describe(self) -> str:
            return "means of colours"

        @contextmanager
        def open(self, device: str) -> Iterator[EncodePictures]:
            yield lambda pictures, tokens: torch.nn.functional.adaptive_avg_pool2d(pictures, 7).permute(0, 2, 3, 1)

    part = Crepa(CrepaOptions(block=0, precision="fp32"), Colours())
    grid = TokenGrid(2, 3, 5)
    found = features(part, video(2, 3, 2, 48, 80), grid)
    assert tuple(found.shape[1:]) == part.feature_shape(ClipShape(5, 48, 80), grid) == (2, 7, 7, 3)
    module = part.load({0: 12})
    assert [tuple(weight.shape) for weight in module.parameters()][-2] == (3, 12)
    assert part.check([(ClipShape(5, 48, 80), grid)]) == []
    assert ("encoder", "means of colours") in part.describe()
    assert part.feature_memory(1, ClipShape(5, 48, 80), grid) is None, "it does not say what it takes"
