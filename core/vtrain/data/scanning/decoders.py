"""What decodes each dataset's clips: whether torchcodec loads on this machine, and which it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace

from vtrain.contract import ConfigError, Problem
from vtrain.plan.records import Plan

TESTED = "0.13"
"""The version of torchcodec whose pixels were compared with ffmpeg's."""

_LIMIT_S = 120.0
_REPORT = """
import json
try:
    import torchcodec
except (ImportError, OSError, RuntimeError) as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
else:
    print(json.dumps({"version": torchcodec.__version__, "ffmpeg": torchcodec.ffmpeg_major_version}))
"""
_MISSING = re.compile(r"(lib[\w.+-]+): cannot open shared object file")
_FFMPEG = re.compile(r"libav(util|codec|format|filter|device)\.so|libsw(scale|resample)\.so")
_PYAV = 'set data.decoder = "pyav"'
_INSTALL = "Install version 0.13: pip install 'vtrain[torchcodec]'"


def with_decoders(plan: Plan) -> Plan:
    """The plan, its datasets with name and version of what decodes them. Raises ConfigError where torchcodec cannot be used.

    A process is started only if a dataset asks for torchcodec.
    """
    asking = [dataset for dataset in plan.datasets if dataset.table.decoder == "torchcodec"]
    if not asking:
        return plan
    found = torchcodec()
    if isinstance(found, Unusable):
        numbers = [
            n for n, part in enumerate(plan.config.data) if part.table.enabled and part.table.decoder == "torchcodec"
        ]
        raise ConfigError(
            Problem(plan.config.where("data", number, "decoder"), found.what, found.remedy) for number in numbers
        )
    return replace(plan, datasets=tuple(replace(d, decoder=found) if d in asking else d for d in plan.datasets))


@dataclass(frozen=True)
class Unusable:
    """Why it is not used, and what to do."""

    what: str
    remedy: str


def torchcodec() -> str | Unusable:
    """Its name and version and that of ffmpeg.

    It is loaded in a process of its own: it brings libraries that this one does not need. That takes some seconds.
    """
    command = [sys.executable, "-c", _REPORT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Unusable(f"torchcodec did not load within {_LIMIT_S:g} seconds.", f"Try again, or {_PYAV}.")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Unusable(f"torchcodec does not load: {last}", f"{_INSTALL}, or {_PYAV}.")
    found = json.loads(done.stdout.splitlines()[-1])
    return unusable(found["error"]) if "error" in found else _tested(found["version"], found["ffmpeg"])


def unusable(error: str) -> Unusable:
    """error: what importing it raised, with the type in front."""
    if error.startswith("ModuleNotFoundError: No module named 'torchcodec'"):
        return Unusable("torchcodec is not installed.", f"{_INSTALL}, or {_PYAV}.")
    missing = list(dict.fromkeys(_MISSING.findall(error)))
    if others := [name for name in missing if not _FFMPEG.match(name)]:
        what = f"torchcodec does not load: its build wants {', '.join(others)}, which is not there."
        return Unusable(what, f"{_INSTALL}, or {_PYAV}.")
    if missing:
        what = "torchcodec does not load: ffmpeg's shared libraries, of a version from 4 to 8, are not there."
        return Unusable(what, f"Install them (Debian, Ubuntu: apt-get install ffmpeg), or {_PYAV}.")
    return Unusable(f"torchcodec does not load: {error.splitlines()[0]}", f"{_INSTALL}, or {_PYAV}.")


def _tested(version: str, ffmpeg: int) -> str | Unusable:
    number = version.partition("+")[0]
    if number.rpartition(".")[0] != TESTED:
        what = f"torchcodec is there in version {number}, and only {TESTED} was compared with ffmpeg."
        return Unusable(what, f"{_INSTALL}, or {_PYAV}.")
    return f"torchcodec {number}, ffmpeg {ffmpeg}"
