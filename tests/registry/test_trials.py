"""Plugins that no `except` survives: each is tried in a process of its own first, and what came of it is remembered."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from vtrain.contract import ConfigError
from vtrain.registry import discover, trials
from vtrain.registry.discovery import Installed, installed

InstallPlugin = Callable[..., Path]

GOOD = """
from vtrain.contract import Options, TrackerSpec, hookimpl

class Nothing(Options):
    pass

@hookimpl
def vtrain_trackers():
    {first}
    return [TrackerSpec("{name}", "a tracker for tests", Nothing, lambda options: None)]
"""


def good(name: str, first: str = "pass") -> str:
    return GOOD.replace("{name}", name).replace("{first}", first)


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Imports have two seconds, and what comes of them is remembered in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("VTRAIN_PLUGIN_TIMEOUT", "2")
    return tmp_path / "caches" / "vtrain"


class Trials:
    """Stands in for the processes. names: of the plugins that were tried. reason: what comes of each."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.reason: str | None = ""

    def __call__(self, plugins: Sequence[Installed], limit: float) -> list[str | None]:
        self.names += [plugin.entry.name for plugin in plugins]
        return [self.reason for _ in plugins]

    def of(self, *names: str) -> list[str]:
        """Which plugins a discovery of these tries."""
        self.names.clear()
        discover(names)
        return list(self.names)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Trials:
    made = Trials()
    monkeypatch.setattr(trials, "tried_apart", made)
    return made


LEAVES = "import os, sys; sys.stderr.write('no device here\\n\\n'); sys.stderr.flush(); os._exit(0)"
FATAL = {
    "hangs": good("hangs", "import time; time.sleep(600)"),
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "stays": "import threading, time; threading.Thread(target=time.sleep, args=(600,)).start()\n" + good("stays"),
}
LATER = "VTRAIN_PLUGIN_TIMEOUT=4 vtrain plugins list"
REASONS = {
    "hangs": f"its import takes longer than 2 s. To give it more time: {LATER}",
    "leaves": f"it ends Python, with exit code 0, when it is imported and says: no device here. To try it again: {LATER}",
    "crashes": f"it crashes Python, by SIGSEGV, when it is imported. To try it again: {LATER}",
    "stays": "after its import Python does not end within 2 s: a thread that it started keeps running. "
    f"To give it more time: {LATER}",
}


