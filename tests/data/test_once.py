"""A remote file is fetched once for all its windows."""

import dataclasses
import io

import pytest
import torch

from vtrain.contract import SourceRef
from vtrain.data.caching.caches import fill_caches
from vtrain.data.decoding.spool import Copies
from vtrain.data.scanning.scan import scan


class Far:
    """A storage that is not this machine's: it gives streams, and counts the files that are opened."""

    location = "far://clips"

    def __init__(self, near) -> None:
        self.near, self.opened = near, list[str]()

    def refs(self):
        return self.near.refs()

    def open(self, ref: SourceRef):
        self.opened.append(ref.id)
        with self.near.open(ref) as stream:
            return io.BytesIO(stream.read())


def test_all_windows_of_a_file_are_decoded_from_one_fetch_and_as_those_of_a_local_one(setup, make_video) -> None:
    for k in range(2):
        setup.add(f"{k}.mp4", make_video(frames=100 + k, fps=24))
    near = setup.dataset(video={"window": "random", "windows": 3})
    far = dataclasses.replace(near, backend=Far(near.backend))
    plan = setup.plan(far)
    found = scan(plan)
    far.backend.opened.clear()
    filled = fill_caches(plan, found.samples, (), "cpu", lambda *_: None)
    assert setup.family.clips == 6
    assert far.backend.opened == ["0.mp4", "1.mp4"]
    plan = setup.plan(near)
    again = fill_caches(plan, scan(plan).samples, (), "cpu", lambda *_: None)
    assert setup.family.clips == 6  # the same bytes, windows and pixels: the same entries
    keys = [again.index.video.keys(number) for number in range(2)]
    assert keys == [filled.index.video.keys(number) for number in range(2)]
    assert len({key for row in keys for key in row}) == 6
    means = torch.cat([filled.caches.video_entries([key]).mean for row in keys for key in row])
    assert len({mean.sum().item() for mean in means}) > 2


def test_only_the_newest_copies_are_kept_and_all_go_at_the_end(setup) -> None:
    for k in range(5):
        (setup.folder / f"{k}.bin").write_bytes(bytes([k]) * 10)
    far = Far(setup.dataset().backend)
    refs = list(far.refs())
    with Copies(keep=2) as copies:
        backend = copies.of(far)
        for ref in [refs[0], refs[0], refs[1], refs[0], refs[2], refs[0], refs[1]]:
            with backend.open(ref) as stream:
                assert stream.read() == bytes([int(ref.id[0])]) * 10
        folder = copies._folder.name
    assert far.opened == ["0.bin", "1.bin", "2.bin", "1.bin"]
    with pytest.raises(FileNotFoundError):
        open(folder)  # noqa: PTH123, SIM115
