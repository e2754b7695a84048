"""What `vtrain export` takes of a run, where it puts it, and what it never touches."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vtrain.run import export as exports
from vtrain.train.checkpoint import fault

Run = Callable[..., subprocess.CompletedProcess[str]]
ADAPTER = "adapter_model.safetensors"


def checkpoint_of(folder, step: int) -> Path:
    path: Path = folder.output / "checkpoints" / f"step-{step:06d}"
    return path


def same(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_a_run_that_started_from_an_adapter_is_exported_also_when_that_is_gone(folder, another, within: Run) -> None:
    first = another()
    within("run", first.write(train="lora", rank=3, steps=2, save=2))
    config = folder.write(train="lora", rank=3, steps=2, save=2)
    # Its first weights are the file's: these could not be made of rank 3.
    start = f'dropout = 0.2\ninit = "orthogonal"\nstart = "{checkpoint_of(first, 2)}"\n'
    config.write_text(config.read_text(encoding="utf-8").replace("dropout = 0.2\n", start), encoding="utf-8")
    within("run", config)
    within("export", folder.output)
    shutil.rmtree(first.output)
    within("export", folder.output, "--format", "merged")
    record = json.loads((folder.output / "exports" / "step-000002-lora" / "export.json").read_text())
    assert record["started_from"].endswith(str(checkpoint_of(first, 2) / ADAPTER))


@pytest.mark.parametrize("train", ["lora", "full"])
def test_of_a_schedule_free_run_the_weights_for_evaluation_are_exported(folder, within: Run, train: str) -> None:
    config = folder.write(train=train, steps=4, save=2)
    text = config.read_text(encoding="utf-8").replace('use = "adamw"', 'use = "schedulefree-adamw"')
    # It has no schedule.
    config.write_text(text.replace('use = "cosine"\nwarmup = "2 steps"', 'use = "constant"'), encoding="utf-8")
    within("run", config)
    form = "lora" if train == "lora" else "merged"
    said = within("export", folder.output, "--format", form).stdout
    assert "exported step 4 (its optimizer's averaged weights)" in said
    source, target = checkpoint_of(folder, 4), folder.output / "exports" / f"step-000004-{form}"
    name = ADAPTER if train == "lora" else "denoiser.safetensors"
    assert same(source / "averaged" / name, target / name)
    assert not same(source / name, target / name)
    assert json.loads((target / "export.json").read_text())["weights"] == "averaged"
    assert "its optimizer's own averaged weights" in within("export", folder.output, "--ema", check=2).stderr
    part = within("export", source / "averaged", check=2).stderr
    assert f"Name the checkpoint: vtrain export {source}" in part


def test_nothing_that_was_there_is_deleted_and_nothing_is_left(folder, within: Run) -> None:
    within("run", folder.write(train="lora", steps=2, save=2))
    for name in ("mine.partial", "mine.1-1.partial"):
        (folder.path / name).mkdir()
        (folder.path / name / "precious.txt").write_text("x")
    said = within("export", folder.output, "--to", folder.path / "mine").stdout
    assert (folder.path / "mine.partial" / "precious.txt").is_file()
    assert (folder.path / "mine.1-1.partial" / "precious.txt").is_file()
    assert "mine.1-1.partial is of an export that did not end" in said
    assert len([path for path in folder.path.iterdir() if ".partial" in path.name]) == 2


def test_an_export_goes_nowhere_where_checkpoints_are(folder, within: Run) -> None:
    within("run", folder.write(train="lora", steps=2, save=2))
    source = checkpoint_of(folder, 2)
    for target in (source / "exp", source / "a" / "b", source.parent / "step-000099", source.parent / "mine"):
        done = within("export", folder.output, "--to", target, check=2)
        word = "is a checkpoint" if source in target.parents else "is where a run keeps its checkpoints"
        assert word in " ".join(done.stderr.split())
        assert not target.exists()
    alone = folder.path / "copied"  # also where its folder's name says nothing
    shutil.copytree(source, alone)
    assert "is a checkpoint" in within("export", alone, "--to", alone / "exp", check=2).stderr
    assert fault(source) is fault(alone) is None
    (folder.path / "step-000007").mkdir()
    within("export", folder.output, "--to", folder.path / "step-000007" / "here")


def test_a_damaged_newest_checkpoint_is_skipped_with_a_word(folder, within: Run) -> None:
    within("run", folder.write(train="lora", steps=4, save=2))
    newest = checkpoint_of(folder, 4)
    data = bytearray((newest / ADAPTER).read_bytes())
    data[-1] ^= 1
    (newest / ADAPTER).write_bytes(data)
    said = within("export", folder.output).stdout
    assert "exported step 2 as lora" in said
    assert f"skipped the damaged checkpoint {newest}: {ADAPTER} is damaged" in said.replace("\n", " ")


def test_what_is_not_there_is_called_so(folder, within: Run) -> None:
    config = folder.write(train="lora", steps=2, save=2)
    within("run", config)
    gone = within("export", folder.output / "checkpoints" / "step-000009", check=2).stderr
    assert "there is no such checkpoint" in gone
    assert "There is step-000002." in gone
    model = within("export", folder.output, "--model", "/nowhere", check=2).stderr
    assert "there is no folder /nowhere" in model
    inside = within("export", folder.output, "--to", config / "x", check=2).stderr
    assert "config.toml is a file" in inside
    assert "Make room" not in inside


def test_room_is_asked_for_on_a_full_disk_alone(folder, within: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    within("run", folder.write(train="lora", steps=2, save=2))
    for number, full in ((errno.ENOSPC, True), (errno.EIO, False)):
        with monkeypatch.context() as patch:

            def fails(*_: object, number: int = number) -> None:
                raise OSError(number, os.strerror(number))

            patch.setattr(exports, "_record", fails)
            said = " ".join(within("export", folder.output, check=2).stderr.split())
        assert os.strerror(number) in said
        assert ("Make room on the disk, or choose another folder" in said) is full
        assert "hoose another folder with --to." in said
    assert list((folder.output / "exports").iterdir()) == []


def test_a_run_without_checkpoints_and_an_export_are_called_so(folder, within: Run) -> None:
    within("run", folder.write(train="lora", steps=2, save=2))
    said = within("export", folder.output).stdout
    assert "predicts as the trained model bit for bit; training changed it by" in said
    made = folder.output / "exports" / "step-000002-lora"
    assert "this is an export already" in within("export", made, check=2).stderr
    shutil.rmtree(folder.output / "checkpoints")
    assert "this run has saved no checkpoint yet" in within("export", folder.output, check=2).stderr
