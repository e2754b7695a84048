"""`vtrain verify` finds what was changed in a run, however carefully."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_try(folder, within: Run) -> None:
    import time

    within("run", folder.write(steps=9))
    for flags in ([], ["--all"]):
        t = time.time()
        done = within("verify", folder.output, *flags, check=None)
        print(done.stdout, done.stderr, time.time() - t)
    print((folder.output / "certificate.json").read_text())
    print((folder.output / "checkpoints/step-000006/records.json").read_text())
    print((folder.output / "checkpoints/step-000006/state.json").read_text()[-600:])
    assert 0
