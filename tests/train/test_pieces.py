"""The pieces of a run's checkpoint: gathered without a needless copy, written from what was gathered, loaded bit for bit."""

from __future__ import annotations

import json
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vtrain.config.tables import LoraTable
from vtrain.contract import CheckpointError
from vtrain.train.optimizer_piece import OptimizerPiece
from vtrain.train.parameters import add_lora, lora_settings, lora_state
from vtrain.train.piece import Piece, State
from vtrain.train.pieces import (
    AdapterPiece,
    ConfigPiece,
    CountersPiece,
    DenoiserPiece,
    RegularizerPiece,
    on_cpu,
)
from vtrain.train.resume import RunState, read_state

Run = Callable[..., subprocess.CompletedProcess[str]]
COUNTERS = RunState(3, 6, {"train.steps": 4, "data[0].resolution": ["64x64"]}, "5 samples", "mark", {"crepa": "a1"})


def trained(module: nn.Module) -> torch.optim.Optimizer:
    """After one step of AdamW with gradients of ones."""
    optimizer = torch.optim.AdamW([weight for weight in module.parameters() if weight.requires_grad], lr=0.1)
    for weight in module.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    optimizer.step()
    return optimizer


def named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


@pytest.fixture
def pieces(toy: Any) -> tuple[Piece, ...]:
    """One of each kind, on objects of their own."""
    full, adapted = (toy.load_denoiser("cpu", "fp32") for _ in range(2))
    add_lora(adapted, LoraTable(rank=4), seed=1, where="")
    return (
        DenoiserPiece(full),
        AdapterPiece(adapted, lora_settings(adapted, LoraTable(rank=4))),
        RegularizerPiece("layers", nn.Linear(3, 2)),
        OptimizerPiece(trained(full.module), named(full.module)),
        CountersPiece(COUNTERS),
        ConfigPiece("[run]\n# täglich\n"),
    )


def stored(folder: Path) -> int:
    """Bytes of all tensors in a folder."""
    found = [value for file in folder.rglob("*.safetensors") for value in load_file(file).values()]
    return sum(value.numel() * value.element_size() for value in found)


def test_each_piece_writes_the_bytes_that_it_says_and_has_the_files_that_it_names(
    pieces: tuple[Piece, ...], tmp_path: Path
) -> None:
    assert len({piece.name for piece in pieces}) == len(pieces)
    for piece in pieces:
        folder = tmp_path / piece.name
        folder.mkdir()
        piece.write(folder, piece.gather(keep=True))
        assert stored(folder) == piece.bytes, piece.name
        assert any(path.is_file() for path in folder.rglob("*"))
        assert all((folder / name).is_file() for name in piece.files)


def test_a_process_that_does_not_write_keeps_nothing(pieces: tuple[Piece, ...]) -> None:
    for piece in pieces:
        assert piece.gather(keep=False) == State(), piece.name


def test_what_lies_on_the_cpu_is_gathered_without_a_copy(pieces: tuple[Piece, ...]) -> None:
    """A model of two billion weights would take its 8 GB twice."""
    denoiser, _, regularizer, optimizer = pieces[:4]
    assert isinstance(denoiser, DenoiserPiece)
    assert isinstance(regularizer, RegularizerPiece)
    assert isinstance(optimizer, OptimizerPiece)
    for piece, live in ((denoiser, denoiser.denoiser.module), (regularizer, regularizer.module)):
        state = piece.gather(keep=True)
        for name, value in live.state_dict().items():
            assert state.tensors[name].data_ptr() == value.data_ptr(), name
            assert not state.tensors[name].requires_grad
    name, weight = optimizer.named[0]
    gathered = optimizer.gather(keep=True).tensors[f"{name}::exp_avg"]
    assert gathered.data_ptr() == optimizer.optimizer.state[weight]["exp_avg"].data_ptr()


class Spread:
    """Something whose shares lie with several processes. alive: how many whole ones there are in memory; the most at once."""

    def __init__(self, value: Tensor, alive: list[int]) -> None:
        self.value, self.alive = value, alive

    def full_tensor(self) -> Tensor:
        whole = self.value.clone()
        self.alive[0] += 1
        self.alive[1] = max(self.alive)
        weakref.finalize(whole.untyped_storage(), self.gone)
        return whole

    def gone(self) -> None:
        self.alive[0] -= 1


