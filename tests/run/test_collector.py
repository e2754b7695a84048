"""The collector rests while a run loads, and nothing from before it is kept for ever."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from vtrain.run.collector import uncollected

SEEN = """
import gc, sys
from pydantic import Field
from vtrain.contract import DataBackendSpec, Options, hookimpl

def say(when):
    print(f"collector while {when}: {gc.isenabled()}", file=sys.stderr)

say("plugins load")

class NoOptions(Options):
    pass

class Nothing:
    location = "nowhere"
    def __init__(self, options): pass
    def refs(self):
        say("files are listed")
        return iter(())
    def open(self, ref): raise OSError("there are no files")

@hookimpl
def vtrain_data_backends():
    return [DataBackendSpec("nothing", "no file at all", NoOptions, Nothing)]
"""
CONFIG = """
[run]
output_dir = "out"
[model]
use = "toy"
train = "full"
[[data]]
use = "nothing"
[train]
steps = 1
[optimizer]
use = "adamw"
lr = 1.0
"""


class Ring:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_nothing_is_collected_inside_and_the_collector_works_again_afterwards() -> None:
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_collector_works_again_after_an_error_inside() -> None:
    with pytest.raises(RuntimeError), uncollected():
        raise RuntimeError
    assert gc.isenabled()


def test_garbage_from_before_is_freed_and_not_kept_with_what_stays() -> None:
    gc.disable()
    ring = weakref.ref(Ring())
    assert ring() is not None
    with uncollected():
        pass
    assert ring() is None


def test_garbage_from_before_stays_where_a_process_ends_at_once() -> None:
    gc.disable()
    ring = weakref.ref(Ring())
    with uncollected(collect_first=False):
        pass
    gc.collect()
    assert ring() is not None


@pytest.mark.parametrize("command", [("plugins", "list"), ("plugins", "show", "adamw"), ("config", "schema")])
def test_the_collector_rests_while_a_command_that_ends_at_once_loads_plugins(
    python: Callable[..., CompletedProcess[str]], install_plugin: Callable[..., Path], command: tuple[str, ...]
) -> None:
    folder = install_plugin("drum", "import gc\nprint('collector', gc.isenabled())")
    done = python("-m", "vtrain.cli", *command, path=(folder,))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["collector False"]


def test_the_collector_rests_while_a_plan_is_made_and_works_while_its_data_are_scanned(
    python: Callable[..., CompletedProcess[str]], install_plugin: Callable[..., Path], tmp_path: Path
) -> None:
    folder = install_plugin("seen", SEEN)
    (tmp_path / "config.toml").write_text(CONFIG)
    done = python("-m", "vtrain.cli", "plan", str(tmp_path / "config.toml"), path=(folder,))
    assert done.stderr.splitlines()[:2] == [
        "collector while plugins load: False",
        "collector while files are listed: True",
    ]


def test_what_is_made_inside_is_left_out_of_later_collections() -> None:
    before = gc.get_freeze_count()
    with uncollected():
        kept = [Ring() for _ in range(100)]
    assert gc.get_freeze_count() >= before + len(kept)


def test_garbage_made_afterwards_is_freed() -> None:
    with uncollected():
        pass
    ring = weakref.ref(Ring())
    gc.collect()
    assert ring() is None
