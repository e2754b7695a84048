"""Scans of shards and manifests: what of them is damaged is told, and what did not change is not read again."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from vtrain.contract import DataBackend, DataError, SourceRef
from vtrain.data.scanning.scan import scan
from vtrain_builtin.manifest import MANIFEST
from vtrain_builtin.tar import TAR, TarOptions, TarShards


class CountingShards(TarShards):
    """Remembers which shards were listed and which members opened."""

    def __init__(self, options: TarOptions) -> None:
        super().__init__(options)
        self.listed: list[str] = []
        self.opened: list[str] = []

    def members(self, shard: SourceRef) -> Iterator[SourceRef]:
        self.listed.append(shard.id)
        return super().members(shard)

    def open(self, ref: SourceRef) -> BinaryIO:
        self.opened.append(ref.id)
        return super().open(ref)


def pack(path: Path, files: Mapping[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(target.getvalue())
    return target.getvalue()


@pytest.fixture(scope="module")
def clip(make_video: Callable[..., bytes]) -> bytes:
    return make_video()


def plan_on(setup: Any, backend: DataBackend) -> Any:
    return setup.plan(dataclasses.replace(setup.dataset(), backend=backend))


def clip_files(clip: bytes, *stems: str) -> dict[str, bytes]:
    return {f"{stem}{suffix}": data for stem in stems for suffix, data in ((".mp4", clip), (".txt", b"words"))}


def used(found: Any) -> list[str]:
    return [sample.ref_id for sample in found.samples]


def test_only_shards_that_changed_are_listed_and_their_new_members_opened(setup: Any, clip: bytes) -> None:
    pack(setup.folder / "s-0.tar", clip_files(clip, "a", "b"))
    pack(setup.folder / "s-1.tar", clip_files(clip, "c"))
    backend = CountingShards(TAR.options(path=str(setup.folder)))
    assert used(scan(plan_on(setup, backend))) == ["s-0.tar/a.mp4", "s-0.tar/b.mp4", "s-1.tar/c.mp4"]
    assert backend.listed == ["s-0.tar", "s-1.tar"]
    for expected, change in (([], None), (["s-1.tar"], "e")):
        backend.listed.clear()
        backend.opened.clear()
        if change:
            pack(setup.folder / "s-1.tar", clip_files(clip, "d", change))
        found = scan(plan_on(setup, backend))
        assert backend.listed == expected
        assert {name.partition("/")[0] for name in backend.opened} == set(expected)
    assert used(found) == ["s-0.tar/a.mp4", "s-0.tar/b.mp4", "s-1.tar/d.mp4", "s-1.tar/e.mp4"]
    (setup.folder / "s-0.tar").unlink()
    assert used(scan(plan_on(setup, backend))) == ["s-1.tar/d.mp4", "s-1.tar/e.mp4"]


def test_what_is_damaged_in_shards_is_told_and_the_rest_is_used(setup: Any, clip: bytes) -> None:
    whole = pack(setup.folder / "s-0.tar", clip_files(clip, "a", "b"))
    (setup.folder / "s-0.tar").write_bytes(whole[: whole.index(b"b.mp4") + 512 + 1000])
    (setup.folder / "s-1.tar").write_bytes(b"no tar at all" * 100)
    pack(setup.folder / "s-2.tar", clip_files(clip, "c"))
    found = scan(plan_on(setup, TAR.build(TAR.options(path=f"{setup.folder}/s-{{0..3}}.tar"))))
    assert used(found) == ["s-0.tar/a.mp4", "s-2.tar/c.mp4"]
    left = {example: reason for reason, (_, example) in found.survey.datasets[0].skipped.items()}
    assert {name for name in left if "damaged" not in name} == {"s-0.tar/b.mp4", "s-1.tar", "s-3.tar"}
    assert "ends in the middle of it" in left["s-0.tar/b.mp4"]
    pack(setup.folder / "s-1.tar", clip_files(clip, "d"))
    pack(setup.folder / "s-0.tar", clip_files(clip, "a", "b"))
    mended = scan(plan_on(setup, TAR.build(TAR.options(path=f"{setup.folder}/s-{{0..3}}.tar"))))
    assert used(mended) == ["s-0.tar/a.mp4", "s-0.tar/b.mp4", "s-1.tar/d.mp4", "s-2.tar/c.mp4"]


def test_a_manifests_captions_are_the_clips_and_a_changed_one_is_noticed(setup: Any, clip: bytes) -> None:
    (setup.folder / "a.mp4").write_bytes(clip)
    (setup.folder / "b.mp4").write_bytes(clip)
    table = setup.folder / "t.csv"
    table.write_text("path,caption,motion_score\na.mp4,one,3\na.mp4,two,3\nb.mp4,,\nnone.mp4,x,\n")
    backend = MANIFEST.build(MANIFEST.options(path=str(table)))
    found = scan(plan_on(setup, backend))
    (sample,) = found.samples
    assert [caption.text for caption in sample.captions] == ["one", "two"]
    assert sample.captions[0].extras == {"motion_score": 3}
    left = {example: reason for reason, (_, example) in found.survey.datasets[0].skipped.items()}
    assert left.keys() == {"b.mp4", "none.mp4"}
    table.write_text("path,caption\na.mp4,three\nb.mp4,four\n")
    again = [[caption.text for caption in sample.captions] for sample in scan(plan_on(setup, backend)).samples]
    assert again == [["three"], ["four"]]


def test_a_manifest_without_the_caption_column_stops_with_the_columns_it_has(setup: Any, clip: bytes) -> None:
    (setup.folder / "a.mp4").write_bytes(clip)
    (setup.folder / "t.csv").write_text("path,text\na.mp4,one\n")
    with pytest.raises(DataError, match=r'no column "caption".*data\.columns\.caption.*"path", "text"'):
        scan(plan_on(setup, MANIFEST.build(MANIFEST.options(path=str(setup.folder / "t.csv")))))
