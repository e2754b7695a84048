"""Features are DINOv2's patch tokens, each where its part of the picture is."""

# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
from __future__ import annotations

import gc
import io
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
    from vtrain_sanavideo.crepa_encoder import Encode

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
        def open(self, device: str) -> Iterator[Encode]:
            yield lambda pictures, tokens: torch.nn.functional.adaptive_avg_pool2d(pictures, 7).permute(0, 2, 3, 1)

    part = Crepa(CrepaOptions(block=0, precision="fp32"), Colours())
    grid = TokenGrid(2, 3, 5)
    found = features(part, video(2, 3, 2, 48, 80), grid)
    assert tuple(found.shape[1:]) == part.feature_shape(ClipShape(5, 48, 80), grid) == (2, 7, 7, 3)
    module = part.load({0: 12})
    assert [tuple(weight.shape) for weight in module.parameters()][-2] == (3, 12)
    assert part.check([(ClipShape(5, 48, 80), grid)]) == []
    assert ("encoder", "means of colours") in part.describe()


# torch hub's own files


def hub_state(*, swiglu: bool = False, registers: int = 0, width: int = 128) -> dict[str, Tensor]:
    """Random weights as torch hub's DINOv2 has them: 2 blocks, patches of 14, trained on 70 x 70."""
    draw = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) * 0.1

    inner = (int(width * 4 * 2 / 3) + 7) // 8 * 8 if swiglu else 4 * width
    state = {"cls_token": weight(1, 1, width), "pos_embed": weight(1, 26, width)}
    if registers:
        state["register_tokens"] = weight(1, registers, width)
    state |= {"mask_token": weight(1, width), "patch_embed.proj.weight": weight(width, 3, 14, 14)}
    state["patch_embed.proj.bias"] = weight(width)
    for number in range(2):
        shapes = {"norm1.weight": (width,), "norm1.bias": (width,), "attn.qkv.weight": (3 * width, width)}
        shapes |= {"attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
        shapes |= {"ls1.gamma": (width,), "norm2.weight": (width,), "norm2.bias": (width,)}
        if swiglu:
            shapes |= {"mlp.w12.weight": (2 * inner, width), "mlp.w12.bias": (2 * inner,)}
            shapes |= {"mlp.w3.weight": (width, inner), "mlp.w3.bias": (width,)}
        else:
            shapes |= {"mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,)}
            shapes |= {"mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,)}
        shapes["ls2.gamma"] = (width,)
        state |= {f"blocks.{number}.{name}": weight(*shape) for name, shape in shapes.items()}
    return state | {"norm.weight": weight(width) + 1, "norm.bias": weight(width)}


def hub_patches(state: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """forward_features(x)["x_norm_patchtokens"] of torch hub's DINOv2, written from its paper and names. 70 x 70 alone."""
    from torch.nn import functional as F

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    patches = F.conv2d(pictures, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    x = patches.flatten(2).transpose(1, 2)
    n, _, width = x.shape
    x = torch.cat([state["cls_token"].expand(n, -1, -1), x], 1) + state["pos_embed"]
    registers = state.get("register_tokens", torch.zeros(1, 0, width))
    x = torch.cat([x[:, :1], registers.expand(n, -1, -1), x[:, 1:]], 1)
    for number in range(2):
        at = f"blocks.{number}"
        q, k, v = (
            linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").view(n, -1, 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        )
        mixed = ((q / 8) @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + state[f"{at}.ls1.gamma"] * linear(mixed.transpose(1, 2).reshape(n, -1, width), f"{at}.attn.proj")
        inside = norm(x, f"{at}.norm2")
        if f"{at}.mlp.w3.weight" in state:
            gate, value = linear(inside, f"{at}.mlp.w12").chunk(2, -1)
            inside = linear(F.silu(gate) * value, f"{at}.mlp.w3")
        else:
            inside = linear(F.gelu(linear(inside, f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
        x = x + state[f"{at}.ls2.gamma"] * inside
    return norm(x, "norm")[:, 1 + registers.shape[1] :].unflatten(1, (5, 5))


@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_torch_hubs_weights_give_torch_hubs_patch_tokens(tmp_path: Path, swiglu: bool, registers: int) -> None:
    state = hub_state(swiglu=swiglu, registers=registers)
    torch.save(state, tmp_path / "dinov2.pth")
    frames = video(1, 3, 2, 80, 80)
    wanted = hub_patches(state, imagenet(frames.transpose(1, 2).flatten(0, 1), 70, 70))
    part = crepa(tmp_path / "dinov2.pth")
    found = features(part, frames, TokenGrid(2, 5, 5))
    assert torch.allclose(found[0], wanted, atol=2e-4)
    assert float((wanted[0] - wanted[1]).abs().max()) > 0.05
    assert part.feature_shape(ClipShape(5, 80, 80), TokenGrid(2, 5, 5)) == (2, 5, 5, 128)
    assert part.check([]) == []


@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_converted_weights_have_the_names_that_transformers_publishes(
    tmp_path: Path, swiglu: bool, registers: int
) -> None:
    from safetensors.torch import load_file

    from vtrain_sanavideo.crepa_hub_weights import renamed

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    model = (
        Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**sizes, use_swiglu_ffn=swiglu, num_register_tokens=registers)  # type: ignore[arg-type]
        )
        if registers
        else Dinov2Model(Dinov2Config(**sizes, use_swiglu_ffn=swiglu))  # type: ignore[arg-type]
    )
    model.save_pretrained(tmp_path / "model")
    published = {name: value.shape for name, value in load_file(tmp_path / "model" / "model.safetensors").items()}
    ours = {name: value.shape for name, value in renamed(hub_state(swiglu=swiglu, registers=registers))}
    assert ours == published


def test_torch_hubs_weights_saved_as_parameters_are_read_too(tmp_path: Path) -> None:
    state = {name: torch.nn.Parameter(value) for name, value in hub_state().items()}
    torch.save(state, tmp_path / "dinov2.pth")
    assert crepa(tmp_path / "dinov2.pth").check([]) == []
    assert features(crepa(tmp_path / "dinov2.pth"), video(1, 3, 1, 16, 16), TokenGrid(1, 1, 1)).isfinite().all()


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.victim,)


def test_a_hostile_pth_file_is_refused_by_the_plan_and_never_run(tmp_path: Path) -> None:
    from vtrain_sanavideo import crepa_hub_weights

    victim, path = tmp_path / "victim", tmp_path / "dinov2.pth"
    model_of = crepa_hub_weights.read_model
    torch.save(hub_state(), path)
    model = model_of(path)
    torch.save({**hub_state(), "more": Hostile(victim)}, path)
    (problem,) = crepa(path).check([])
    assert "which is no tensor" in problem.what
    with pytest.raises(ModelError, match="cannot be loaded"):
        crepa_hub_weights.load(path, model)
    with pytest.raises(ModelError, match="which is no tensor"):
        features(crepa(path), video(1, 3, 1, 16, 16), TokenGrid(1, 1, 1))
    assert not victim.exists()
    torch.load(path, weights_only=False)  # shows that it would have acted
    assert victim.exists()


def broken_files() -> dict[str, tuple[bytes, str]]:
    """Name -> (bytes, what the plan says)."""

    def written(content: object) -> bytes:
        out = io.BytesIO()
        torch.save(content, out)
        return out.getvalue()

    whole = hub_state()
    short = {name: value for name, value in whole.items() if name != "blocks.1.norm2.bias"}
    wrong = {**whole, "blocks.0.attn.proj.weight": torch.zeros(128, 64)}
    return {
        "text": (b"no weights at all", "no dictionary of tensors"),
        "empty": (b"", "no dictionary of tensors"),
        "truncated": (written(whole)[:5000], "no dictionary of tensors"),
        "other model": (written({"weight": torch.zeros(3, 3)}), "not torch hub's weights of DINOv2"),
        "wrapped": (written({"model": whole}), "not torch hub's weights of DINOv2"),
        "one missing": (written(short), "blocks.1.norm2.bias is missing"),
        "one of another shape": (written(wrong), "blocks.0.attn.proj.weight is [128, 64] instead of [128, 128]"),
        "one more": (written({**whole, "head.weight": torch.zeros(2)}), "head.weight is unexpected"),
        "odd width": (written(hub_state(width=96)), "96 is not a multiple of 64"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_pth_file_that_is_not_dinov2s_is_named_in_the_plan(tmp_path: Path, name: str) -> None:
    content, words = broken_files()[name]
    path = tmp_path / "dinov2.pth"
    path.write_bytes(content)
    (problem,) = crepa(path).check([])
    assert words in problem.what
    assert str(path) in problem.what
