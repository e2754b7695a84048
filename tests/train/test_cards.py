"""Runs on a GPU as far as a stand-in for one goes: what a run asks of it, and what a run says of one that it cannot use."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from vtrain.contract import Device

Run = Callable[..., subprocess.CompletedProcess[str]]
SMOOTH = '\n[[regularizer]]\nuse = "toy-smooth"\nblock = 1\n'


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """What a user reads of an error that is theirs to mend."""
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_run_uses_its_card_in_each_of_its_threads(folder, within: Run, card_in_ram: Any) -> None:
    within("run", folder.write(train="lora"))
    sets = card_in_ram.threads["set_device"]
    assert {"MainThread", "prefetcher_0"} <= sets
    assert all(call == ("set_device", 0) for call in card_in_ram.calls if call[0] == "set_device")
    assert card_in_ram.pinned >= 6 * 5, "clean, noise, level, and text of each micro-batch"
    seeds = [call for call in card_in_ram.calls if call[0] == "manual_seed"]
    assert len(set(seeds)) == 6, "dropout's, one for each micro-batch"
    lines = (folder.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["memory"] for line in lines} == {card_in_ram.peak}
    assert card_in_ram.calls.count(("reset_peak", 0)) == 4, "at the start, after each checkpoint, at the end"


def test_a_cards_numbers_are_those_of_the_cpu_that_it_stands_for(
    folder, another, within: Run, request: pytest.FixtureRequest
) -> None:
    within("run", folder.write())
    request.getfixturevalue("card_in_ram")
    other = another()
    within("run", other.write())
    assert other.rows() == folder.rows()


def test_validation_leaves_its_share_of_the_peak_out(folder, within: Run, card_in_ram: Any) -> None:
    more = '\n[validation]\nevery = "3 steps"\nsize = "64x64"\nframes = 9\nsteps = 2\nprompts = { one = "gradient" }\n'
    within("run", folder.write(more=more))
    assert card_in_ram.calls.count(("reset_peak", 0)) == 5, "at the start, after two checkpoints and two validations"


@pytest.mark.parametrize("base", ["", 'base = "bf16"'])
def test_a_card_without_bf16_is_refused_before_anything_is_loaded(
    folder, within: Run, card: Callable[..., Any], base: str
) -> None:
    card(capability=(7, 5))
    config = folder.write(train="lora")
    mixed = "no" if base else "bf16"
    config.write_text(config.read_text().replace('mixed = "no"', f'mixed = "{mixed}"\n{base}'))
    said = refused(within("run", config, check=None))
    assert "cuda:0 (Stand-in 0): this card computes no bf16 (its compute capability is 7.5)" in said
    assert 'precision.mixed = "no"' in said
    assert not folder.output.exists()


@pytest.mark.parametrize("has", [True, False])
def test_a_processor_without_bf16_trains_in_it_and_says_that_it_is_slow(
    folder, within: Run, monkeypatch: pytest.MonkeyPatch, has: bool
) -> None:
    known = {"architecture": "x86_64", "avx512_bf16": has}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    config = folder.write()
    config.write_text(config.read_text().replace('mixed = "no"', 'mixed = "bf16"'))
    said = within("run", config).stdout
    assert ("no bf16 instructions" in said) is not has
    assert len(folder.rows()) > 1


def test_a_driver_too_old_is_an_error_and_not_a_run_on_the_cpu(folder, within: Run, card: Callable[..., Any]) -> None:
    card(usable=False, wrong="The NVIDIA driver on your system is too old (found version 11040).")
    said = refused(within("run", folder.write(), check=None))
    assert "1 card that torch cannot use: The NVIDIA driver on your system is too old (found version 11040)" in said
    assert not folder.output.exists()


def test_two_processes_for_one_card_are_an_error(
    folder, within: Run, card: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    card(count=1)
    for name, value in (("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    said = refused(within("run", folder.write(), check=None))
    assert "2 processes were started on this machine, and torch sees 1 cuda device." in said
    assert "one process for each card" in said


def test_a_torch_without_nccl_is_an_error_of_several_processes_alone(
    folder, within: Run, card: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    card(count=2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    config = folder.write()
    assert "NCCL" not in refused(within("run", config, check=None)), "the stand-in is no card, which is another error"
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    said = refused(within("run", config, check=None))
    assert "cuda:0: this torch was built without NCCL" in said
    assert "train one process" in said


def test_another_device_of_accelerates_is_an_error_and_no_mixture(
    folder, within: Run, card: Callable[..., Any]
) -> None:
    """`accelerate launch --cpu` sets such a variable: the model would be on one device, and its batches on another."""
    card()
    said = refused(within("run", folder.write(), check=None))
    assert "accelerate was set to compute on cpu, and this process would take cuda:0." in said


def test_a_process_that_uses_accelerate_otherwise_is_an_error(folder, within: Run) -> None:
    """Its precision holds for a whole process, and what vtrain does not own it does not reset."""
    Accelerator(mixed_precision="bf16", cpu=True)
    assert "accelerate is in use in this process already" in refused(within("run", folder.write(), check=None))


def test_a_hidden_card_trains_on_the_cpu_and_says_so(
    folder, within: Run, card: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    card(count=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    printed = within("run", folder.write(steps=2)).stdout
    assert 'WARNING: CUDA_VISIBLE_DEVICES is "": running on the CPU\n' in printed


def test_who_else_is_on_the_card_is_said_once_at_the_start(
    folder, within: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "find", lambda *_: (Device(), ("cuda:0 is in use by others",)))
    assert within("run", folder.write(steps=2)).stdout.count("WARNING: cuda:0 is in use by others\n") == 1


def full(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.18 GiB"
    )


FULL = [
    ("vtrain_toy.smoothness.Smoothness.forward", "training", "train.batch_size (it is 2)", "at step 1, 2.50 GiB"),
    ("vtrain.train.assemble.load_model", "loading the model", 'model.train = "lora"', "2.50 GiB"),
    ("vtrain_toy.codec.ToyCodec.encode", "filling the caches", "vtrain plugins show toy", "2.50 GiB"),
]


@pytest.mark.parametrize(("where", "doing", "remedy", "asked"), FULL, ids=[doing for _, doing, *_ in FULL])
def test_a_full_card_ends_a_run_with_what_lowers_its_memory(
    folder, within: Run, monkeypatch: pytest.MonkeyPatch, where: str, doing: str, remedy: str, asked: str
) -> None:
    monkeypatch.setattr(where, full)
    config = folder.write(more=SMOOTH)
    if doing == "filling the caches":
        config.write_text(config.read_text().replace(folder.cache.as_posix(), "own-cache"))
    said = refused(within("run", config, check=None))
    # The toy's codec has no size that is known.
    estimated = "" if doing == "filling the caches" else r" \(estimated: (at least )?1.03 GiB for .*, mostly \w+\)"
    assert re.search(rf"out of memory while {doing}{estimated}: {asked} were asked for", said)
    assert remedy in said


def test_a_card_too_full_for_validation_is_a_warning_with_what_lowers_it(
    folder, within: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtrain_toy.codec.ToyCodec.decode", full)
    more = '\n[validation]\nevery = "3 steps"\nsize = "64x64"\nframes = 9\nsteps = 2\nprompts = { one = "gradient" }\n'
    printed = " ".join(within("run", folder.write(more=more), check=3).stdout.split())
    assert "validation at step 3 failed: this machine's memory: out of memory while validating (estimated: " in printed
    assert "validation.size" in printed


def test_a_deterministic_run_says_so_in_its_plan_and_asks_for_it_before_any_work(
    folder, within: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(Device, "deterministic", lambda self: asked.append(self))
    config = folder.write(steps=2)
    config.write_text(config.read_text().replace("seed = 7", "seed = 7\ndeterministic = true"))
    assert "deterministic" in within("run", config).stdout
    assert asked == [Device()]
