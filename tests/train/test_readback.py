"""What was written is compared with what was trained, from the bytes that sealing a checkpoint reads."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vtrain.contract import CheckpointError
from vtrain.train import readback
from vtrain.train.adapter import changes_nothing
from vtrain.train.checkpoint import State, write
from vtrain.train.parameters import add_lora, lora_state
from vtrain.train.pieces import AdapterPiece
from vtrain.train.readback import difference, read_through, remarks, sums_of


@dataclass(frozen=True)
class Written:
    """A piece whose files hold other content than was gathered, by `change`."""

    change: Callable[[torch.Tensor], torch.Tensor]
    name: ClassVar[str] = "weights"
    files: ClassVar[tuple[str, ...]] = ("weights.safetensors",)
    bytes: ClassVar[int] = 48

    def gather(self, *, keep: bool) -> State:
        return State({"first": torch.arange(8.0), "second": torch.ones(2, 2)})

    def write(self, folder: Path, state: State) -> None:
        save_file(
            {f"renamed.{name}": self.change(value) for name, value in state.tensors.items()}, folder / self.files[0]
        )

    def load(self, folder: Path) -> None: ...

    def remarks(self, folder: Path) -> Iterator[str]:
        yield f"{len(load_file(folder / self.files[0]))} tensors"


def test_a_checkpoint_with_other_content_than_was_trained_is_none(tmp_path: Path) -> None:
    good = write(tmp_path, 1, [Written(torch.clone)])
    assert remarks(good, [Written(torch.clone)]) == ["2 tensors"]
    with pytest.raises(CheckpointError, match="2 tensors of weights are on the disk with other content"):
        write(tmp_path, 2, [Written(torch.zeros_like)])
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_family_that_stores_weights_in_another_form_is_not_compared(tmp_path: Path) -> None:
    assert write(tmp_path, 1, [Written(lambda value: value.bfloat16())]).is_dir()


@given(shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=6), chunk=st.integers(1, 64), data=st.data())
def test_sums_of_the_bytes_on_the_disk_are_those_of_the_tensors(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], chunk: int, data: st.DataObject
) -> None:
    tensors = {
        f"t{number}": torch.randn(shape).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
        for number, shape in enumerate(shapes)
    }
    file = tmp_path_factory.mktemp("sums") / "file.safetensors"
    save_file(tensors, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readback, "CHUNK", chunk)
        sha256, found = read_through(file, sums=True)
    assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found == sums_of(tensors)
    assert difference(found, [found]) == 0
    for name, value in tensors.items():
        raw = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        changed = found - Counter([(len(raw), zlib.crc32(raw))])
        changed[len(raw), zlib.crc32(raw) ^ 1] += 1
        assert difference(found, [changed]) == 1, name


def test_an_adapter_that_changes_nothing_is_told(denoiser: Any, tmp_path: Path) -> None:
    from vtrain.config.tables import LoraTable

    table = LoraTable(rank=2)
    add_lora(denoiser, table, 0, "")
    piece = AdapterPiece(denoiser, {"r": 2, "lora_alpha": 2})
    piece.write(tmp_path, piece.gather(keep=True))
    assert [text.split(":")[0] for text in piece.remarks(tmp_path)] == ["the adapter changes nothing"]
    weight = next(value for name, value in denoiser.module.named_parameters() if ".lora_B." in name)
    weight.data[0, 0] = 1e-8
    piece.write(tmp_path, piece.gather(keep=True))
    assert list(piece.remarks(tmp_path)) == []
    assert not changes_nothing(lora_state(denoiser.module))
