"""Plugins are tried in processes of their own before they are imported here, and what came of it is remembered.

An import that hangs, ends the process or crashes it is survived by no `except`. So a child process imports a plugin and
calls its hooks first; only one that came through is imported here. It is tried again when its files have changed, or the
packages that are installed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import site
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vtrain.contract import ConfigError, Problem
from vtrain.contract.plugin_rules import package_of

if TYPE_CHECKING:
    from subprocess import Popen

    from vtrain.registry.discovery import Installed

LIMIT = "VTRAIN_PLUGIN_TIMEOUT"
"""Environment variable: seconds that the import of a plugin may take; 0: any time, and it is not tried before."""

DEFAULT_S = 30.0
NOTICE_S = 5.0
"""After so long it is said on stderr what the command waits for."""

START_S = 60.0
"""For Python itself to start, and to import vtrain."""

TICK_S = 0.01

BEGUN, CAME_THROUGH = b"begun\n", b"came through\n"
"""What a trial's process writes before it imports the plugin, and once that is done and its hooks were called."""

# The path is the parent's, which may have changed its own. What the plugin starts in turn tries no plugins.
_CHILD = "import json, sys; path, *plugin = sys.argv[1:]; sys.path[:] = json.loads(path); sys.argv[1:] = []; " + (
    "from vtrain.registry.discovery import trial; trial(*plugin)"
)


def limit_s() -> float:
    """Seconds that an import may take; 0: nothing is tried. Raises ConfigError."""
    said = os.environ.get(LIMIT, "").strip()
    try:
        seconds = float(said or DEFAULT_S)
    except ValueError:
        seconds = -1.0
    if not (math.isfinite(seconds) and seconds >= 0):
        what = f'the environment variable {LIMIT} is "{said}", which is no number of seconds.'
        raise ConfigError(
            Problem("", what, f"Unset it, for {DEFAULT_S:g} s; 0 imports plugins without trying them first.")
        )
    return seconds


def faults(plugins: Sequence[Installed]) -> list[str]:
    """Why each must not be imported here; "" for one that came through, now or earlier, or that cannot be tried.

    All that are new or changed are tried at once. Raises ConfigError if the limit is no number.
    """
    limit = limit_s()
    # Where this is no plain Python, there is none to start either.
    if not limit or not sys.executable or getattr(sys, "frozen", False):
        return ["" for _ in plugins]
    memory = Memory()
    marks = [mark_of(plugin) for plugin in plugins]
    known = [memory.reason(plugin, mark, limit) for plugin, mark in zip(plugins, marks, strict=True)]
    unknown = [number for number, reason in enumerate(known) if reason is None]
    tried = dict(zip(unknown, tried_apart([plugins[number] for number in unknown], limit), strict=True))
    memory.keep(
        [(plugins[number], marks[number], reason) for number, reason in tried.items() if reason is not None], limit
    )
    return [tried.get(number, reason) or "" for number, reason in enumerate(known)]


# -- the trial -----------------------------------------------------------------------------------------------------------


@dataclass
class _Trial:
    """A process that imports a plugin. said, errors: files that its standard output and its standard error go to.

    Files, not pipes: what the plugin starts may hold them open for ever. started, begun: when the process was, and when the
    import was first seen to be, by the monotonic clock. late: it took too long, and was killed.
    """

    plugin: Installed
    process: Popen[bytes]
    said: IO[bytes]
    errors: IO[bytes]
    started: float
    begun: float | None = None
    noticed: bool = False
    late: bool = False


def tried_apart(plugins: Sequence[Installed], limit: float) -> list[str | None]:
    """What is wrong with each, "" if nothing; None where that is not known. limit: seconds that an import has."""
    with ExitStack() as held:
        trials = [_begin(plugin, limit, held) for plugin in plugins]
        waiting = [trial for trial in trials if trial is not None]
        while waiting := [trial for trial in waiting if not _is_over(trial, limit)]:
            time.sleep(TICK_S)
        return [None if trial is None else _outcome(trial, limit) for trial in trials]


