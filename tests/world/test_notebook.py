"""The example in notebook form: whole, and closed in the middle as Ctrl-C in a notebook does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vtrain import api
from vtrain.contract import Ended, Stepped
from vtrain.train.checkpoint import fault

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.py"


def interrupted(config: Path, step: int) -> None:
    with api.run(config) as run:
        for event in run:
            if isinstance(event, Stepped) and event.step == step:
                raise KeyboardInterrupt


@pytest.mark.long
def test_the_notebook_trains_resumes_and_plots(tmp_path: Path) -> None:
    """Long (30 CPU-seconds): its run is closed after some steps, and the notebook resumes it."""
    short = tmp_path / "notebook.py"
    text = NOTEBOOK.read_text(encoding="utf-8").replace("STEPS = 30", "STEPS = 8")
    short.write_text(text.replace("Path(__file__).parent", f"Path({str(NOTEBOOK.parent)!r})"), encoding="utf-8")
    before, after = text.split("with vtrain.api.run(config) as run:")
    assert after
    output = tmp_path / "out"
    first = tmp_path / "first.py"
    first.write_text(
        before.replace("Path(__file__).parent", f"Path({str(NOTEBOOK.parent)!r})"), encoding="utf-8"
    )  # all cells above the run
    subprocess.run([sys.executable, str(first), str(output)], check=True, capture_output=True, timeout=200)
    with pytest.raises(KeyboardInterrupt):
        interrupted(output / "world.toml", 6)
    (saved,) = (output / "run" / "checkpoints").iterdir()
    assert saved.name == "step-000004"
    assert fault(saved) is None
    done = subprocess.run(
        [sys.executable, str(short), str(output)], check=False, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "step 8: saved step-000008" in done.stdout
    assert (output / "notebook.png").stat().st_size > 5000
    rows = [json.loads(line)["step"] for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 9))
    with api.run(output / "world.toml") as run:
        assert list(run)[-1] == Ended(8, 8, "nothing to do")
