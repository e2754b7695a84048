"""A decoder that dies or hangs, in a run: its file is recorded as failed, and the run goes on in a new process.

The process really dies. A sitecustomize on its path looks at the last bytes of each file (behind the boxes of a sound
MP4) and does what they say: in the probe, or only when the clip is decoded.
"""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest

from vtrain.contract import DataError
from vtrain.data.caching.caches import fill_caches
from vtrain.data.scanning.decisions import settings_key
from vtrain.data.scanning.ledger import FileDecision, Ledger
from vtrain.data.scanning.scan import scan

STUB = """
import os, signal, sys, time
from contextlib import contextmanager
from vtrain.data.decoding import video

real = video.open_video

@contextmanager
def open_video(stream, *rest):
    stream.seek(-8, os.SEEK_END)
    word = stream.read(8)
    stream.seek(0)
    if word == b"killsoon" or (word == b"killlate" and "vtrain.data.decoding.decode" in sys.modules):
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == b"stopsoon" or (word == b"stoplate" and "vtrain.data.decoding.decode" in sys.modules):
        time.sleep(1000)
    with real(stream, *rest) as opened:
        yield opened

video.open_video = open_video
"""


@pytest.fixture
def kept_process() -> None:
    """Scan and filling start decoding processes of their own here."""


@pytest.fixture
def crashes(setup, make_video, tmp_path, monkeypatch) -> Callable[[], dict[str, FileDecision]]:
    """Six clips, four of which do harm; gives what became of them."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "sitecustomize.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path / "stub"))
    for number, word in enumerate([b"harmless", b"killsoon", b"killlate", b"stopsoon", b"stoplate", b"harmless"]):
        setup.add(f"{number}.mp4", make_video(frames=27) + b"\0\0\0\x10free" + word)

    def file_decisions() -> dict[str, FileDecision]:
        with Ledger(setup.cache) as ledger:
            return ledger.file_decisions(settings_key(setup.dataset(decode_timeout=3.0), setup.family))

    return file_decisions


CRASHED = "its decoder crashed (SIGSEGV)"
HUNG = "decoding it took longer than 3 seconds (data.decode_timeout) and was stopped"


def decoders() -> set[int]:
    """Numbers of this process's decoding processes."""
    children = psutil.Process().children()
    return {child.pid for child in children if "vtrain.data.decoding.worker_process" in " ".join(child.cmdline())}


@pytest.mark.long
def test_a_run_goes_on_and_the_files_are_failed_with_what_their_decoder_did(setup, crashes) -> None:
    shared = decoders()  # those that other tests share
    plan = setup.plan(setup.dataset(decode_timeout=3.0))
    found = scan(plan)
    assert [sample.ref_id for sample in found.samples] == ["0.mp4", "2.mp4", "4.mp4", "5.mp4"]
    filled = fill_caches(plan, found.samples, (), "cpu", lambda _: None)
    assert [filled.index.id(number) for number in range(len(filled.index))] == ["clips/0.mp4", "clips/5.mp4"]
    assert {ref: (file_decision.status, file_decision.reason) for ref, file_decision in crashes().items()} == {
        "0.mp4": ("used", ""), "1.mp4": ("failed", CRASHED), "2.mp4": ("failed", CRASHED),
        "3.mp4": ("failed", HUNG), "4.mp4": ("failed", HUNG), "5.mp4": ("used", ""),
    }  # fmt: skip
    assert decoders() <= shared

    # The next run does not try them again.
    plan.datasets[0].backend.opened.clear()
    again = scan(plan)
    fill_caches(plan, again.samples, (), "cpu", lambda _: None)
    assert plan.datasets[0].backend.opened == []


def test_a_crash_stops_the_run_where_bad_files_shall(setup, crashes) -> None:
    with pytest.raises(DataError) as caught:
        scan(setup.plan(setup.dataset(decode_timeout=3.0, on_bad_file="stop")))
    assert [problem.what for problem in caught.value.problems] == [f"{CRASHED}.", f"{HUNG}."]
