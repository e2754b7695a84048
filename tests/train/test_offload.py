"""[offload] in whole runs: the same numbers as without, bit for bit, with weights that hold none while they are away."""

from __future__ import annotations

import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import Tensor, nn

from vtrain.config.tables import LoraTable, OffloadTable
from vtrain.contract import Device
from vtrain.contract.transfers import Arriving, Transfers
from vtrain.train import offload as chapter
from vtrain.train.offload import FOLDER, InMemory, Offload, offload, own_folder
from vtrain.train.parameters import add_lora, lora_state

Run = Callable[..., subprocess.CompletedProcess[str]]
ONE_LOCK = "elsewhere than on Linux two handles of one process do not keep each other out"
SMOOTH = '\n[[regularizer]]\nuse = "toy-smooth"\nblock = 1\n'
VIDEOS = '\n[validation]\nevery = "3 steps"\nsize = "64x64"\nframes = 9\nsteps = 2\nprompts = { one = "gradient" }\n'


def table(**values: Any) -> str:
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in values.items()
    ]
    return "\n[offload]\n" + "\n".join(lines) + "\n"


GROUPS = {
    "block": {"group": "block"},
    "two blocks": {"group": "block", "blocks_per_group": 2},
    "leaf": {"group": "leaf"},
    "stream": {"group": "block", "stream": True},
    "stream of two": {"group": "block", "blocks_per_group": 2, "stream": True},
}


@pytest.mark.parametrize("how", GROUPS, ids=list(GROUPS))
def test_training_with_weights_away_is_training_bit_for_bit(
    folder, another, within: Run, poisoned: Callable[..., Any], card_in_ram: Any, how: str
) -> None:
    within("run", folder.write(SMOOTH + VIDEOS, train="lora"))
    moves, other = poisoned(streams=True), another()
    within("run", other.write(SMOOTH + VIDEOS + table(**GROUPS[how]), train="lora"))
    assert moves.sent >= 6 * 3, "fewer than a group a step"
    assert other.rows() == folder.rows()
    ours, theirs = other.tensors(6), folder.tensors(6)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any("lora_B" in name and bool(ours[name].any()) for name in ours), "the adapter did not move"
    video = Path("samples/step-000006/one.mp4")
    assert (other.output / video).read_bytes() == (folder.output / video).read_bytes()


def test_what_reads_a_weight_that_is_away_is_caught(
    folder, within: Run, monkeypatch: pytest.MonkeyPatch, poisoned: Callable[..., Any], card_in_ram: Any
) -> None:
    """A test of the stand-in: without bringing groups, nothing is a number."""
    poisoned()
    monkeypatch.setattr(Offload, "enter", lambda self, number: None)
    done = within("run", folder.write(table(group="block"), train="lora"), check=None)
    assert done.returncode == 2
    assert "not finite" in done.stderr


@pytest.fixture
def layers() -> Callable[..., tuple[Any, Offload, ExitStack]]:
    def make(held: ExitStack, blocks: int = 4, **values: Any) -> tuple[Any, Offload]:
        from vtrain_toy.family import TOY

        family = TOY.build(TOY.options.model_validate({"width": 32, "blocks": blocks}))
        denoiser = family.load_denoiser("cpu", "fp32")
        add_lora(denoiser, LoraTable(rank=2), 0, "")
        denoiser.gradient_checkpointing(True)
        return denoiser, offload(denoiser, OffloadTable.model_validate(values), Device(), held)

    return make


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(("values", "at_most"), [({}, 1), ({"blocks_per_group": 2}, 2), ({"stream": True}, 2)])
def test_a_step_has_no_more_blocks_on_the_card_than_it_says(
    layers, given, held: ExitStack, poisoned: Callable[..., Any], values: dict[str, Any], at_most: int
) -> None:
    """Also in the backward pass: diffusers' own leaves what is recomputed there."""
    moves = poisoned(streams=True)
    denoiser, made = layers(held, blocks=6, group="block", **values)
    step = given(1)
    block = sum(tensor.nbytes for tensor in made.groups[0].home.fetch()) // values.get("blocks_per_group", 1)
    for _ in range(2):
        denoiser.predict(step.clean, step.level, step.condition).square().mean().backward()
    assert block * at_most == moves.most
    assert all(weight.grad is not None for weight in denoiser.module.parameters() if weight.requires_grad)