def test_shares_are_put_together_one_after_the_other_and_never_all_in_memory(tmp_path: Path) -> None:
    alive = [0, 0]
    kinds = torch.float32, torch.bfloat16, torch.int64, torch.uint8
    values = {str(dtype): torch.arange(24).reshape(2, 3, 4).to(dtype) for dtype in kinds}
    values |= {"nothing": torch.zeros(0, 4), "a number": torch.tensor(3.5)}
    spread: Any = {name: Spread(value, alive) for name, value in values.items()}
    own = torch.ones(3)
    found = on_cpu({**spread, "own": own}, keep=tmp_path)
    assert alive == [1, 2], "one at a time, beside the empty one, which is no file"
    assert list(tmp_path.iterdir()) == []
    assert found.pop("own").data_ptr() == own.data_ptr()
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    save_file(found, tmp_path / "found.safetensors")
    assert all(torch.equal(value, values[name]) for name, value in load_file(tmp_path / "found.safetensors").items())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a full disk on Linux")
def test_a_full_disk_is_told_after_this_process_has_done_its_part_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtrain.train.pieces.NamedTemporaryFile", lambda dir: Path("/dev/full").open("wb"))  # noqa: SIM115
    alive = [0, 0]
    asked: Any = {str(number): Spread(torch.ones(4), alive) for number in range(5)}
    counted = 0

    def count(self: Spread) -> Tensor:
        nonlocal counted
        counted += 1
        return self.value.clone()

    monkeypatch.setattr(Spread, "full_tensor", count)
    with pytest.raises(OSError, match="No space left on device"):
        on_cpu(asked, keep=tmp_path)
    assert counted == 5


def test_writing_looks_at_what_was_gathered_and_not_at_what_has_become_of_it(
    pieces: tuple[Piece, ...], tmp_path: Path
) -> None:
    for piece in pieces[:4]:
        state = piece.gather(keep=True)
        before = State({name: value.clone() for name, value in state.tensors.items()}, state.values)
        for value in state.tensors.values():
            value.add_(1)  # training goes on
        folder = tmp_path / piece.name
        folder.mkdir()
        piece.write(folder, before)
        found = {name: value for file in folder.rglob("*.safetensors") for name, value in load_file(file).items()}
        assert found.keys() == before.tensors.keys(), piece.name
        assert all(torch.equal(found[name], value) for name, value in before.tensors.items()), piece.name


def test_an_adapter_and_a_regularizer_are_loaded_into_the_live_modules_bit_for_bit(toy: Any, tmp_path: Path) -> None:
    first, second = (toy.load_denoiser("cpu", "fp32") for _ in range(2))
    for seed, denoiser in enumerate((first, second)):
        add_lora(denoiser, LoraTable(rank=4), seed, where="")
    learned, fresh = nn.Linear(3, 2), nn.Linear(3, 2)
    settings = lora_settings(first, LoraTable(rank=4))
    for piece in (AdapterPiece(first, settings), RegularizerPiece("r", learned)):
        piece.write(tmp_path, piece.gather(keep=True))
    AdapterPiece(second, settings).load(tmp_path)
    RegularizerPiece("r", fresh).load(tmp_path)
    assert all(torch.equal(value, lora_state(second.module)[name]) for name, value in lora_state(first.module).items())
    assert torch.equal(learned.weight, fresh.weight)


