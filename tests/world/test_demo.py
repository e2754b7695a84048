"""The demo, as a user starts it: by its script, in a folder of its own, without the ffmpeg program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "world" / "demo.py"
FEW = ("--steps", "8", "--clips", "24", "--prompts", "4")
BY_CHANCE, ALL_BY_CHANCE = 1e-3, 1e-12
"""Probability below which a word, or all three together, were learnt. Seen after the short run, over three seeds of clips and run,
in bf16 on one and two threads and in fp32: at most 2.4e-15 for a word (shape, 95 % of 64), 6e-86 for all three. After 450 steps
shape was at 67 to 81 %, and after 225 all three at chance."""


def start(output: Path, *arguments: str) -> subprocess.Popen[str]:
    """The demo in a process group of its own, as a terminal would have it; of programs only vtrain is found."""
    programs = output.parent / "bin"
    programs.mkdir(exist_ok=True)
    if not (programs / "vtrain").exists():
        (programs / "vtrain").symlink_to(Path(sys.executable).parent / "vtrain")
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--output", str(output), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": str(programs), "PYTHONDONTWRITEBYTECODE": "1"},
        start_new_session=True,
    )


def finish(running: subprocess.Popen[str]) -> str:
    told, _ = running.communicate(timeout=1400)
    assert running.returncode == 0, told
    return told


def videos(output: Path) -> dict[str, bytes]:
    folder = output / "run" / "judged"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.mp4")}


@pytest.mark.slow
def test_an_interrupted_demo_ends_as_one_that_was_not_and_a_second_run_encodes_nothing(tmp_path: Path) -> None:
    """Slow (three short runs): the demo's own way through Ctrl-C, which tests of the loop do not take."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    before = {path: path.stat().st_mtime_ns for path in SCRIPT.parent.rglob("*")}
    finish(start(whole, *FEW))
    running = start(halved, *FEW)
    assert running.stdout is not None
    for line in running.stdout:
        if "first step" in line or "samples/step-000000/sheet.png" in line:
            os.killpg(running.pid, signal.SIGINT)
            break
    told, _ = running.communicate(timeout=120)
    assert running.returncode == 128 + signal.SIGINT, told
    assert "the same command resumes from there" in told
    assert not (halved / "run" / "accuracy.json").exists()
    finish(start(halved, *FEW))
    assert len(videos(whole)) == 8  # of four prompts, at the half and at the end
    resumed = videos(halved)  # and of the step at which it was interrupted
    assert {name: resumed[name] for name in videos(whole)} == videos(whole)
    again = finish(start(whole, *FEW))
    assert "nothing to do" in again
    assert "drawing" not in again
    assert {name: resumed[name] for name in videos(whole)} == videos(whole)
    for name in ("grid.png", "grid.mp4", "curves.png", "accuracy.json"):
        assert (whole / "run" / name).stat().st_size > 500
    assert {path: path.stat().st_mtime_ns for path in SCRIPT.parent.rglob("*")} == before, "the checkout was written to"


@pytest.mark.timeout(1500)  # two minutes of work, on a machine that does ten other things too
@pytest.mark.slow
def test_a_short_run_learns_far_more_than_chance(tmp_path: Path) -> None:
    """Slow (two minutes of training): the one test that fails if anything between clips and videos teaches the wrong thing."""
    output = tmp_path / "demo"
    finish(start(output, "--short"))
    result = json.loads((output / "run" / "accuracy.json").read_text(encoding="utf-8"))
    assert result["everything"]["prompts"] == 64
    assert set(result["probability by chance"]) == {"colour", "shape", "direction", "all"}
    assert max(result["probability by chance"].values()) < BY_CHANCE, result["everything"]
    assert result["probability by chance"]["all"] < ALL_BY_CHANCE, result["everything"]
