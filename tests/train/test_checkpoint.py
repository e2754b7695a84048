"""Checkpoints: whole or not there, verified, pruned only after the new one is sound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vtrain.contract import CheckpointError
from vtrain.train import checkpoint
from vtrain.train.piece import Copies, Keep, State
from vtrain.train.pieces import RegularizerPiece


@dataclass(frozen=True)
class Text:
    """A piece of one small file. declared: the files that it says it has."""

    name: str
    text: str = '{"step": 1}'
    file: str = "state.json"
    declared: tuple[str, ...] = ("state.json",)
    bytes: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        return self.declared

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        return State(values={"text": self.text} if keep else {})

    def write(self, folder: Path, state: State) -> None:
        if self.file:
            (folder / self.file).write_text(state.values["text"], encoding="utf-8")

    def load(self, folder: Path) -> None:
        raise AssertionError("not loaded here")


@dataclass(frozen=True)
class Weights:
    """A piece of tensors in a folder of its own, whose files only it knows. log: what was asked of it, in order."""

    log: list[str]
    fails: type[BaseException] | None = None
    count: int = 1000
    name: str = "weights"
    files: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return 4 * self.count

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        self.log.append(f"gather {bool(keep)}")
        return State({"w": torch.arange(float(self.count))}) if keep else State()

    def write(self, folder: Path, state: State) -> None:
        self.log.append("write")
        (folder / "inner").mkdir()
        save_file(dict(state.tensors), folder / "inner" / "weights.safetensors")
        if self.fails is not None:
            raise self.fails("no more")

    def load(self, folder: Path) -> None:
        self.log.append(f"load {folder.name}")


PIECES = (Weights([]), Text("counters"))


def test_a_written_checkpoint_verifies_and_leaves_nothing_aside(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, 12, PIECES)
    assert folder.name == "step-000012"
    assert checkpoint.fault(folder) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-000012"]
    assert torch.equal(load_file(folder / "inner" / "weights.safetensors")["w"], torch.arange(1000.0))


@pytest.mark.parametrize("byte", [0, 1000, -1])
def test_a_flipped_byte_is_found_and_the_file_named(tmp_path: Path, byte: int) -> None:
    folder = checkpoint.write(tmp_path, 1, PIECES)
    path = folder / "inner" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)
    assert "inner/weights.safetensors is damaged" in (checkpoint.fault(folder) or "")


def test_a_missing_a_short_and_an_unfinished_file_are_each_found(tmp_path: Path) -> None:
    missing, short, unfinished, nonsense = (checkpoint.write(tmp_path, step, PIECES) for step in (1, 2, 3, 4))
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
    older, newer = checkpoint.write(tmp_path, 9, PIECES), checkpoint.write(tmp_path, 1000000, PIECES)
    assert checkpoint.latest(tmp_path) == (newer, [])
    (newer / "state.json").write_text('{"step": 2}', encoding="utf-8")
    folder, faults = checkpoint.latest(tmp_path)
    assert folder == older
    assert [fault.folder for fault in faults] == [newer]


def test_prune_keeps_the_newest_and_only_once_the_new_one_verifies(tmp_path: Path) -> None:
    folders = [checkpoint.write(tmp_path, step, PIECES) for step in (1, 2, 3, 4)]
    (folders[3] / "state.json").write_text("damaged", encoding="utf-8")
    with pytest.raises(CheckpointError, match="did not verify"):
        checkpoint.prune(tmp_path, 2, folders[3])
    assert len(checkpoint.steps_saved(tmp_path)) == 4
    folders[3] = checkpoint.write(tmp_path, 4, PIECES)
    assert checkpoint.prune(tmp_path, 2, folders[3]) == folders[:2]
    assert [path for _, path in checkpoint.steps_saved(tmp_path)] == folders[2:]
    assert checkpoint.prune(tmp_path, "all", folders[3]) == []


def test_later_checkpoints_are_set_aside_and_not_lost(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, step, PIECES)
    moved = checkpoint.set_aside(tmp_path, after=1)
    assert [path.name for path in moved] == ["step-000002.left-behind-1", "step-000003.left-behind-1"]
    assert all(checkpoint.fault(path) is None for path in moved)
    assert checkpoint.latest(tmp_path)[0] == tmp_path / "step-000001"


def test_later_checkpoints_are_set_aside_the_newest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in between, those that are left follow each other as they did."""
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, step, PIECES)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "step-000002":
            raise OSError("no more")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no more"):
        checkpoint.set_aside(tmp_path, after=1)
    assert [step for step, _ in checkpoint.steps_saved(tmp_path)] == [1, 2]


