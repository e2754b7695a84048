"""Checkpoints: whole or not there, verified, pruned only after the new one is sound."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vtrain.contract import CheckpointError
from vtrain.train import checkpoint


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    save_file({"w": torch.arange(1000.0)}, folder / "inner" / "weights.safetensors")
    (folder / "state.json").write_text('{"step": 1}', encoding="utf-8")


def test_a_written_checkpoint_verifies_and_leaves_nothing_aside(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, 12, fill)
    assert folder.name == "step-000012"
    assert checkpoint.fault(folder) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-000012"]
    assert torch.equal(load_file(folder / "inner" / "weights.safetensors")["w"], torch.arange(1000.0))


@pytest.mark.parametrize("byte", [0, 1000, -1])
def test_a_flipped_byte_is_found_and_the_file_named(tmp_path: Path, byte: int) -> None:
    folder = checkpoint.write(tmp_path, 1, fill)
    path = folder / "inner" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)
    assert "inner/weights.safetensors is damaged" in (checkpoint.fault(folder) or "")


def test_a_missing_a_short_and_an_unfinished_file_are_each_found(tmp_path: Path) -> None:
    missing, short, unfinished, nonsense = (checkpoint.write(tmp_path, step, fill) for step in (1, 2, 3, 4))
    (missing / "state.json").unlink()
    (short / "state.json").write_text("{", encoding="utf-8")
    (unfinished / checkpoint.MANIFEST).unlink()
    (nonsense / checkpoint.MANIFEST).write_text("[1]", encoding="utf-8")
    assert checkpoint.fault(missing) == "state.json is missing"
    assert checkpoint.fault(short) == "state.json has 1 bytes instead of 11"
    assert "never finished" in (checkpoint.fault(unfinished) or "")
    assert "cannot be read" in (checkpoint.fault(nonsense) or "")
    assert checkpoint.latest(tmp_path)[0] is None
    assert [fault.folder for fault in checkpoint.latest(tmp_path)[1]] == [nonsense, unfinished, short, missing]


def test_latest_is_the_newest_that_verifies_and_the_damaged_newer_one_is_named(tmp_path: Path) -> None:
    older, newer = checkpoint.write(tmp_path, 9, fill), checkpoint.write(tmp_path, 1000000, fill)
    assert checkpoint.latest(tmp_path) == (newer, [])
    (newer / "state.json").write_text('{"step": 2}', encoding="utf-8")
    folder, faults = checkpoint.latest(tmp_path)
    assert folder == older
    assert [fault.folder for fault in faults] == [newer]


def test_prune_keeps_the_newest_and_only_once_the_new_one_verifies(tmp_path: Path) -> None:
    folders = [checkpoint.write(tmp_path, step, fill) for step in (1, 2, 3, 4)]
    (folders[3] / "state.json").write_text("damaged", encoding="utf-8")
    with pytest.raises(CheckpointError, match="did not verify"):
        checkpoint.prune(tmp_path, 2, folders[3])
    assert len(checkpoint.steps_saved(tmp_path)) == 4
    folders[3] = checkpoint.write(tmp_path, 4, fill)
    assert checkpoint.prune(tmp_path, 2, folders[3]) == folders[:2]
    assert [path for _, path in checkpoint.steps_saved(tmp_path)] == folders[2:]
    assert checkpoint.prune(tmp_path, "all", folders[3]) == []


def test_later_checkpoints_are_set_aside_and_not_lost(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, step, fill)
    moved = checkpoint.set_aside(tmp_path, after=1)
    assert [path.name for path in moved] == ["step-000002.left-behind-1", "step-000003.left-behind-1"]
    assert all(checkpoint.fault(path) is None for path in moved)
    assert checkpoint.latest(tmp_path)[0] == tmp_path / "step-000001"


def test_an_interrupted_write_leaves_the_earlier_checkpoint_and_is_swept_by_the_next(tmp_path: Path) -> None:
    first = checkpoint.write(tmp_path, 1, fill)

    def broken(folder: Path) -> None:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path, 2, broken)
    assert checkpoint.latest(tmp_path) == (first, [])
    second = checkpoint.write(tmp_path, 2, fill)
    assert checkpoint.latest(tmp_path) == (second, [])


def test_a_full_disk_is_told_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    """A limit on file size makes the kernel refuse the write, as a full disk does."""
    first = checkpoint.write(tmp_path, 1, fill)
    script = f"""
    import resource, signal
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from vtrain.contract import CheckpointError
    from vtrain.train import checkpoint
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpoint.write(Path({str(tmp_path)!r}), 2, lambda f: save_file({{"w": torch.zeros(100_000)}}, f / "w.safetensors"))
    except CheckpointError as error:
        print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert "could not be written" in done.stdout
    assert str(first) in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.latest(tmp_path) == (first, [])


def test_the_manifest_lists_every_file_with_size_and_hash(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, 1, fill)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text(encoding="utf-8"))
    assert set(manifest["files"]) == {"state.json", "inner/weights.safetensors"}
    assert manifest["files"]["state.json"]["size"] == 11