class Alive:
    """Bytes of the weights that came to the card and that something still holds: also what a backward pass has yet to use."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def came(self, tensors: Sequence[Tensor]) -> Arriving:
        copies = tuple(tensor.clone() for tensor in tensors)
        for copy in copies:
            self._add(copy.nbytes)
            weakref.finalize(copy.untyped_storage(), self._add, -copy.nbytes).atexit = False
        return Arriving(copies)

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def peak(self) -> int:
        """Since the last call."""
        found, self.most = self.most, self.now
        return found


@pytest.mark.parametrize(("group", "least"), [("block", 1.0), ("leaf", 0.5)])
def test_of_a_block_that_many_bytes_are_on_the_card_in_a_forward_and_in_a_backward_pass(
    layers, given, held: ExitStack, monkeypatch: pytest.MonkeyPatch, group: str, least: float
) -> None:
    """In a backward pass nearly a block of leaves too: what is computed again holds its weights until its gradients are there."""
    denoiser, made = layers(held, blocks=4, group=group)
    block = sum(each.nbytes for each in denoiser.blocks[0].parameters() if not each.requires_grad)
    alive, data = Alive(), given(1)
    monkeypatch.setattr(Transfers, "send", lambda _self, tensors: alive.came(tensors))
    with torch.no_grad():
        denoiser.predict(data.clean, data.level, data.condition)
    largest = max(sum(each.nbytes for each in one.home.fetch()) for one in made.groups)
    assert alive.peak() == largest, "one group at a time, and none ahead"
    assert group == "block" or largest < 0.3 * block
    made.clear()
    alive.peak()
    denoiser.predict(data.clean, data.level, data.condition).square().mean().backward()
    assert least <= alive.peak() / block <= 1.0
    made.clear()
    assert alive.now == 0


def test_groups_that_come_ahead_are_sent_once_a_pass(
    layers, given, held: ExitStack, poisoned: Callable[..., Any]
) -> None:
    """Six groups, forward and backward: the last of one pass is the first of the next, and none comes for nothing."""
    moves = poisoned(streams=True)
    denoiser, _ = layers(held, blocks=6, group="block", stream=True)
    step = given(1)
    for passes in (11, 10, 10):
        before = moves.sent
        denoiser.predict(step.clean, step.level, step.condition).square().mean().backward()
        assert moves.sent - before <= passes + 1


def test_weights_that_are_away_in_memory_are_read_as_they_are(layers, held: ExitStack) -> None:
    """By whoever asks for the state: exports, averages, marks of the base."""
    denoiser, _ = layers(held, group="block")
    with ExitStack() as other:
        plain, _ = layers(other, group="leaf")
        ours, theirs = denoiser.module.state_dict(), plain.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_layer_with_an_adapter_moves_as_one_and_the_adapter_stays(layers, held: ExitStack) -> None:
    denoiser, made = layers(held, blocks=1, group="leaf")
    names = {name: {weight.name for weight in group.weights} for name, group in enumerate(made.groups)}
    assert len(made.groups) == 8 + 3, "eight with an adapter, and modulation, widen, narrow"
    moved = {id(weight.weight) for group in made.groups for weight in group.weights}
    assert names
    for name, weight in denoiser.module.named_parameters():
        assert (id(weight) in moved) is ("lora_" not in name and name.startswith("blocks.")), name


def test_offload_is_refused_or_warned_of_in_the_plan_and_said_to_do_nothing_on_a_cpu(folder, within: Run) -> None:
    printed = " ".join(within("run", folder.write(table(group="block"), train="lora", steps=2)).stdout.split())
    assert "offload.group changes nothing on a CPU" in printed
    within("run", folder.write(table(optimizer=True, model_cpu=True), train="lora", steps=2))


# -- on a disk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"group": "block"}, {"group": "leaf"}, {"group": "block", "blocks_per_group": 2}])
def test_training_from_a_disk_is_training_bit_for_bit(
    folder, another, within: Run, card_in_ram: Any, how: dict[str, Any]
) -> None:
    within("run", folder.write(SMOOTH, train="lora"))
    other = another()
    within("run", other.write(SMOOTH + table(**how, disk="away"), train="lora"))
    assert other.rows() == folder.rows()
    ours, theirs = other.tensors(6), folder.tensors(6)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert list((other.path / "away").iterdir()) == [], "the run's folder stayed"


def test_a_run_goes_on_with_and_without_offload(folder, another, within: Run, card_in_ram: Any) -> None:
    """Stopped without, resumed from a disk, and the other way round: the uninterrupted run."""
    within("run", folder.write(SMOOTH, train="lora"))
    for first, second in (("", table(group="block", disk="away")), (table(group="leaf"), "")):
        other = another()
        within("run", other.write(SMOOTH + first, train="lora", steps=6))
        for step in sorted((other.output / "checkpoints").iterdir())[1:]:
            (other.output / "checkpoints" / step.name).rename(other.path / step.name)
        printed = within("run", other.write(SMOOTH + second, train="lora", steps=6)).stdout
        assert "step-000003 (step 3)" in printed
        assert "offload" not in printed.partition("resuming")[2]
        ours, theirs = other.tensors(6), folder.tensors(6)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_weight_on_a_disk_has_no_values_to_be_read(layers, held: ExitStack, tmp_path: Path) -> None:
    denoiser, _ = layers(held, group="block", disk=tmp_path / "away")
    state = denoiser.module.state_dict()
    assert state["blocks.0.widen.weight"].numel() == 0
    assert all(bool(value.numel()) for value in lora_state(denoiser.module).values())


def test_the_folder_of_a_run_that_was_killed_goes_with_the_next(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from vtrain.train.offload import own_folder
with own_folder(Path({str(tmp_path)!r})) as folder:
    (folder / "group-0000.safetensors").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        there = Path(process.stdout.readline().strip())
        with own_folder(tmp_path) as own:
            assert there.is_dir(), "that of a living run was taken away"
            assert own != there
        process.send_signal(signal.SIGKILL)
    assert there.is_dir()
    with own_folder(tmp_path) as own:
        assert [path for path in tmp_path.iterdir() if path.name.startswith(FOLDER)] == [own]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "holding",
    [
        pytest.param(False, id="it has removed it"),
        pytest.param(True, id="it is about to", marks=pytest.mark.skipif(sys.platform != "linux", reason=ONE_LOCK)),
    ],
)
def test_a_run_that_starts_while_another_makes_its_folder_leaves_it_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: ExitStack, holding: bool
) -> None:
    """Between the making of the file and its lock it is nobody's: the other run takes it for a dead one's."""
    real, early = chapter.lock, []

    def lock(file: BinaryIO, place: int) -> str:
        if not early:
            early.append(Path(file.name).parent)
            if not holding:
                chapter._remove_dead(early[0])
            else:
                other = held.enter_context(Path(file.name).open("r+b"))  # noqa: SIM115 - held closes it
                assert real(other, place) == "ours"
        return real(file, place)

    monkeypatch.setattr(chapter, "lock", lock)
    with own_folder(tmp_path) as folder:
        assert folder.is_dir()
        assert folder != early[0]
        (folder / "group-0000.safetensors").write_bytes(b"x")
        chapter._remove_dead(folder)
        assert folder.is_dir(), "it is not locked"
    assert not folder.exists()


# -- a validation's room -------------------------------------------------------------------------------------------------


def test_the_denoiser_is_off_the_card_while_videos_are_decoded_and_back_after(
    folder, another, within: Run, monkeypatch: pytest.MonkeyPatch, card_in_ram: Any
) -> None:
    within("run", folder.write(VIDEOS, train="lora"))
    moved: list[str] = []
    plain: Any = nn.Module.to

    def to(self: nn.Module, *where: Any, **how: Any) -> nn.Module:
        if any("lora_A" in name for name, _ in self.named_modules()):
            moved.append(str(where[0]))
        return plain(self, *where, **how)

    def decoded(self: Any, latents: torch.Tensor, decode: Any = None) -> torch.Tensor:
        moved.append("decoding")
        return decode_latents(self, latents)

    from vtrain_toy.codec import ToyCodec

    decode_latents = ToyCodec.decode
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(ToyCodec, "decode", decoded)
    other = another()
    within("run", other.write(VIDEOS + table(model_cpu=True), train="lora"))
    assert moved == ["cpu", "decoding", "cpu"] * 2, "there, decoded, back to the card, which is the CPU's memory here"
    assert other.rows() == folder.rows()


EMA = '\n[ema]\ndecay = 0.5\nwarmup = false\nvalidation = "both"\n'


@pytest.mark.parametrize(
    ("train", "optimizer", "more"),
    [("lora", "adamw", EMA), ("lora", "schedulefree-adamw", ""), ("full", "schedulefree-adamw", EMA)],
    ids=["average", "weights for evaluation", "both, full training"],
)
def test_averages_and_weights_for_evaluation_follow_a_denoiser_that_left_the_card(
    folder, another, within: Run, card_in_ram: Any, train: str, optimizer: str, more: str
) -> None:
    """It comes back to other memory, with an average in its place, or while it is validated: training's weights, the average and
    the optimizer are those of the run that stayed."""

    def written(where: Any, tables: str) -> Path:
        file: Path = where.write(VIDEOS + tables, train=train)
        text = file.read_text(encoding="utf-8").replace('use = "adamw"', f'use = "{optimizer}"')
        file.write_text(text.replace('use = "cosine"', 'use = "constant"'), encoding="utf-8")
        return file

    within("run", written(folder, more))
    other = another()
    within("run", written(other, more + table(model_cpu=True)))
    assert other.rows() == folder.rows()
    ours, theirs = other.tensors(6), folder.tensors(6)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert any(name.startswith("ema/") for name in theirs) is bool(more)
    for video in (folder.output / "samples/step-000006").glob("*.mp4"):
        assert (other.output / "samples/step-000006" / video.name).read_bytes() == video.read_bytes()


def test_groups_leave_the_card_for_a_decode(layers, given, held: ExitStack, poisoned: Callable[..., Any]) -> None:
    moves = poisoned()
    denoiser, made = layers(held, group="block")
    step = given(1)
    with torch.no_grad():
        denoiser.predict(step.clean, step.level, step.condition)
    assert sum(moves.now.values()) > 0
    with chapter.resting(denoiser.module, made, to_cpu=False, device=Device()):
        assert sum(moves.now.values()) == 0
    assert isinstance(made.groups[0].home, InMemory)
