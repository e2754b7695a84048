"""`vtrain plugins`, and the shell around all commands, in a fresh process as a user runs them."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vtrain
from vtrain.cli.report import report_error
from vtrain.contract import ConfigError, Problem

Vtrain = Callable[..., "subprocess.CompletedProcess[str]"]
InstallPlugin = Callable[..., Path]

LONG = "a summary that is far longer than eighty columns, so that anything which wraps or cuts lines would show it " * 2
DRUM = f"""
from pydantic import Field
from vtrain.contract import Options, SamplerSpec, TrackerSpec, hookimpl

class Loud(Options):
    volume: int = Field(3, ge=0, le=11, description="how [bold]loud[/bold]")
    name: str = Field(description="whose")

@hookimpl
def vtrain_trackers():
    return [TrackerSpec("drum", {LONG.strip()!r}, Loud, lambda options: None)]

@hookimpl
def vtrain_samplers():
    return [SamplerSpec("drum", "[red]a sampler[/red] \\x1b[31mof that name", Loud, lambda options, config: None)]
"""
MAIN = "from vtrain.cli.app import main; main()"


@pytest.fixture
def vtrain_command(python: Callable[..., subprocess.CompletedProcess[str]]) -> Vtrain:
    """vtrain_command("plugins", "list") in a fresh interpreter."""
    return lambda *arguments, **options: python("-c", MAIN, *arguments, **options)


@pytest.fixture
def drum(install_plugin: InstallPlugin) -> Path:
    return install_plugin("drum", DRUM)


def test_the_version_is_the_distributions(vtrain_command: Vtrain) -> None:
    assert vtrain_command("--version").stdout == f"vtrain {vtrain.__version__}\n"


def test_help_names_every_command(vtrain_command: Vtrain) -> None:
    text = vtrain_command("--help").stdout
    assert all(f"\n  {name} " in text for name in ("run", "plan", "plugins", "config"))


def test_an_unknown_command_is_exit_code_2_without_a_traceback(vtrain_command: Vtrain) -> None:
    done = vtrain_command("trian")
    assert done.returncode == 2
    assert "No such command" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_list_has_a_line_for_every_part_and_failures_below(
    vtrain_command: Vtrain, drum: Path, install_plugin: InstallPlugin
) -> None:
    broken = install_plugin("broken", "import no_such_library")
    done = vtrain_command("plugins", "list", path=(drum, broken))
    assert done.returncode == 0
    parts, failures = done.stdout.split("\nCannot be used:\n")
    assert parts.splitlines()[0].split() == ["kind", "name", "distribution", "version", "summary"]
    assert [line.split()[:4] for line in parts.splitlines() if " drum " in line] == [
        ["sampler", "drum", "drum", "1.0"],
        ["tracker", "drum", "drum", "1.0"],
    ]
    (row,) = [line for line in failures.splitlines() if line.startswith("broken")]
    assert "No module named 'no_such_library'" in row
    assert f"{broken / 'broken_plugin.py'}:1" in row


def test_piped_lines_are_neither_wrapped_nor_coloured_and_markup_stays_text(vtrain_command: Vtrain, drum: Path) -> None:
    text = vtrain_command("plugins", "list", path=(drum,), env={"COLUMNS": "40", "FORCE_COLOR": "1"}).stdout
    assert LONG.strip() in text
    assert "[red]a sampler[/red]" in text
    assert "\x1b" not in text
    assert "\\x1b[31m" in text


def test_the_list_as_json_has_the_same_rows(vtrain_command: Vtrain, drum: Path, install_plugin: InstallPlugin) -> None:
    noisy = install_plugin("noisy", "print('this must not land in the JSON')\n1 / 0")
    listing = json.loads(vtrain_command("plugins", "list", "--json", path=(drum, noisy)).stdout)
    (tracker,) = [part for part in listing["parts"] if (part["kind"], part["name"]) == ("tracker", "drum")]
    assert tracker == {
        "kind": "tracker",
        "name": "drum",
        "distribution": "drum",
        "version": "1.0",
        "entry_point": "drum",
        "summary": LONG.strip(),
    }
    (failure,) = [each for each in listing["failures"] if each["entry_point"] == "noisy"]
    assert failure["reason"].startswith("ZeroDivisionError: division by zero")


def test_the_list_as_json_is_whole_beside_plugins_that_end_python_or_write_past_it(
    vtrain_command: Vtrain, install_plugin: InstallPlugin, tmp_path: Path
) -> None:
    """As users run it, plugins being tried in processes of their own."""
    leaves = install_plugin("leaves", "import os; os._exit(0)")
    noisy = install_plugin("noisy", "import os; os.write(1, b'this must not land in the JSON')" + DRUM)
    settings = {
        "VTRAIN_PLUGINS": "leaves,noisy",
        "VTRAIN_PLUGIN_TIMEOUT": "",
        "XDG_CACHE_HOME": str(tmp_path / "caches"),
    }
    done = vtrain_command("plugins", "list", "--json", path=(leaves, noisy), env=settings)
    assert done.returncode == 0
    listing = json.loads(done.stdout)
    assert {part["distribution"] for part in listing["parts"]} == {"noisy"}
    (failure,) = [each for each in listing["failures"] if each["entry_point"] == "leaves"]
    assert failure["reason"].startswith("it ends Python, with exit code 0, when it is imported.")
    assert len(list((tmp_path / "caches" / "vtrain").iterdir())) == 1


def test_the_allow_list_is_read_from_the_environment(vtrain_command: Vtrain, drum: Path) -> None:
    text = vtrain_command("plugins", "list", path=(drum,), env={"VTRAIN_PLUGINS": "drum,absent"}).stdout
    assert "adamw" not in text
    assert "not in VTRAIN_PLUGINS" in text
    assert "no such plugin is installed" in text


def test_show_gives_type_default_limits_resume_rule_and_meaning_of_every_option_in_both_kinds(
    vtrain_command: Vtrain, drum: Path
) -> None:
    text = vtrain_command("plugins", "show", "drum", path=(drum,)).stdout
    assert text.count("option  type") == 2
    assert text.count("volume  whole number  3         >= 0, <= 11  tell    how [bold]loud[/bold]") == 2
    assert text.count("name    text          required               tell    whose") == 2
    only = vtrain_command("plugins", "show", "drum", "--kind", "tracker", path=(drum,)).stdout
    assert only.startswith("tracker drum, from drum 1.0:")
    assert only.count("volume") == 1


def test_show_as_json(vtrain_command: Vtrain, drum: Path) -> None:
    shown = json.loads(vtrain_command("plugins", "show", "drum", "--kind", "sampler", "--json", path=(drum,)).stdout)
    assert [part["kind"] for part in shown] == ["sampler"]
    assert shown[0]["options"][0] == {
        "key": "volume",
        "type": "whole number",
        "default": "3",
        "required": False,
        "limits": ">= 0, <= 11",
        "meaning": "how [bold]loud[/bold]",
        "resume": "tell",
    }


def test_show_lists_what_a_family_reads_beside_captions(vtrain_command: Vtrain) -> None:
    shown = vtrain_command("plugins", "show", "toy").stdout
    assert "Beside a clip's caption it reads" in shown
    assert re.search(r"^pace +number from 0 to 10 +nothing +how fast things move$", shown, re.MULTILINE)
    (part,) = json.loads(vtrain_command("plugins", "show", "toy", "--json").stdout)
    assert [extra["name"] for extra in part["caption_extras"]] == ["mood", "pace"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("drumm",), 'Did you mean "drum"?'),
        (("drum", "--kind", "family"), 'no family is called "drum"'),
        (("drum", "--kind", "vegetable"), 'no kind of part is called "vegetable"'),
        (("broken",), "No module named 'no_such_library'"),
    ],
)
def test_showing_what_is_not_there_is_exit_code_2_with_a_remedy(
    vtrain_command: Vtrain, drum: Path, install_plugin: InstallPlugin, arguments: tuple[str, ...], told: str
) -> None:
    broken = install_plugin("broken", "import no_such_library")
    done = vtrain_command("plugins", "show", *arguments, path=(drum, broken))
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_on_a_terminal_the_table_is_wrapped_and_markup_stays_text(drum: Path) -> None:
    parent, child = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(drum), "COLUMNS": "100", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", MAIN, "plugins", "list"], stdout=child, env=environment) as process:
        os.close(child)
        text = b""
        while chunk := _read(parent):
            text += chunk
        assert process.wait(60) == 0
    os.close(parent)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).splitlines()
    assert max(map(len, lines)) <= 100
    assert "[red]a" in text.decode()
    assert "\x1b[31m" not in text.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side was closed
        return b""


def test_a_bug_keeps_its_plain_traceback(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = "from vtrain.cli import app\n@app.app.command('crash')\ndef crash():\n    secret = 1\n    {}['missing']\n"
    done = python("-c", code + "import sys; sys.argv = ['vtrain', 'crash']; app.main()")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.rstrip().endswith("KeyError: 'missing'")
    assert "╭" not in done.stderr


def test_an_interrupt_is_exit_code_130_without_a_traceback(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    code = """
import os, signal
from vtrain.cli import app
@app.app.command('wait')
def wait():
    os.kill(os.getpid(), signal.SIGINT)