def _begin(plugin: Installed, limit: float, held: ExitStack) -> _Trial | None:
    # Here, since a command seldom has a plugin to try.
    import subprocess
    import tempfile

    named = (plugin.entry.name, plugin.entry.value, plugin.entry.group, plugin.distribution, plugin.version, f"{limit}")
    try:
        path = json.dumps([os.fspath(folder) for folder in sys.path])
        said, errors = (held.enter_context(tempfile.TemporaryFile()) for _ in range(2))  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, path, *named],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=errors,
            env={**os.environ, LIMIT: "0"},
            start_new_session=True,  # so that what hangs goes with all that it started
        )
    except (
        OSError,
        ValueError,
        TypeError,
    ):  # no memory, no folder for the files, a null byte in a name, an odd sys.path
        return None
    held.callback(_end, process)
    return _Trial(plugin, process, said, errors, time.monotonic())


def _end(process: Popen[bytes]) -> None:
    """Kill a process that has not ended, and all that it started and left behind."""
    with suppress(OSError):  # there is nothing
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _is_over(trial: _Trial, limit: float) -> bool:
    """Whether the process has ended. One that takes too long is killed; it is counted from where the import begins."""
    if trial.process.poll() is not None:
        return True
    now = time.monotonic()
    if trial.begun is None:
        trial.begun = now if BEGUN in _read(trial.said) else None
        trial.late = trial.begun is None and now > trial.started + START_S
    else:
        trial.late = now > trial.begun + limit
        if now > trial.begun + NOTICE_S and not trial.noticed:
            trial.noticed = True
            name, origin = trial.plugin.entry.name, f"{trial.plugin.distribution} {trial.plugin.version}"
            sys.stderr.write(f'waiting up to {limit:g} s for plugin "{name}" of {origin} to be imported ({LIMIT})\n')
    if trial.late:
        _end(trial.process)
    return trial.late


def _outcome(trial: _Trial, limit: float) -> str | None:
    """What was wrong with the plugin, "" if nothing, None if it was not reached."""
    said, code = _read(trial.said), trial.process.returncode
    if BEGUN not in said:  # such as a Python that does not find vtrain by the same path
        return None
    through = CAME_THROUGH in said
    if code == 0 and through:
        return ""
    if trial.late and through:
        what = f"after its import Python does not end within {limit:g} s: a thread that it started keeps running"
    elif trial.late:
        what = f"its import takes longer than {limit:g} s"
    else:
        does = f"crashes Python, by {_signal(-code)}," if code < 0 else f"ends Python, with exit code {code},"
        what = f"it {does} {'after its import' if through else 'when it is imported'}"
    lines = _read(trial.errors).decode(errors="replace").split("\n")
    last = next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")
    wish = "To give it more time" if trial.late else "To try it again"
    remedy = f"{wish}: {LIMIT}={2 * limit:g} vtrain plugins list"  # what failed is tried again only with more time
    return f"{what}{f' and says: {last}' if last else ''}. {remedy}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read(file: IO[bytes]) -> bytes:
    """The end of what was written. Not by seek and read: the process that writes it shares the position."""
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), 4000, max(0, size - 4000))


# -- the memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """What came of a trial. mark: of the files then. reason: "" if it came through. limit: seconds that it had.

    host: where; a crash for want of a device there says nothing of another machine. folder: where the distribution lies.
    """

    mark: str
    reason: str
    limit: float
    host: str
    folder: str


class Memory:
    """The trials of one Python environment, in a file of the user's cache folder; empty where there is no such folder."""

    def __init__(self) -> None:
        self._file = _memory_file()
        self._records = _recorded(self._file)

    def reason(self, plugin: Installed, mark: str, limit: float) -> str | None:
        """Why it must not be imported, "" if it may be; None if it must be tried: it is new, changed, or has more time now."""
        found = self._records.get(_key(plugin))
        if found is None or not mark or found.mark != mark:
            return None
        if found.reason and (found.host != _host() or found.limit < limit):
            return None
        return found.reason

    def keep(self, outcomes: Iterable[tuple[Installed, str, str]], limit: float) -> None:
        """Write down (plugin, mark, reason); never an error. Written aside and renamed: several processes may do it at once."""
        host = _host()
        new = {_key(each): _Record(mark, reason, limit, host, _folder(each)) for each, mark, reason in outcomes if mark}
        if not new or self._file is None:
            return
        there = _recorded(self._file)
        for key, record in new.items():
            before = there.get(key)
            # Of the ranks of a run, all of which try it, a slow one does not outvote the others.
            if not (record.reason and before and before.mark == record.mark and not before.reason):
                there[key] = record
        kept = {key: asdict(record) for key, record in there.items() if os.path.isdir(record.folder)}  # noqa: PTH112
        aside = self._file.with_name(f"{self._file.name}.{host}.{os.getpid()}")
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            try:
                aside.write_text(json.dumps(kept, indent=1), encoding="utf-8")
                aside.replace(self._file)
            finally:
                aside.unlink(missing_ok=True)


