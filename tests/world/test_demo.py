"""The demo of the tiny world, in its short form: that training teaches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "world" / "demo.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_short_run_makes_what_prompts_ask_for_far_more_often_than_chance(tmp_path: Path) -> None:
    """Slow (about two minutes on two free cores): a few hundred steps from random weights, 32 prompts judged."""
    command = [sys.executable, str(DEMO), "--short", "--prompts", "32", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "out" / "run"
    found = json.loads((run / "accuracy.json").read_text(encoding="utf-8"))
    assert found["everything"]["prompts"] == 32
    assert found["probability by chance"]["all"] < 1e-6, found["everything"]
    assert all((run / name).stat().st_size > 5_000 for name in ("grid.png", "grid.mp4", "curves.png"))
