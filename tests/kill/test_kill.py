"""The short form of `nox -s kill`: what a kill leaves at any call of saving and of a start, and some whole runs."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what a process calls is followed through /proc")

SAVING = """
    import json, shutil, sys
    from pathlib import Path
    from torch import nn
    from vtrain.train import checkpoint
    from vtrain.train.pieces import ConfigPiece, RegularizerPiece
    from failpoints import forked

    place, before = Path(sys.argv[1]), Path(sys.argv[1], "before")
    pieces = [RegularizerPiece("w", nn.Linear(300, 3)), ConfigPiece("[run]")]
    checkpoint.write(before, 1, pieces)

    def folder_of(name):
        shutil.copytree(before, place / name)
        return place / name

    def save(folder):
        checkpoint.prune(folder, 1, checkpoint.write(folder, 2, pieces))

    def left(folder):
        newest, faults = checkpoint.latest(folder)
        assert newest and not faults, faults
        assert all(checkpoint.fault(each) is None for _, each in checkpoint.steps_saved(folder))
        return newest.name

    whole = folder_of("whole")
    points = forked(lambda: save(whole), whole).points
    seen = []
    for at, point in enumerate(points):
        folder = folder_of(f"{at}")
        assert forked(lambda: save(folder), folder, point) is None
        seen.append(left(folder))
        save(folder)
        assert sorted(each.name for each in folder.iterdir()) == ["step-000002"], point
    print(json.dumps([len(points), seen.count("step-000001"), seen.count("step-000002")]))
"""

STARTING = """
    import json, shutil, sys
    from pathlib import Path
    from vtrain.run.lines import append, cut_back
    from vtrain.run.output import put
    from failpoints import forked

    place, before = Path(sys.argv[1]), Path(sys.argv[1], "before")
    before.mkdir()
    lines = [{"step": step} for step in range(1, 9)]
    append(before / "metrics.jsonl", [*lines[:2], {"odd": 1}, *lines[2:]], durable=True)
    put(before / "plan.json", "old" * 50)

    def act(folder):
        cut_back(folder / "metrics.jsonl", lambda line: line["step"] <= 4)
        put(folder / "plan.json", "new" * 50)
        append(folder / "metrics.jsonl", lines[4:6], durable=True)

    def folder_of(name):
        shutil.copytree(before, place / name)
        return place / name

    whole = folder_of("whole")
    points = forked(lambda: act(whole), whole).points
    for at, point in enumerate(points):
        folder = folder_of(f"{at}")
        assert forked(lambda: act(folder), folder, point) is None
        assert (folder / "plan.json").read_text() in ("old" * 50, "new" * 50), point
        act(folder)
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert found == lines[:6], (point, found)
        assert any("odd" in kept.read_text() for kept in folder.glob("*as-found*")), point
    print(json.dumps(len(points)))
"""


def printed(code: str, place: Path) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), str(place)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_at_any_call_of_a_save_the_last_checkpoint_or_the_new_one_is_there_and_no_half_one(
    tmp_path: Path,
) -> None:
    """Of a save that lets an older one go. Afterwards the same save leaves nothing else."""
    points, old, new = json.loads(printed(SAVING, tmp_path))
    assert old + new == points
    assert old >= 15
    assert new >= 5


def test_killed_at_any_call_of_a_start_no_line_is_lost_and_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    assert int(printed(STARTING, tmp_path)) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "written beside training", "2 processes"])
def test_a_run_that_is_killed_and_resumed_is_the_same_run(mode: str) -> None:
    """Slow: dozens of runs. `nox -s kill` has all."""
    command = [sys.executable, str(HERE / "run.py"), mode, "--kills", "5", "--points", "12", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
