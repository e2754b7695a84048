"""Scan and fill over hundreds of damaged files: no crash, no hang, memory within a bound, every file used or named."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from vtrain.data.caching.caches import fill_caches
from vtrain.data.decoding.process import DecodingProcess
from vtrain.data.scanning.decisions import settings_key
from vtrain.data.scanning.ledger import Ledger
from vtrain.data.scanning.scan import NotLoadable, find_torchcodec, scan

MOST_BYTES = 1280 << 20
"""Resident memory that no decoding process may reach. Half of it is torch's."""


@pytest.fixture
def kept_process() -> None:
    """Scan and filling start decoding processes of their own here."""


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Peak resident bytes of each decoding process when it is ended."""
    found: list[int] = []
    kill = DecodingProcess.kill

    def killing(process: DecodingProcess) -> None:
        with suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            found.extend(int(number) << 10 for number in re.findall(r"VmHWM:\s+(\d+) kB", status))
        kill(process)

    monkeypatch.setattr(DecodingProcess, "kill", killing)
    return found


@pytest.mark.long
@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
def test_every_damaged_file_is_used_or_named_and_none_does_harm(setup, peaks, decoder) -> None:
    """About 440 files are scanned, decoded and encoded, and listed again: some 10 seconds of CPU.

    The time limit per file is far above what any takes; one that reached it would be named with it.
    """
    name = "" if decoder == "pyav" else find_torchcodec()
    if isinstance(name, NotLoadable):
        pytest.skip(name.what)
    made = runpy.run_path(str(Path(__file__).with_name("corpus.py")))["make"](setup.folder)
    assert made >= 300
    dataset = setup.dataset(
        sizes=[(32, 24)], frames=9, min_frames=1, fps=10.0, captions="filename", missing_caption="empty", images=True,
        decode_timeout=20.0,
    )  # fmt: skip
    dataset = dataclasses.replace(dataset, decoder=name)
    plan = setup.plan(dataset)
    outside = {file: file.read_bytes() for file in (setup.root / "outside").iterdir()}
    before = {entry.name: entry.stat(follow_symlinks=False).st_mtime_ns for entry in os.scandir(setup.folder)}

    found = scan(plan)
    filled = fill_caches(plan, found.samples, (), "cpu", lambda _: None)

    (survey,) = filled.recount(found.survey).datasets
    left = sum(count for count, _ in survey.skipped.values())
    in_linked_folder = 1  # a link to a folder outside is followed: it holds a clip, and a text that is no caption here
    assert survey.files == made + in_linked_folder
    assert sum(survey.samples.values()) + left == survey.files
    assert len(filled.index) == sum(survey.samples.values())
    assert all(reason.strip() for reason in survey.skipped)
    with Ledger(setup.cache) as ledger:
        file_decisions = ledger.file_decisions(settings_key(dataset, plan.family))
    assert len(file_decisions) == survey.files
    assert all(file_decision.status == "used" or file_decision.reason for file_decision in file_decisions.values())
    hung = [ref for ref, file_decision in file_decisions.items() if "took longer" in file_decision.reason]
    assert hung == []

    # Each decoding process stayed within its bound, also at pictures that claim to have billions of pixels.
    assert peaks
    assert max(peaks) < MOST_BYTES

    # Sound files are used whatever they are called, and links are followed.
    used = {ref for ref, file_decision in file_decisions.items() if file_decision.status == "used"}
    assert {ref for ref in file_decisions if ref.startswith("sound ")} <= used
    for name in ("line\nbreak.mp4", "emoji 🎬🧨.mp4", "-rf.mp4", "--help.mp4", "$(touch gone).mp4", "x" * 251 + ".mp4",
                 "link to a clip.mp4", "link to a folder.mp4/clip.mp4", "concat:a|b.mp4"):  # fmt: skip
        assert name in used, (name, file_decisions[name])
    kinds = Counter(file_decision.kind for file_decision in file_decisions.values() if file_decision.status != "used")
    assert kinds["bad name"] == 2
    assert file_decisions["link to a text.mp4"].reason.startswith("cannot be read as a video")
    for name, reason in (
        ("link to nothing.mp4", "cannot be opened: No such file or directory"),
        ("link to itself.mp4", "cannot be opened: Too many levels of symbolic links"),
        ("pipe.mp4", "cannot be opened: is a pipe, a socket or a device, and no file"),
        ("socket.mp4", "cannot be opened: is a pipe, a socket or a device, and no file"),
        ("link to zeros.mp4", "cannot be opened: is a pipe, a socket or a device, and no file"),
        ("other 0.mp4", "is empty (0 bytes)"),
    ):
        assert file_decisions[name].reason == reason, name

    # What can be seen of the latents is finite, and nothing outside the cache was touched.
    for sample in list(found.samples)[::20]:
        if sample.ref_id in used:
            assert bool(torch.isfinite(filled.caches.latents(sample, sample.starts[0]).mean).all())
    assert {file: file.read_bytes() for file in (setup.root / "outside").iterdir()} == outside
    assert {entry.name: entry.stat(follow_symlinks=False).st_mtime_ns for entry in os.scandir(setup.folder)} == before
    assert not (Path.cwd() / "gone").exists()

    # A second run opens none of them again, and finds the same.
    dataset.backend.opened.clear()
    again = scan(plan)
    assert dataset.backend.opened == []
    assert again.survey.datasets[0].samples == survey.samples
    assert sum(count for count, _ in again.survey.datasets[0].skipped.values()) == left
