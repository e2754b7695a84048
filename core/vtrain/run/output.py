"""The output folder of a run: one run's at a time, with the configuration and the plan it was started from."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from vtrain.contract import CheckpointError, Problem, SupportsFeatures
from vtrain.data.locks import lock
from vtrain.data.scanning.database import HASHES, FileHashes
from vtrain.data.scanning.surveys import Survey
from vtrain.estimate.estimate import Estimate
from vtrain.estimate.render import as_json
from vtrain.plan.records import Plan
from vtrain.train.resume import settings

FILE = ".lock"
"""Holds who has the folder. It stays when a run ends: that it is there means nothing, that it is locked does."""

_PLACE = 1 << 20
"""Of the locked byte, behind the end of the text, which must stay readable where locked bytes are not."""


@contextmanager
def hold(folder: Path) -> Iterator[str]:
    """Have the output folder for this process, and make it; gives a warning, "" for none.

    Raises CheckpointError if another run has it, or if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / FILE).open("a+b", buffering=0)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with file:
        outcome = lock(file, _PLACE)
        if outcome == "taken":
            raise CheckpointError(
                Problem(
                    str(folder),
                    f"another run has this output folder: {_holder(file)}.",
                    "Let it finish or stop it, or choose another run.output_dir.",
                )
            )
        if outcome == "ours":
            try:
                _sign(file)
            except OSError as error:
                raise _unwritable(folder, error) from error
            yield ""
        else:
            yield f"{folder} is on a file system without locks: nothing keeps a second run out of this output folder"


def _sign(file: BinaryIO) -> None:
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    file.truncate(0)
    file.write(text.encode() + b"\n")


def _unwritable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(Problem(str(folder), f"the output folder cannot be written: {error}."))


def _holder(file: BinaryIO) -> str:
    """ "process 7 on host, since ..."; what another process wrote may be missing for a moment."""
    file.seek(0)
    try:
        found = json.loads(file.read())
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has just begun"


def write_run_files(plan: Plan, survey: Survey, estimate: Estimate) -> None:
    """config.toml, verbatim, and plan.json: resolved values, parts with their versions, fingerprints. Raises OSError."""
    output = plan.config.run.output_dir
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.toml").write_text(plan.config.text, encoding="utf-8")
    hash_file = FileHashes(plan.config.cache.dir / HASHES)
    fingerprints = {
        "text": plan.family.text_fingerprint(hash_file),
        "video": plan.family.video_fingerprint(hash_file),
        "config": hashlib.sha256(plan.config.text.encode()).hexdigest(),
        **{
            f"features ({name})": part.feature_fingerprint(hash_file)
            for name, part in plan.regularizers
            if part.needs().features == "cached" and isinstance(part, SupportsFeatures)
        },
    }
    whole = {
        **as_json(plan, survey, estimate),
        "settings": {key: setting.value for key, setting in settings(plan).items()},
        "fingerprints": fingerprints,
    }
    (output / "plan.json").write_text(json.dumps(whole, indent=2), encoding="utf-8")