"""
    done = python("-c", code + "import sys; sys.argv = ['vtrain', 'wait']; app.main()")
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr


def test_a_user_error_lists_every_problem_with_its_remedy_on_stderr(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    code = """
from vtrain.cli import app
from vtrain.contract import DataError, Problem
@app.app.command('fail')
def fail():
    raise DataError([Problem('a' * 300 + '.mp4', 'is [red]torn[/red] \\x1b[2J', 'Repair it.'), Problem('', 'second')])
import sys; sys.argv = ['vtrain', 'fail']; app.main()
"""
    done = python("-c", code)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "2 errors:",
        f"  {'a' * 300}.mp4: is [red]torn[/red] \\x1b[2J",
        "      Repair it.",
        "  second",
    ]


def test_of_many_problems_the_first_twenty_are_shown_and_the_rest_counted(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError(Problem("", f"number {n}", "remedy") for n in range(51))
    report_error(error)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "51 errors:"
    assert lines[1:-1] == [text for n in range(20) for text in (f"  number {n}", "      remedy")]
    assert lines[-1] == "  and 31 more"
    assert str(error).count("number") == 51, "the library, events and JSON have all"
    report_error(ConfigError(error.problems[:20]))
    assert "more" not in capsys.readouterr().err


SHELF = """
from pydantic import Field
from vtrain.contract import Options, TrackerSpec, hookimpl

