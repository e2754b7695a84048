"""The notebook of the examples runs from its first cell to its last, and one whose kernel is interrupted resumes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FEW = {
    "STEPS = 600": "STEPS = 4",
    "CLIPS = 384": "CLIPS = 20",
    "batch_size = 16": "batch_size = 4",
    "steps = 20": "steps = 2",
}
INTERRUPTED = '''
"""Gives the cells of a notebook one after the other; Ctrl-C comes in the middle of training, and that cell is given again."""

import builtins
import sys
from pathlib import Path

from vtrain.run.output import hold
from vtrain.train.checkpoint import fault

cells = [cell for cell in Path(sys.argv[1]).read_text(encoding="utf-8").split("# %%") if not cell.startswith(" [markdown]")]
training = next(number for number, cell in enumerate(cells) if "api.run" in cell)
kernel = {"__name__": "__main__"}


def interrupted(*words):
    builtins.print(*words)
    if str(words[0]).startswith("step 4 "):
        raise KeyboardInterrupt


for number, cell in enumerate(cells):
    if number == training:
        kernel["print"] = interrupted
        try:
            exec(compile(cell, f"cell {number}", "exec"), kernel)
        except KeyboardInterrupt:
            builtins.print("interrupted")
        del kernel["print"]
        with hold(kernel["OUTPUT"] / "run") as warning:
            assert not warning
        assert [path.name for path in (kernel["OUTPUT"] / "run" / "checkpoints").iterdir()] == ["step-000002"]
        assert fault(kernel["OUTPUT"] / "run" / "checkpoints" / "step-000002") is None
        builtins.print("free and sound")
    exec(compile(cell, f"cell {number}", "exec"), kernel)
'''
MEASURED = ("seconds", "data_wait", "memory")


def shortened(root: Path, output: Path, file: Path) -> Path:
    """The notebook with few steps and another output folder, as `file`."""
    text = (root / "examples" / "notebook.py").read_text(encoding="utf-8")
    places = {
        'OUTPUT = Path(world.__file__).parents[2] / "demo-output" / "notebook"': f'OUTPUT = Path("{output.as_posix()}")',
        'str(Path(__file__).parent / "world") if "__file__" in globals() else "world"': (
            f'"{(root / "examples" / "world").as_posix()}"'
        ),
    }
    for old, new in {**places, **FEW}.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")
    return file


def in_a_process(script: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """In a fresh one, of one thread and offline; pictures are drawn and not shown."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, *map(str, (script, *arguments))]
    return subprocess.run(
        command, cwd=script.parent, env=environment, capture_output=True, text=True, check=False, timeout=400
    )


def rows(output: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without what is measured."""
    lines = (output / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The notebook, run as a script: what it printed, and its output folder."""
    folder = tmp_path_factory.mktemp("notebook")
    done = in_a_process(shortened(root, folder / "output", folder / "notebook.py"))
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "output"


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(whole: tuple[str, Path]) -> None:
    """Slow (15 seconds, 29 with the next): the tiny world's checkpoint, clips, a run with its videos, in a fresh process."""
    said, output = whole
    assert "finished: step 4 of 4" in said
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4]
    for name in ("loss.png", "strips.png"):
        assert (output / "run" / name).stat().st_size > 5000


@pytest.mark.slow
def test_a_notebook_that_is_interrupted_leaves_all_whole_and_resumes_to_the_same_metrics(
    root: Path, whole: tuple[str, Path], tmp_path: Path
) -> None:
    """Slow, as above. Ctrl-C leaves the loop: the output folder is free at once, the last checkpoint is sound, the cell can
    be run again."""
    _, output = whole
    again = tmp_path / "again"
    shutil.copytree(output, again, ignore=shutil.ignore_patterns("run"))
    driver = tmp_path / "interrupted.py"
    driver.write_text(INTERRUPTED, encoding="utf-8")
    done = in_a_process(driver, shortened(root, again, tmp_path / "notebook.py"))
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said.index("interrupted") < said.index("free and sound") < said.index("finished: step 4 of 4")
    assert rows(again) == rows(output)
    events = [json.loads(line) for line in (again / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(event["session"], event["step"]) for event in events if event["event"] == "started"] == [(1, 0), (2, 2)]
