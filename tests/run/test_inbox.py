"""What people ask of a run: one Ctrl-C asks, a later one ends at once, an ignored one stays so; the control file; a call."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from vtrain.run import inbox as chapter
from vtrain.run.inbox import CONTROL, Inbox


def test_the_first_asks_and_a_later_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chapter, "ONE_PRESS", 0.05)
    before = signal.getsignal(signal.SIGINT)
    heard: list[str] = []
    inbox = Inbox(lambda: heard.append("once"))
    with inbox.listening():
        assert not inbox.stop
        os.kill(os.getpid(), signal.SIGINT)
        assert inbox.stop
        assert inbox.signal == signal.SIGINT
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert heard == ["once"]
    assert signal.getsignal(signal.SIGINT) == before


def test_two_at_once_are_one_wish() -> None:
    """A launcher passes on what its processes got from the terminal too."""
    inbox = Inbox()
    with inbox.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert inbox.signal == signal.SIGINT


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox = Inbox()
    try:
        with inbox.listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert not inbox.stop
            os.kill(os.getpid(), signal.SIGTERM)
            assert inbox.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_call_asks_without_a_signal_and_another_word_is_refused() -> None:
    inbox = Inbox()
    inbox.ask("save")
    assert (inbox.take(), inbox.take(), inbox.stop) == ((True, False), (False, False), False)
    inbox.ask("stop")
    assert (inbox.stop, inbox.signal) == (True, None)
    with pytest.raises(ValueError, match='stop, save, validate, not to "pause"'):
        inbox.ask("pause")


def test_the_control_file_asks_once_is_deleted_and_its_odd_words_are_told(tmp_path: Path) -> None:
    inbox, control = Inbox(), tmp_path / CONTROL
    control.write_text("stop")
    inbox.watch(tmp_path)
    assert (inbox.take(), inbox.stop) == ((False, False), False), "what an earlier run left is not asked of this one"
    control.write_text("")
    assert inbox.take() == (False, False)
    assert control.exists(), "whoever writes it has only opened it"
    control.write_text("validate save\nfly\n")
    assert inbox.take() == (True, True)
    assert inbox.complaints() == ['the control file asked for "fly"; its words are stop, save, validate']
    assert (inbox.complaints(), inbox.take(), control.exists()) == ([], (False, False), False)
    control.write_text("stop")
    inbox.take()
    assert inbox.stop