class Loud(Options):
    volume: int = Field(3, description=" ")

class Drum:
    events, start, show, state = (), None, None, None
    def finish(self): ...

@hookimpl
def vtrain_trackers():
    return (SPEC,)

SPEC = TrackerSpec("shelf", "a tracker", Loud, lambda options: Drum())
"""


def test_check_says_each_problem_with_place_and_remedy_and_ends_with_exit_code_2(
    vtrain_command: Vtrain, install_plugin: InstallPlugin
) -> None:
    shelf = install_plugin("shelf", SHELF)
    done = vtrain_command("plugins", "check", "shelf", path=(shelf,))
    assert done.returncode == 2
    assert re.search(r"^1 problem +options_are_described$", done.stdout, re.MULTILINE)
    assert f"tracker shelf: options_are_described ({shelf / 'shelf_plugin.py'}:6)" in done.stdout
    assert done.stdout.count("problem:") == 1
    assert 'Say it: Field(..., description="...").' in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_check_as_json_of_a_sound_plugin_is_exit_code_0(
    vtrain_command: Vtrain, install_plugin: InstallPlugin, tmp_path: Path
) -> None:
    """Options without a default come from a run's file."""
    source = SHELF.replace('Field(3, description=" ")', 'Field(description="how loud")')
    shelf = install_plugin("shelf", source)
    tables = ('[run]\noutput_dir = "o"', '[model]\nuse = "toy"\ntrain = "full"', "[train]\nsteps = 1")
    more = (
        '[[data]]\nuse = "folder"\npath = "clips"',
        "[optimizer]\nlr = 1.0",
        '[[tracker]]\nuse = "shelf"\nvolume = 3',
    )
    config = tmp_path / "config.toml"
    config.write_text("\n".join((*tables, *more)), encoding="utf-8")
    for given, result in (((), "not checked"), (("--config", str(config)), "ok")):
        done = vtrain_command("plugins", "check", "shelf", "--json", *given, path=(shelf,))
        assert done.returncode == 0, done.stdout
        (report,) = json.loads(done.stdout)
        assert (report["distribution"], report["problems"], report["parts"]) == ("shelf", 0, ["tracker shelf"])
        results = {each["rule"]: each["result"] for each in report["rules"]}
        assert results["parts_are_built_without_anything_heavy"] == result
        assert results["hooks_are_spelt_right"] == "ok"


def test_new_writes_a_package_says_what_is_next_and_overwrites_nothing(vtrain_command: Vtrain, tmp_path: Path) -> None:
    place = tmp_path / "my plugins"
    place.mkdir()
    arguments = ("plugins", "new", "vtrain-drum", "--kind", "data-backend", "--directory", str(place))
    done = vtrain_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"  cd '{place / 'vtrain-drum'}'\n" in done.stdout, "it can be pasted into a shell"
    assert (place / "vtrain-drum" / "vtrain_drum" / "plugin.py").is_file()
    again = vtrain_command(*arguments)
    assert again.returncode == 2
    assert "this is there already" in again.stderr
    wrong = vtrain_command(*arguments[:3], "--kind", "vegetable")
    assert wrong.returncode == 2
    assert 'no kind of part is called "vegetable"' in wrong.stderr
