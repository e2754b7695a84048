"""What DINOv2 takes: measured again on fake tensors, against the stored figures and against what CREPA says of others."""

# transformers' models are untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, unused-ignore"
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from vtrain.contract import ClipShape, DType, TokenGrid
from vtrain.testing.memory import MemoryPeak
from vtrain_sanavideo import crepa_source
from vtrain_sanavideo.crepa import Crepa, CrepaTeacher
from vtrain_sanavideo.crepa_encoder import MEASURED, Dinov2, _AtWork, imagenet
from vtrain_sanavideo.crepa_options import CrepaOptions
from vtrain_sanavideo.crepa_source import DinoConfig, DinoSource

GIANT = {"use_swiglu_ffn": True}


@contextmanager
def fake(width: int, precision: DType, *, registers: int = 0, **more: object) -> Iterator[Any]:
    """DINOv2 of this width and two blocks without numbers, for as long as tensors are fake."""
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": width // 64, "image_size": 518}
    sizes |= {"patch_size": 14, **more}
    torch.set_default_dtype(torch.float32 if precision == "fp32" else torch.bfloat16)
    try:
        with torch.device("meta"):
            model: Any = (
                Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers))
                if registers
                else Dinov2Model(Dinov2Config(**sizes))
            )
    finally:
        torch.set_default_dtype(torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield model.eval().to_empty(device="cpu")


def counted(model: Any, given: Tensor, work: Any) -> int:
    """Bytes at the peak of `work`, without weights and what it is given."""
    with torch.no_grad(), MemoryPeak() as memory:
        memory.count([given, *model.parameters()] if model is not None else [given], "there")
        kept, there = work(given), memory.now["there"]
    del kept
    return memory.peak - there


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("width", "more"), [(384, {}), (1536, GIANT)])
def test_the_stored_work_of_dinov2_is_what_is_measured(
    width: int, more: Mapping[str, object], precision: DType
) -> None:
    """By tokens, of which there are 16 x 24 more in each picture, 4 together."""
    with fake(width, precision, **more) as model:
        encode = _AtWork(model, 1, 14, lambda tokens: (tokens.height, tokens.width))
        few, many = (
            counted(
                model,
                torch.zeros(4, 3, 14 * high, 14 * 24),
                lambda given, high=high: encode(given, TokenGrid(1, high, 24)),
            )
            for high in (16, 32)
        )
    assert MEASURED[f"{width} dinov2 14 x4"][precision] == [pytest.approx((many - few) / (4 * 16 * 24), rel=0.02)]


def test_the_stored_work_of_making_pictures_ready_is_what_is_measured() -> None:
    with FakeTensorMode():
        same = counted(None, torch.zeros(2, 3, 140, 70), lambda given: imagenet(given, 140, 70))
        smaller = counted(None, torch.zeros(2, 3, 640, 320), lambda given: imagenet(given, 140, 70))
    assert MEASURED["dinov2 pictures"]["fp32"] == pytest.approx(
        [smaller / (2 * 640 * 320), same / (2 * 140 * 70)], rel=0.01
    )


@pytest.mark.parametrize(
    ("width", "more", "precision", "values", "clips", "grid", "edge"),
    [
        (768, {"registers": 4}, "bf16", {}, 1, TokenGrid(5, 26, 15), 32),
        (1024, {}, "fp32", {"encoder_batch": 3}, 2, TokenGrid(7, 15, 26), 32),
        (1536, GIANT, "bf16", {}, 1, TokenGrid(21, 15, 26), 32),
        (1536, GIANT, "bf16", {"size": 518}, 1, TokenGrid(13, 15, 26), 32),
        (768, {}, "fp32", {"size": 224, "pooling": True}, 1, TokenGrid(2, 15, 26), 32),
        (64, {}, "fp32", {}, 3, TokenGrid(3, 4, 6), 16),
    ],
)  # fmt: skip
def test_what_crepa_says_is_within_15_per_cent_of_what_its_encoder_takes(
    width: int, more: dict[str, Any], precision: DType, values: dict[str, object], clips: int, grid: TokenGrid, edge: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of widths, clips, sizes and numbers of frames at once none of which but widths 1536 was measured."""
    registers = more.get("registers", 0)
    config = DinoConfig(model_type="dinov2", hidden_size=width, patch_size=14, num_register_tokens=registers)
    monkeypatch.setattr(DinoSource, "config", config)
    monkeypatch.setattr(DinoSource, "numbers", 1000)
    options = CrepaOptions.model_validate({"encoder": "dinov2_vitb14", "precision": precision, **values})
    encoder = Dinov2(options)
    clip = ClipShape(4 * grid.frames - 3, grid.height * edge, grid.width * edge)
    said = Crepa(options).feature_memory(clips, clip, grid)
    assert said is not None
    assert said.encode is not None
    assert said.weights == 1000 * (2 if precision == "bf16" else 4)
    with fake(width, precision, **more) as model:
        teacher = CrepaTeacher(_AtWork(model, 1 + registers, 14, encoder.grid), options)
        frames = torch.zeros(clips, 3, grid.frames, *clip[1:])
        found = counted(model, frames, lambda given: teacher.encode(given, grid))
    assert said.encode.of(clip) == pytest.approx(found, rel=0.15)


def test_its_weights_are_those_of_the_files(dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the storage type of the options; of weights that are yet to be fetched nothing is said."""
    clip, grid = ClipShape(9, 64, 96), TokenGrid(3, 2, 3)
    parameters = sum(each.numel() for each in Dinov2Model.from_pretrained(dino).parameters())
    for precision, size in (("fp32", 4), ("bf16", 2)):
        part = Crepa(CrepaOptions.model_validate({"encoder": str(dino), "precision": precision}))
        found = part.feature_memory(1, clip, grid)
        assert found is not None
        assert found.weights == size * parameters
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((dino / "config.json").read_bytes())
    assert Crepa(CrepaOptions.model_validate({"encoder": str(bare)})).feature_memory(1, clip, grid) is None


def test_weights_of_torch_hubs_file_are_counted_by_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    small = crepa_source.HubModel(width=384, layers=12, mlp=1536, swiglu=False, registers=0, patch=14, image=518)
    monkeypatch.setattr(DinoSource, "hub_model", small)
    assert DinoSource("/somewhere/dinov2.pth").numbers == sum(map(prod, small.shapes().values())) == 22_056_576