def test_an_adapter_or_a_regularizer_that_does_not_fit_is_refused_by_name(toy: Any, tmp_path: Path) -> None:
    small, large = (toy.load_denoiser("cpu", "fp32") for _ in range(2))
    add_lora(small, LoraTable(rank=4), 1, "")
    add_lora(large, LoraTable(rank=8), 1, "")
    for piece in (AdapterPiece(small, lora_settings(small, LoraTable(rank=4))), RegularizerPiece("r", nn.Linear(3, 2))):
        piece.write(tmp_path, piece.gather(keep=True))
    with pytest.raises(CheckpointError, match=r"the adapter there does not fit this model: .*lora_A"):
        AdapterPiece(large, {}).load(tmp_path)
    with pytest.raises(CheckpointError, match=r"r\.safetensors: what this regularizer has learned .* size mismatch"):
        RegularizerPiece("r", nn.Linear(3, 4)).load(tmp_path)
    broken = nn.Linear(3, 2)
    nn.init.constant_(broken.bias, float("nan"))
    piece = RegularizerPiece("r", broken)
    piece.write(tmp_path, piece.gather(keep=True))
    with pytest.raises(CheckpointError, match=r"r\.safetensors: bias has numbers that are not finite"):
        piece.load(tmp_path)

    class Remembering(nn.Linear):
        def get_extra_state(self) -> Tensor:
            return torch.zeros(1)

        def set_extra_state(self, state: Tensor) -> None:
            raise ValueError("its mean cannot be restored from 7")

    piece = RegularizerPiece("r", Remembering(3, 2))
    piece.write(tmp_path, piece.gather(keep=True))
    with pytest.raises(CheckpointError, match=r"r\.safetensors: its mean cannot be restored from 7\."):
        piece.load(tmp_path)
    (tmp_path / "regularizers" / "r.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"r\.safetensors: cannot be read"):
        RegularizerPiece("r", nn.Linear(3, 2)).load(tmp_path)


def test_where_the_run_stands_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    piece = CountersPiece(COUNTERS)
    piece.write(tmp_path, piece.gather(keep=True))
    assert read_state(tmp_path) == COUNTERS


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"step": -5}, ["step is -5: input should be greater than or equal to 0"]),
        ({"step": True}, ["step is true: input should be a valid integer"]),
        ({"step": 3.0}, ["step is 3.0: input should be a valid integer"]),
        ({"step": float("nan")}, ["step is NaN: input should be a valid integer"]),
        ({"step": 10**30}, ["step is 1000000000000000000000000000000: input should be"]),
        ({"step": 4, "micro_batch": 8}, ["step is 4, and the folder is that of step 3."]),
        ({"micro_batch": 2}, ["micro_batch is 2, and 3 steps have taken one each at least."]),
        ({"step": "3", "micro_batch": -1}, ['step is "3": ', "micro_batch is -1: "]),
        ({"settings": None}, ["settings is null: "]),
        ({"settings": {"train..[": 1}}, ['settings: "train..[" is no key.']),
        ({"features": {"crepa": 1}}, ["features.crepa is 1: "]),
        ({"data": 5, "base": None, "folder": 7}, ["data is 5: ", "base is null: ", "folder is 7: "]),
        ({"more": 1}, ["more is 1: extra inputs are not permitted"]),
    ],
)
def test_a_state_that_cannot_be_is_refused_with_each_field_that_is_wrong(
    tmp_path: Path, change: dict[str, object], told: list[str]
) -> None:
    folder = tmp_path / "step-000003"
    folder.mkdir()
    CountersPiece(COUNTERS).write(folder, State(values=vars(COUNTERS)))
    text = (folder / "state.json").read_text(encoding="utf-8")
    (folder / "state.json").write_text(json.dumps(json.loads(text) | change), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        read_state(folder)
    assert len(caught.value.problems) == len(told)
    for problem, words in zip(caught.value.problems, told, strict=True):
        assert str(problem).startswith(f"{folder / 'state.json'}: {words}")
        assert "Name another checkpoint in run.resume" in str(problem)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"step": 3}', "[]", '"\ud800"', ""])
def test_a_state_that_is_no_state_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(CheckpointError, match=r"state\.json: "):
        read_state(tmp_path)


@pytest.mark.parametrize("base", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["toy", "sanavideo"])
def test_the_denoisers_piece_has_the_bytes_that_the_plan_counts(
    toy: Any, tmp_path: Path, family: str, base: Any
) -> None:
    """The plan counts parameters of the model folder and loads none; what it takes for a weight is its storage type's size."""
    from vtrain.estimate.cached import STORED_BYTES

    if family == "sanavideo":
        from vtrain_sanavideo import tiny
        from vtrain_sanavideo.family import SanaVideoFamily
        from vtrain_sanavideo.options import SanaVideoOptions

        counted: Any = SanaVideoFamily(SanaVideoOptions(path=str(tiny.build(tmp_path / "model"))))
    else:
        counted = toy
    piece = DenoiserPiece(counted.load_denoiser("cpu", base))
    assert piece.bytes == counted.parameters * STORED_BYTES[base]


def test_the_plan_estimates_a_checkpoint_at_what_its_pieces_take(folder: Any, within: Run) -> None:
    """To the step counts of AdamW, 4 bytes for each tensor that it trains, which no plan counts."""
    within("run", folder.write(steps=2))
    planned = json.loads((folder.output / "plan.json").read_text(encoding="utf-8"))["checkpoint_bytes"]
    counts = [name for name in folder.tensors(2) if name.endswith("::step")]
    assert counts
    assert stored(folder.output / "checkpoints" / "step-000002") == planned + 4 * len(counts)
