"""What pytest prints while nothing is reported: the heartbeat of conftest.py, in small runs of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
SILENCE = "SILENCE_S = 8.0\n"
TESTS = """
import os, time
from pathlib import Path

def test_a_short_one():
    pass

def test_a_long_one():
    end = time.monotonic() + float(os.environ["AT_MOST_S"])
    while "long_one (" not in Path("printed").read_text() and time.monotonic() < end:
        time.sleep(0.02)
"""


def printed(folder: Path, *arguments: str, at_most_s: float = 60) -> list[str]:
    """Lines of a run of pytest under this conftest, whose long test ends when it was named or at_most_s has passed."""
    text = CONFTEST.read_text(encoding="utf-8")
    assert SILENCE in text
    (folder / "conftest.py").write_text(text.replace(SILENCE, "SILENCE_S = 0.3\n"), encoding="utf-8")
    (folder / "test_inner.py").write_text(TESTS, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: minutes\n", encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "AT_MOST_S": str(at_most_s)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    with (folder / "printed").open("wb") as output:
        done = subprocess.run(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT, timeout=120)
    lines = (folder / "printed").read_text(encoding="utf-8").splitlines()
    assert done.returncode == 0, lines
    return lines


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ((), "tests marked slow run too: `nox -s tests` has -m 'not slow'"),
        (("-p", "xdist", "-n", "1", "-m", "not slow"), "tests chosen by -m 'not slow'"),
    ],
    ids=["alone", "xdist"],
)
def test_a_test_that_runs_long_is_named_and_the_dots_and_the_closing_line_stay(
    tmp_path: Path, arguments: tuple[str, ...], chosen: str
) -> None:
    lines = printed(tmp_path, *arguments)
    assert chosen in lines
    named = [line for line in lines if line.startswith("running: ")]
    assert named
    assert all(re.fullmatch(r"running: test_inner\.py::test_a_long_one \(\d+ s\)", line) for line in named)
    dots = [line for line in lines if re.fullmatch(r"(test_inner\.py )?\.+( +\[ *\d+%\])?", line)]
    assert "".join(dots).removeprefix("test_inner.py").count(".") == 2
    assert re.fullmatch(r"=+ 2 passed in \S+s =+", lines[-1])


def test_a_quiet_run_prints_no_more_than_before(tmp_path: Path) -> None:
    lines = printed(tmp_path, "-q", at_most_s=1)
    assert lines[0].split() == ["..", "[100%]"]
    assert re.fullmatch(r"2 passed in \S+s", lines[-1])
    assert len(lines) == 2