def _memory_file() -> Path | None:
    """One file for each environment: where Python is, and which."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # as the XDG specification says  # noqa: PTH117
        folder = os.path.expanduser("~/.cache")  # noqa: PTH111 (Path.expanduser raises where there is no home)
    if not os.path.isabs(folder):  # noqa: PTH117
        return None
    name = blake2b(f"{sys.prefix} {sys.version}".encode(), digest_size=8).hexdigest()
    return Path(folder) / "vtrain" / f"plugins-{name}.json"


def _recorded(file: Path | None) -> dict[str, _Record]:
    """What a file holds; nothing if it is not there or is none of ours."""
    if file is None:
        return {}
    try:
        found = {key: _Record(**record) for key, record in json.loads(file.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {key: record for key, record in found.items() if _is_sound(record)}


def _is_sound(record: _Record) -> bool:
    texts = (record.mark, record.reason, record.host, record.folder)
    return isinstance(record.limit, float) and all(isinstance(text, str) for text in texts)


def _key(plugin: Installed) -> str:
    return f"{plugin.entry.name} = {plugin.entry.value} of {plugin.distribution} in {_folder(plugin)}"


def _folder(plugin: Installed) -> str:
    """Where its distribution lies; "" where that is no place of a file system."""
    try:
        return str(plugin.entry.dist.locate_file("")) if plugin.entry.dist is not None else ""
    except Exception:  # a distribution of any origin may stand there
        return ""


def _host() -> str:
    return os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")


# -- what an import depends on -------------------------------------------------------------------------------------------


def mark_of(plugin: Installed) -> str:
    """A digest of what the plugin's import depends on: times and sizes of its files, and when packages were installed.

    "" if its files are not known: then nothing is remembered of it.
    """
    try:
        files = sorted({*_listed(plugin), *_sources(plugin)})
    except Exception:  # finders of any origin are asked
        return ""
    # Installing, upgrading or removing a package changes the folder that it lies in.
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    seen = (plugin.version, plugin.entry.value, *((path, *_changed(path)) for path in (*folders, *files)))
    return blake2b(repr(seen).encode(), digest_size=16).hexdigest() if files else ""


def _changed(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116 (of many files)
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _listed(plugin: Installed) -> list[str]:
    """The files that the distribution installed, by its RECORD; compiled Python and its metadata apart."""
    text = plugin.entry.dist.read_text("RECORD") if plugin.entry.dist is not None else None
    names = [line.rsplit(",", 2)[0].strip('"') for line in (text or "").splitlines()]
    folder = _folder(plugin)
    return [os.path.join(folder, name) for name in names if not name.endswith(".pyc") and ".dist-info/" not in name]  # noqa: PTH118


def _sources(plugin: Installed) -> Iterator[str]:
    """The files of the package, or the module, that the entry point names: an editable install does not list them."""
    spec = importlib.util.find_spec(package_of(plugin.entry.module))
    if spec is None:
        return
    folders = list(spec.submodule_search_locations or ())
    if not folders and spec.origin is not None:
        yield spec.origin
    for folder in folders:
        for path, below, names in os.walk(folder):
            below[:] = [name for name in below if name != "__pycache__"]
            yield from (os.path.join(path, name) for name in names)  # noqa: PTH118