def test_plugins_that_hang_end_or_crash_python_are_rows_that_name_them_and_others_register(
    install_plugin: InstallPlugin, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, source in FATAL.items():
        install_plugin(name, source)
    started = tmp_path / "started"
    starts = f"import subprocess; open({str(started)!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid))"
    install_plugin("leaves", f"{starts}\n{LEAVES}")
    install_plugin("well", good("well"))
    monkeypatch.setattr(trials, "NOTICE_S", 0.3)
    names = [*REASONS, "well"]
    catalog = discover(names)
    rows = [each for each in catalog.failures if each.entry_point in names]
    assert {row.entry_point: row.reason for row in rows} == REASONS
    assert all((row.distribution, row.version) == (row.entry_point, "1.0") for row in rows)
    assert catalog.find("tracker", "well") is not None
    said = capfd.readouterr().err
    assert 'waiting up to 2 s for plugin "hangs" of hangs 1.0 to be imported (VTRAIN_PLUGIN_TIMEOUT)\n' in said

    monkeypatch.setattr(trials, "tried_apart", lambda plugins, limit: [None for _ in plugins])
    assert discover(names).failures == catalog.failures, "remembered"
    state, end = Path(f"/proc/{started.read_text()}/stat"), time.monotonic() + 60
    while state.exists() and " Z " not in state.read_text():
        assert time.monotonic() < end, "what a plugin started goes with its trial"
        time.sleep(0.01)


def test_what_came_through_is_tried_again_when_a_file_of_it_changes(
    install_plugin: InstallPlugin, tried: Trials
) -> None:
    folder = install_plugin("well", good("well"))
    assert tried.of("well") == ["well"]
    assert tried.of("well") == []
    (folder / "well_plugin.py").write_text(good("well") + "# another line\n")
    assert tried.of("well") == ["well"]
    assert tried.of("well") == []


def test_a_package_of_an_editable_install_is_watched_whole(install_plugin: InstallPlugin, tried: Trials) -> None:
    """Its RECORD lists a .pth alone."""
    folder = install_plugin("well", "")
    (folder / "well-1.0.dist-info" / "RECORD").write_text("_well.pth,,\nwell-1.0.dist-info/RECORD,,\n")
    (folder / "well_plugin.py").unlink()
    package = folder / "well_plugin" / "deep"
    package.mkdir(parents=True)
    (folder / "well_plugin" / "__init__.py").write_text(good("well"))
    assert tried.of("well") == ["well"]
    (package / "weights.json").write_text("{}")
    assert tried.of("well") == ["well"]
    (folder / "well_plugin" / "__pycache__").mkdir(exist_ok=True)
    (folder / "well_plugin" / "__pycache__" / "x.pyc").write_bytes(b"")
    assert tried.of("well") == []


def test_files_that_the_distribution_lists_beside_its_package_are_watched(
    install_plugin: InstallPlugin, tried: Trials
) -> None:
    folder = install_plugin("well", good("well"))
    (folder / "well-1.0.dist-info" / "RECORD").write_text("well_plugin.py,,\nits_helper.py,,\n")
    assert tried.of("well") == ["well"]
    (folder / "its_helper.py").write_text("")
    assert tried.of("well") == ["well"]
    assert tried.of("well") == []


def test_a_package_in_a_namespace_is_watched_and_its_neighbours_are_not(
    install_plugin: InstallPlugin, tried: Trials
) -> None:
    folder = install_plugin("well", "")
    (folder / "well-1.0.dist-info" / "entry_points.txt").write_text("[vtrain.v1]\nwell = some_band.well\n")
    for package in ("well", "other"):
        (folder / "some_band" / package).mkdir(parents=True)
        (folder / "some_band" / package / "__init__.py").write_text(good("well"))
    assert tried.of("well") == ["well"]
    (folder / "some_band" / "other" / "more.py").write_text("")
    assert tried.of("well") == []
    (folder / "some_band" / "well" / "more.py").write_text("")
    assert tried.of("well") == ["well"]


def test_what_failed_is_tried_again_when_it_changes_has_more_time_or_is_on_another_machine(
    install_plugin: InstallPlugin, tried: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install_plugin("bad", good("bad"))
    tried.reason = "it hangs"
    assert tried.of("bad") == ["bad"]
    assert tried.of("bad") == []
    monkeypatch.setenv("VTRAIN_PLUGIN_TIMEOUT", "0.5")
    assert tried.of("bad") == []
    monkeypatch.setenv("VTRAIN_PLUGIN_TIMEOUT", "3")
    assert tried.of("bad") == ["bad"]
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(os, "uname", lambda: SimpleNamespace(nodename="another"))
        assert tried.of("bad") == ["bad"]
    (folder / "more.py").write_text("")
    (folder / "bad_plugin.py").write_text("\n" + good("bad"))
    tried.reason = ""
    assert tried.of("bad") == ["bad"]
    assert discover(["bad"]).find("tracker", "bad") is not None


def test_a_package_that_was_installed_since_lets_all_be_tried_again(
    install_plugin: InstallPlugin, tried: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setattr(trials.site, "getsitepackages", lambda: [str(packages)])
    install_plugin("well", good("well"))
    assert tried.of("well") == ["well"]
    (packages / "a_library").mkdir()
    assert tried.of("well") == ["well"]


def test_plugins_that_are_refused_are_not_tried(install_plugin: InstallPlugin, tried: Trials) -> None:
    install_plugin("shut", good("shut"))
    install_plugin("future", good("future"), group="vtrain.v2")
    assert tried.of("future") == []


def test_a_limit_of_zero_tries_nothing(
    install_plugin: InstallPlugin, tried: Trials, monkeypatch: pytest.MonkeyPatch, memory: Path
) -> None:
    monkeypatch.setenv("VTRAIN_PLUGIN_TIMEOUT", "0")
    install_plugin("well", good("well"))
    assert tried.of("well") == []
    assert not memory.exists()


@pytest.mark.parametrize("said", ["soon", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_of_seconds_is_an_error(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTRAIN_PLUGIN_TIMEOUT", said)
    with pytest.raises(ConfigError, match=f'VTRAIN_PLUGIN_TIMEOUT is "{said}", which is no number of seconds'):
        discover([])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {"mark": 1}}', "null", "\x00"])
def test_a_memory_that_is_none_is_written_anew(
    install_plugin: InstallPlugin, tried: Trials, memory: Path, content: str
) -> None:
    install_plugin("well", good("well"))
    discover(["well"])
    (file,) = memory.iterdir()
    file.write_text(content)
    assert tried.of("well") == ["well"]
    assert tried.of("well") == []


def test_a_record_with_values_of_other_types_is_none(
    install_plugin: InstallPlugin, tried: Trials, memory: Path
) -> None:
    install_plugin("well", good("well"))
    tried.reason = "it hangs"
    discover(["well"])
    (file,) = memory.iterdir()
    records = json.loads(file.read_text())
    file.write_text(json.dumps({key: {**record, "limit": "long", "folder": 3} for key, record in records.items()}))
    assert tried.of("well") == ["well"]


@pytest.mark.parametrize("home", ["a file", "no home"])
def test_where_nothing_can_be_remembered_plugins_are_tried_each_time(
    install_plugin: InstallPlugin, tried: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if home == "a file" else "relative")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    install_plugin("well", good("well"))
    assert tried.of("well") == ["well"]
    assert tried.of("well") == ["well"]
    assert {path.name for path in tmp_path.iterdir()} == {"file", "site"}


def test_a_trial_that_tells_nothing_is_not_remembered(install_plugin: InstallPlugin, tried: Trials) -> None:
    install_plugin("well", good("well"))
    tried.reason = None
    assert tried.of("well") == ["well"]
    assert tried.of("well") == ["well"]
    assert discover(["well"]).find("tracker", "well") is not None


def test_a_python_that_cannot_be_started_tells_nothing(
    install_plugin: InstallPlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("well", good("well"))
    monkeypatch.setattr("sys.executable", "/no/such/python")
    assert discover(["well"]).find("tracker", "well") is not None


def test_of_two_processes_at_once_neither_takes_the_others_record_and_success_stands(
    install_plugin: InstallPlugin, tried: Trials, memory: Path
) -> None:
    """As the ranks of torchrun do: each has read the memory before any has written it."""
    for name in ("first", "second"):
        install_plugin(name, good(name))
    plugins = {plugin.entry.name: plugin for plugin in installed()[0]}
    kept = [(plugins[name], trials.mark_of(plugins[name])) for name in ("first", "second")]
    one, other = trials.Memory(), trials.Memory()
    one.keep([(*kept[0], "")], 1.0)
    other.keep([(*kept[0], "it hangs"), (*kept[1], "")], 1.0)
    assert tried.of("first", "second") == []
    assert discover(["first", "second"]).find("tracker", "first") is not None
    assert len(list(memory.iterdir())) == 1


def test_a_distribution_that_is_gone_is_forgotten(
    install_plugin: InstallPlugin, tried: Trials, memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = install_plugin("gone", good("gone"))
    discover(["gone"])
    gone.rename(tmp_path / "elsewhere")
    install_plugin("well", good("well"))
    discover(["well"])
    (file,) = memory.iterdir()
    assert [key.split(" ")[0] for key in json.loads(file.read_text())] == ["well"]