def test_what_was_not_finished_goes_and_nothing_else(tmp_path: Path) -> None:
    left = ("step-000002.partial", "step-000001.old.partial")
    stays = ("step-000003", "step-000004.left-behind-1", "mine.partial", "step-1.partial", "step-000002.mine.partial")
    for name in (*left, *stays):
        (tmp_path / name / "inner").mkdir(parents=True)
    checkpoint.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(stays)
    checkpoint.sweep(tmp_path / "nowhere")


def test_an_interrupted_write_leaves_the_earlier_checkpoint_and_is_swept_by_the_next(tmp_path: Path) -> None:
    first = checkpoint.write(tmp_path, 1, PIECES)

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path, 2, (Text("counters"), Weights([], KeyboardInterrupt)))
    assert checkpoint.latest(tmp_path) == (first, [])
    second = checkpoint.write(tmp_path, 2, PIECES)
    assert checkpoint.latest(tmp_path) == (second, [])


def test_a_full_disk_is_told_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    """A limit on file size makes the kernel refuse the write, as a full disk does."""
    first = checkpoint.write(tmp_path, 1, PIECES)
    script = f"""
    import resource, signal
    from pathlib import Path
    from torch import nn
    from vtrain.contract import CheckpointError
    from vtrain.train import checkpoint
    from vtrain.train.pieces import RegularizerPiece
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpoint.write(Path({str(tmp_path)!r}), 2, [RegularizerPiece("w", nn.Linear(100_000, 1))])
    except CheckpointError as error:
        print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert "could not be written" in done.stdout
    assert (
        f"The newest sound checkpoint is {first}. Make room on the disk: a checkpoint takes 390.6 KiB." in done.stdout
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.latest(tmp_path) == (first, [])


def test_the_manifest_lists_every_file_with_size_and_hash_and_whose_it_is(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, 1, PIECES)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text(encoding="utf-8"))
    assert set(manifest["files"]) == {"state.json", "inner/weights.safetensors"}
    assert manifest["files"]["state.json"]["size"] == 11
    assert manifest["pieces"] == {"weights": ["inner/weights.safetensors"], "counters": ["state.json"]}


Change = Callable[[dict[str, Any]], Any]
SIZE_AND_HASH = {"size": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}


def changed(tmp_path: Path, change: Change) -> Path:
    """A checkpoint whose manifest has passed through `change`, which changes it in place or gives another one."""
    folder = checkpoint.write(tmp_path, 1, PIECES)
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    other = change(manifest)
    path.write_text(json.dumps(manifest if other is None else other), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda manifest: manifest["files"].clear(), "its MANIFEST.json lists no file"),
        (lambda manifest: manifest.update(pieces={}), "its MANIFEST.json lists no file"),
        (lambda manifest: manifest["pieces"].update(ema=[]), "its MANIFEST.json lists no file of ema"),
        (
            lambda manifest: manifest.update(files=["state.json"]),
            'its MANIFEST.json cannot be read: files is ["state.json"]: ',
        ),
        (lambda manifest: manifest.update(files=None), "its MANIFEST.json cannot be read: files is null: "),
        (lambda manifest: manifest.pop("files") and None, "its MANIFEST.json cannot be read: files: field required"),
        (lambda manifest: manifest["files"].update(a=1), "its MANIFEST.json cannot be read: files.a is 1: "),
        (
            lambda manifest: manifest["files"].update(a={"size": 1}),
            "its MANIFEST.json cannot be read: files.a.sha256: ",
        ),
        (lambda manifest: manifest.update(pieces=[]), "its MANIFEST.json cannot be read: pieces is []: "),
        (lambda manifest: [1], "its MANIFEST.json cannot be read: all of it is [1]: "),
        (lambda manifest: manifest.pop("format") and None, "its MANIFEST.json cannot be read: format: field required"),
        (lambda manifest: manifest.update(format=True), "its MANIFEST.json cannot be read: format is true: "),
        (
            lambda manifest: manifest["files"]["state.json"].update(size=-1),
            "its MANIFEST.json cannot be read: files.state.json.size is -1: ",
        ),
        (
            lambda manifest: manifest["files"]["state.json"].update(size="11"),
            'its MANIFEST.json cannot be read: files.state.json.size is "11": ',
        ),
        (
            lambda manifest: manifest["files"]["state.json"].update(sha256="e3"),
            'its MANIFEST.json cannot be read: files.state.json.sha256 is "e3": ',
        ),
        (lambda manifest: manifest.update(format=2), "its format is 2, and this vtrain reads 1"),
    ],
)
def test_a_manifest_that_is_none_is_told_with_what_is_wrong_in_it(tmp_path: Path, change: Change, reason: str) -> None:
    assert (checkpoint.fault(changed(tmp_path, change)) or "").startswith(reason)


@pytest.mark.parametrize(
    "name",
    ["../outside", "inner/../state.json", "/etc/passwd", "inner//weights.safetensors", "./state.json", "", ".", "..",
     "C:/outside", "c:outside", "..\\outside", "inner\\weights.safetensors", "MANIFEST.json"],
)  # fmt: skip
def test_a_path_that_leads_out_of_the_folder_or_is_oddly_spelt_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "outside").write_text("", encoding="utf-8")
    folder = changed(tmp_path, lambda manifest: manifest["files"].update({name: SIZE_AND_HASH}))
    monkeypatch.setattr(checkpoint, "read_through", lambda path: pytest.fail(f"{path} was read"))
    expected = f"its MANIFEST.json lists {name!r}, which is no path of a file in the folder"
    assert checkpoint.fault(folder) == expected


def test_a_file_that_a_piece_must_have_is_missed_though_the_list_of_files_says_nothing_of_it(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda manifest: manifest["files"].pop("state.json") and None)
    (folder / "state.json").unlink()
    assert checkpoint.fault(folder) == "its MANIFEST.json does not list state.json, which counters must have"


@pytest.mark.parametrize("name", ["extra.txt", "inner/more.safetensors", "deep/er/MANIFEST.json", ".hidden", "x.tmp"])
def test_a_file_that_the_manifest_does_not_list_is_found_and_named(tmp_path: Path, name: str) -> None:
    folder = checkpoint.write(tmp_path, 1, PIECES)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("", encoding="utf-8")
    assert checkpoint.fault(folder) == f"it holds {name}, which its MANIFEST.json does not list"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes in folders")
def test_what_is_no_regular_file_is_foreign_and_never_read(tmp_path: Path) -> None:
    piped, dangling, replaced = (checkpoint.write(tmp_path, step, PIECES) for step in (1, 2, 3))
    os.mkfifo(piped / "pipe")
    (dangling / "link").symlink_to(tmp_path / "nowhere")
    (replaced / "state.json").unlink()
    os.mkfifo(replaced / "state.json")
    assert checkpoint.fault(piped) == "it holds pipe, which its MANIFEST.json does not list"
    assert checkpoint.fault(dangling) == "it holds link, which its MANIFEST.json does not list"
    assert checkpoint.fault(replaced) == "state.json is missing"


@pytest.mark.parametrize("name", [".DS_Store", "inner/._weights.safetensors", "Thumbs.db", "desktop.ini", ".directory"])
def test_what_a_file_manager_leaves_harms_no_checkpoint(tmp_path: Path, name: str) -> None:
    """Also where an older vtrain listed it and it has changed since."""
    folder = changed(tmp_path, lambda manifest: manifest["files"].update({name: SIZE_AND_HASH}))
    assert checkpoint.fault(folder) is None
    (folder / name).write_text("changed", encoding="utf-8")
    assert checkpoint.fault(folder) is None


def test_a_checkpoint_whose_files_lie_elsewhere_behind_links_is_sound_and_still_checked(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path / "run", 1, PIECES)
    moved = (folder / "inner").rename(tmp_path / "larger disk")
    (folder / "inner").symlink_to(moved, target_is_directory=True)
    assert checkpoint.fault(folder) is None
    (moved / "more").write_text("", encoding="utf-8")
    assert checkpoint.fault(folder) == "it holds inner/more, which its MANIFEST.json does not list"
    (moved / "more").unlink()
    (moved / "round").symlink_to(folder, target_is_directory=True)
    assert checkpoint.fault(folder) is None, "a link that leads back was walked without end"


def test_a_checkpoint_from_before_pieces_were_listed_is_sound(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda manifest: manifest.pop("pieces") and None)
    assert checkpoint.fault(folder) is None


def test_a_piece_whose_file_is_not_there_is_an_error_before_any_piece_is_loaded(tmp_path: Path) -> None:
    weights = Weights([])
    folder = checkpoint.write(tmp_path, 1, (weights,))
    with pytest.raises(CheckpointError, match=r"step-000001: this checkpoint has no state\.json, which counters must"):
        checkpoint.load(folder, (weights, Text("counters")))
    checkpoint.load(folder, (weights,))
    assert weights.log == ["gather True", "write", "load step-000001"]


@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        (Text("ema", file=""), "ema wrote no state.json"),
        (Text("ema", file="", declared=()), "ema wrote no file"),
        (Text("ema", file="other.json"), "ema wrote no state.json"),
        (
            Text("ema", declared=("inner/weights.safetensors",)),
            "another piece than ema wrote its inner/weights.safetens",
        ),
    ],
)
def test_a_piece_that_writes_other_files_than_its_own_makes_no_checkpoint(
    tmp_path: Path, piece: Text, reason: str
) -> None:
    first = checkpoint.write(tmp_path, 1, PIECES)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.write(tmp_path, 2, (Weights([]), piece))
    assert f"step-000002: the checkpoint could not be written: {reason}" in str(caught.value)
    assert f"The newest sound checkpoint is {first}." in str(caught.value)
    assert "Make room" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [first]


def test_pieces_are_gathered_one_after_the_other_and_all_of_them_also_when_a_write_fails(tmp_path: Path) -> None:
    """The other processes gather every piece and would wait for ever for a first one that has given up."""
    log: list[str] = []
    pieces = [Weights(log, name="a"), Weights(log, fails=OSError, name="b"), Weights(log, name="c")]
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoint.write(tmp_path, 1, pieces[1:])
    assert log == ["gather True", "write", "gather False"]
    log.clear()
    (tmp_path / "file").write_text("in the way of the folder", encoding="utf-8")
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoint.write(tmp_path / "file", 1, pieces)
    assert log == ["gather False"] * 3


def test_the_state_of_one_piece_is_gone_from_memory_before_the_next_is_gathered(tmp_path: Path) -> None:
    """Weights and moments of a large model, gathered from a card, would not fit beside each other."""
    gathered: list[weakref.ref[State]] = []

    class Watched(Weights):
        def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
            assert not [state for state in gathered if state() is not None]
            state = super().gather(keep=keep)
            gathered.append(weakref.ref(state))
            return state

        def write(self, folder: Path, state: State) -> None:
            save_file(dict(state.tensors), folder / f"{self.name}.safetensors")

    checkpoint.write(tmp_path, 1, [Watched([], name=name) for name in ("a", "b", "c")])
    assert len(gathered) == 3


def test_every_byte_is_read_at_most_twice_for_a_checkpoint_that_lets_an_older_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the manifest, and once more to see that it can be read back before what it replaces is deleted."""
    read: dict[str, int] = {}
    real = Path.open

    def counting(self: Path, mode: str = "r", *more: Any, **settings: Any) -> Any:
        file = real(self, mode, *more, **settings)
        if "b" not in mode:
            return file
        block = file.read

        def count(size: int = -1) -> bytes:
            got: bytes = block(size)
            read[self.name] = read.get(self.name, 0) + len(got)
            return got

        return CountedFile(file, count)

    older = checkpoint.write(tmp_path, 1, PIECES)
    sizes = {path.name: path.stat().st_size for path in older.rglob("*") if path.is_file() and path.suffix != ""}
    sizes.pop(checkpoint.MANIFEST)
    monkeypatch.setattr(Path, "open", counting)
    newer = checkpoint.write(tmp_path, 2, PIECES)
    assert read == sizes
    assert checkpoint.prune(tmp_path, "all", newer) == []
    assert checkpoint.prune(tmp_path, 2, newer) == []
    assert read == sizes, "it was verified though nothing was to be deleted"
    assert checkpoint.prune(tmp_path, 1, newer) == [older]
    assert read == {name: 2 * size for name, size in sizes.items()}


class CountedFile:
    """A file whose reads pass through `read`."""

    def __init__(self, file: Any, read: Callable[[int], bytes]) -> None:
        self.file, self.read = file, read

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def test_all_files_have_the_rights_of_any_new_file(tmp_path: Path) -> None:
    """safetensors makes its own readable by their owner alone."""
    folder = checkpoint.write(tmp_path, 1, [RegularizerPiece("w", nn.Linear(2, 2)), *PIECES])
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    assert {path.name: path.stat().st_mode for path in folder.rglob("*") if path.is_file()} == {
        path.name: expected for path in folder.rglob("*") if path.is_file()
    }
