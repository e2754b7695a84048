"""What was written is compared with what was trained, from the bytes that sealing a checkpoint reads."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vtrain.config.tables import EmaTable, LoraTable
from vtrain.contract import CheckpointError, Device
from vtrain.train import readback
from vtrain.train.adapter import changes_nothing
from vtrain.train.checkpoint import write
from vtrain.train.ema import Average, AveragePiece
from vtrain.train.eval_weights import AVERAGED, AveragedPiece, EvalWeights
from vtrain.train.parameters import add_lora, lora_state, trained
from vtrain.train.piece import Copies, Keep, State
from vtrain.train.pieces import AdapterPiece, DenoiserPiece
from vtrain.train.readback import marks_of, read_through, remarks

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Written:
    """A piece whose files hold what `change` makes of its tensors, and whose reader undoes `read`."""

    change: Callable[[Tensors], Tensors] = dict
    read: Callable[[Tensors], Tensors] = dict
    cheap: bool = False
    name: ClassVar[str] = "weights"
    files: ClassVar[tuple[str, ...]] = ("weights.safetensors",)
    bytes: ClassVar[int] = 64

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        return State({"first": torch.arange(8.0), "second": torch.arange(8.0).reshape(2, 4) / 3})

    def write(self, folder: Path, state: State) -> None:
        tensors = self.change(dict(state.tensors))
        save_file({f"renamed.{name}": value for name, value in tensors.items()}, folder / self.files[0])

    def load(self, folder: Path) -> None: ...

    def reread(self, folder: Path) -> Tensors:
        stored = load_file(folder / self.files[0])
        return self.read({name.removeprefix("renamed."): value for name, value in stored.items()})

    def remarks(self, folder: Path) -> Iterator[str]:
        yield f"{len(load_file(folder / self.files[0]))} tensors"


CHANGES: dict[str, Callable[[Tensors], Tensors]] = {
    "zeroed": lambda tensors: {name: torch.zeros_like(value) for name, value in tensors.items()},
    "rounded": lambda tensors: {name: (value + 1e-3).bfloat16() for name, value in tensors.items()},
    "scaled": lambda tensors: {name: value * 1.01 for name, value in tensors.items()},
    "lost": lambda tensors: {"second": tensors["second"]},
    "swapped": lambda tensors: {"first": tensors["second"], "second": tensors["first"]},
}


@pytest.mark.parametrize("cheap", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_lost_or_changed_what_was_trained_is_none(tmp_path: Path, change: str, cheap: bool) -> None:
    good = write(tmp_path, 1, [Written(cheap=cheap)])
    assert remarks(good, [Written()]) == ["2 tensors"]
    if change == "swapped" and not cheap:
        return  # contents alone are compared: the family's names are its own
    with pytest.raises(CheckpointError, match=r"first.* of weights cannot be read back as trained"):
        write(tmp_path, 2, [Written(CHANGES[change], cheap=cheap)])
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_weights_in_another_form_are_compared_as_their_family_reads_them(tmp_path: Path) -> None:
    def fused(tensors: Tensors) -> Tensors:
        return {"all": torch.cat([value.flatten() for value in tensors.values()]).double()}

    def parted(tensors: Tensors) -> Tensors:
        return {"first": tensors["all"][:8].float(), "second": tensors["all"][8:].float().reshape(2, 4)}

    assert write(tmp_path, 1, [Written(fused, parted)]).is_dir()
    with pytest.raises(CheckpointError, match="second of weights cannot be read back"):
        write(tmp_path, 2, [Written(fused, lambda tensors: {**parted(tensors), "second": torch.ones(2, 4)})])


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
    assert found == Counter(mark for mark, _ in marks_of(tensors).values())


def test_an_adapter_that_changes_nothing_is_told(denoiser: Any, tmp_path: Path) -> None:
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


def test_an_adapter_and_its_average_are_read_back_by_their_own_loader(
    denoiser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that loses a part, rounds, or spoils the average alone."""
    add_lora(denoiser, LoraTable(rank=2), 0, "")
    settings = {"r": 2, "lora_alpha": 2}
    average = Average(trained(denoiser.module), EmaTable(), Device())
    pieces = [AdapterPiece(denoiser, settings), AveragePiece(denoiser, average, settings, lambda folder: denoiser)]
    good = write(tmp_path, 1, pieces)
    save = type(denoiser).save_lora

    def changed(change: Callable[[Path, Tensors], Tensors]) -> None:
        def save_changed(self: Any, folder: Path, state: Tensors, settings: Any) -> None:
            save(self, folder, change(folder, state), settings)

        monkeypatch.setattr(type(denoiser), "save_lora", save_changed)

    changed(lambda _, state: {name: value for name, value in state.items() if "blocks.1" not in name})
    with pytest.raises(CheckpointError, match=r"blocks\.1.* of adapter cannot be read back as trained"):
        write(tmp_path, 2, pieces)
    changed(lambda _, state: {name: value.bfloat16() for name, value in state.items()})
    with pytest.raises(CheckpointError, match="of adapter cannot be read back as trained"):
        write(tmp_path, 2, pieces)
    factor = {"ema": 1.01}
    changed(lambda folder, state: {name: value * factor.get(folder.name, 1) for name, value in state.items()})
    with pytest.raises(CheckpointError, match="of average cannot be read back as trained"):
        write(tmp_path, 2, pieces)
    assert list(tmp_path.iterdir()) == [good]


def test_weights_for_evaluation_that_are_not_on_the_disk_make_no_checkpoint(denoiser: Any, tmp_path: Path) -> None:
    add_lora(denoiser, LoraTable(rank=2), 0, "")
    named = trained(denoiser.module)
    optimizer: Any = SimpleNamespace(eval_weight=lambda weight: weight.detach() + 1)
    adapter = AdapterPiece(denoiser, {"r": 2, "lora_alpha": 2})
    values = EvalWeights(optimizer, {name: (weight, weight) for name, weight in named})
    pieces = [adapter, AveragedPiece(adapter, values, named)]
    good = write(tmp_path, 1, pieces)
    save = type(denoiser).save_lora

    def rounded(self: Any, folder: Path, state: Tensors, settings: Any) -> None:
        save(self, folder, halves(state) if folder.name == AVERAGED else state, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(denoiser), "save_lora", rounded)
        with pytest.raises(CheckpointError, match="of averaged weights cannot be read back as trained"):
            write(tmp_path, 2, pieces)
    assert list(tmp_path.iterdir()) == [good]


def test_a_whole_model_that_its_writer_rounds_makes_no_checkpoint(denoiser: Any, toy: Any, tmp_path: Path) -> None:
    piece = DenoiserPiece(denoiser, lambda folder: toy.load_denoiser("cpu", "fp32", folder))
    write(tmp_path, 1, [piece])
    save = type(denoiser).save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(denoiser), "save", lambda self, folder, state: save(self, folder, halves(state)))
        with pytest.raises(CheckpointError, match="of denoiser cannot be read back as trained"):
            write(tmp_path, 2, [piece])
        denoiser.module.bfloat16()  # as pure bf16 is trained: nothing is lost
        write(tmp_path, 2, [piece])


def halves(state: Tensors) -> Tensors:
    return {name: value.bfloat16() for name, value in state.items()}
