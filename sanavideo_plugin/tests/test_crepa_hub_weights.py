"""torch hub's own DINOv2 files give torch hub's own features; nothing in such a file is ever run."""

# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from vtrain.contract import ClipShape, ModelError, TokenGrid
from vtrain_sanavideo.crepa import Crepa
from vtrain_sanavideo.crepa_encoder import imagenet
from vtrain_sanavideo.crepa_options import CrepaOptions


def crepa(encoder: Path | str, **values: object) -> Crepa:
    return Crepa(CrepaOptions.model_validate({"encoder": str(encoder), "precision": "fp32", **values}))


def video(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def features(part: Crepa, frames: Tensor, grid: TokenGrid) -> Tensor:
    with part.open_feature_encoder("cpu") as encoder:
        return encoder.encode(frames, grid)


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

    from vtrain_sanavideo.crepa_source import renamed

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
    from vtrain_sanavideo import crepa_source

    victim, path = tmp_path / "victim", tmp_path / "dinov2.pth"
    model_of = crepa_source.read_model
    torch.save(hub_state(), path)
    model = model_of(path)
    torch.save({**hub_state(), "more": Hostile(victim)}, path)
    (problem,) = crepa(path).check([])
    assert "which is no tensor" in problem.what
    with pytest.raises(ModelError, match="cannot be loaded"):
        crepa_source.load(path, model)
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
