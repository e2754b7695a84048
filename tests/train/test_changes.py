"""What became of the data between a checkpoint and its resume, in words."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from vtrain.contract import CheckpointError, ClipShape, Size
from vtrain.data.index import Index, build
from vtrain.data.sample import Box, Sample
from vtrain.train.changes import FILE, SampleMarks, SamplesPiece, data_changes


def index(**contents: str) -> Index:
    """One sample for each name, its file's content as given."""
    samples = [
        Sample(name, "own", 0, name, 1, "1", Size(64, 64), Box(0, 0, 64, 64), ClipShape(9, 64, 64), 8.0, (0.0,), "center", (),
               content)
        for name, content in contents.items()
    ]  # fmt: skip
    return build(samples, lambda sample: ["00" * 32], lambda sample: ["00" * 32])


def told(old: SampleMarks | None, new: SampleMarks, before: str = "m", now: str = "m") -> list[str]:
    return [each.text for each in data_changes(before, now, old, new)]


def saved(folder: Path, of: Index) -> SampleMarks:
    piece = SamplesPiece(of)
    piece.write(folder, piece.gather(keep=True))
    found = SampleMarks.read(folder)
    assert found is not None
    return found


def test_samples_are_read_back_as_they_were_and_then_nothing_changed(tmp_path: Path) -> None:
    for of in (index(a="1", b="2", täglich="3"), index()):
        found = saved(tmp_path, of)
        assert found.names == SampleMarks.of(of).names
        assert np.array_equal(found.contents, of.contents)
        assert told(found, SampleMarks.of(of)) == []


def test_what_keeps_its_order_and_what_does_not_is_told_apart(tmp_path: Path) -> None:
    before = saved(tmp_path, index(a="1", b="2", c="3"))
    words = "the data changed since the checkpoint: "
    assert told(before, SampleMarks.of(index(a="1", b="x", c="y"))) == [
        words + "2 samples with other bytes (first: b). Training continues with it as it is, in the same order"
    ]
    assert told(before, SampleMarks.of(index(c="3", a="1")), now="n") == [
        words + "1 sample removed (b); 2 samples at another place in the order (first: c). "
        "Training continues with it as it is, in the new data's order"
    ]


def test_a_mask_that_was_cut_as_its_clip_was_is_not_told_beside_it() -> None:
    names = [b"a", b"b"]
    old, new = np.zeros((2, 4), np.uint32), np.array([[0, 1, 0, 1], [0, 0, 0, 1]], np.uint32)
    (text,) = told(SampleMarks(names, old), SampleMarks(names, new))
    assert "1 sample cut or scaled otherwise (a); 1 sample with another mask (b)" in text


def test_a_checkpoint_of_before_tells_by_its_mark_alone() -> None:
    new = SampleMarks.of(index(a="1"))
    assert told(None, new) == []
    assert "2 samples, ab -> 1 sample, cd" in told(None, new, "2 samples, ab", "1 sample, cd")[0]


def harmed(folder: Path, **arrays: np.ndarray) -> None:
    names, lengths = np.frombuffer(b"ab", np.uint8), np.array([1, 1], np.uint32)
    np.savez(folder / FILE, **{"names": names, "lengths": lengths, "contents": np.zeros((2, 4), np.uint32)} | arrays)


class Planted:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("planted",)


@pytest.mark.parametrize(
    "arrays",
    [
        {"lengths": np.array([1, 5], np.uint32)},
        {"lengths": np.array([1], np.uint32)},
        {"lengths": np.array([-1, 3])},
        {"contents": np.zeros((2, 3), np.uint32)},
        {"contents": np.zeros((2, 4))},
        {"names": np.zeros((1, 2), np.uint8)},
        {"names": np.array([Planted()], dtype=object)},
    ],
)
def test_samples_that_cannot_be_are_an_error_and_no_pickle_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict[str, np.ndarray]
) -> None:
    monkeypatch.chdir(tmp_path)
    harmed(tmp_path)
    assert SampleMarks.read(tmp_path) is not None
    harmed(tmp_path, **arrays)
    with pytest.raises(CheckpointError, match=r"samples\.npz: cannot be read"):
        SampleMarks.read(tmp_path)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("data", [b"", b"PK", b"torn", b"\x93NUMPY"])
def test_a_torn_file_of_samples_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"samples\.npz: cannot be read"):
        SampleMarks.read(tmp_path)
