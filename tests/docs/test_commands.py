"""Commands on the pages exist; those that are shown with their output print it."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from vtrain.cli.app import app

HOME = "/home/me/vtrain"
"""Where the pages pretend to be."""

OTHERS = {"pip", "nox", "hf", "git", "cd", "cp", "python", "torchrun", "accelerate", "tensorboard", "echo"}
"""Programs that a page may name beside vtrain."""

LAUNCHERS = ("-m vtrain.cli ",)
Run = Callable[..., subprocess.CompletedProcess[str]]


def commands(block: Any) -> Iterator[str]:
    """The commands of a block: lines of `sh`, lines after "$ " of `console`. "&&" parts them; comments are none."""
    for line in block.text.splitlines():
        text = line.removeprefix("$ ") if block.language == "console" and line.startswith("$ ") else line
        if block.language == "console" and text is line:
            continue
        yield from (part.strip() for part in re.sub(r"\s#.*$", "", text).split("&&") if part.strip())


def command_fault(root: Path, text: str, made: Collection[str] = ()) -> str:
    """What is wrong with a command; "" if it could be given. made: names of files that the page makes."""
    words = [word for word in shlex.split(text) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    for launcher in LAUNCHERS:
        if launcher in text:
            return vtrain_fault(shlex.split(text.split(launcher, 1)[1]))
    if words[0] == "vtrain":
        return vtrain_fault(words[1:])
    if words[0] not in OTHERS:
        return f"{words[0]} is no program that pages name"
    if words[0] == "nox":
        sessions = {node.name for node in ast.parse((root / "noxfile.py").read_text()).body if hasattr(node, "name")}
        return "" if words[1] == "-s" and words[2] in sessions else f"no session {words[2]}"
    if words[0] == "python" and words[1] != "-m":
        return "" if words[1] in made or (root / words[1]).exists() else f"no file {words[1]}"
    return ""


def vtrain_fault(words: list[str]) -> str:
    """What the real command line says against these words."""
    command: Any = typer.main.get_command(app)
    words = words[: words.index(">")] if ">" in words else list(words)
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            return f"no command {' '.join(words[:1])}"
        command = command.commands[words.pop(0)]
    try:
        command.make_context("vtrain", words)
    except Exception as error:  # noqa: BLE001  # whatever the parser raises is the answer
        return str(error) or type(error).__name__
    return ""


def test_commands_on_the_pages_exist(shell_block: Any, root: Path, every_block: tuple[Any, ...]) -> None:
    found = list(commands(shell_block))
    made = {block.file for block in every_block if block.page == shell_block.page}
    assert found
    assert {text: fault for text in found if (fault := command_fault(root, text, made))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "vtrain train config.toml",
        "vtrain run",
        "vtrain plan config.toml --jsn",
        "vtrain plugins",
        "torchrun --nproc_per_node=2 -m vtrain.cli rum config.toml",
        "nox -s dmeo",
        "python examples/nothing.py",
        "simpletuner train",
    ],
)
def test_a_planted_wrong_command_is_found(root: Path, text: str) -> None:
    assert command_fault(root, text)


def shown(block: Any) -> Iterator[tuple[str, list[str]]]:
    """(command, the lines of output below it)."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
    for part in parts:
        command, *output = part.splitlines()
        yield command, output


def alike(expected: list[str], got: list[str]) -> bool:
    """Line by line; a line "..." stands for any number of lines."""
    pattern = "\n".join(r"(?:.*\n)*?.*" if line == "..." else re.escape(line.rstrip()) for line in expected)
    return re.fullmatch(pattern, "\n".join(line.rstrip() for line in got)) is not None


def test_output_on_the_pages_is_what_is_printed(
    console_block: Any, root: Path, prepared: Path, run_python: Run
) -> None:
    for command, expected in shown(console_block):
        words = shlex.split(command)
        assert words[0] == "vtrain", "only vtrain is run here"
        done = run_python("-m", "vtrain.cli", *words[1:], folder=prepared)
        text = (done.stdout + done.stderr).replace(str(prepared), HOME).replace(str(root), HOME)
        assert alike(expected, text.splitlines()), text


def test_a_planted_wrong_output_is_found() -> None:
    assert alike(["a", "...", "d"], ["a", "b", "c", "d"])
    assert alike(["a (x)", "b"], ["a (x)", "b"])
    assert not alike(["a", "b"], ["a", "c"])
    assert not alike(["a", "...", "d"], ["a", "b", "c"])
    assert not alike(["a"], ["a", "b"])


def test_some_output_is_shown(every_block: tuple[Any, ...]) -> None:
    console = [block for block in every_block if block.language == "console"]
    assert sum(len(output) for block in console for _, output in shown(block)) > 20
