"""`vtrain config`, in a fresh process as a user runs it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from vtrain.cli.plan import show_config
from vtrain.run.prepare import planned

Python = Callable[..., "subprocess.CompletedProcess[str]"]

FAMILY = """
from pydantic import Field
from vtrain.contract import FamilySpec, Options, hookimpl

class DrumOptions(Options):
    path: str = Field(description="where")

@hookimpl
def vtrain_families():
    return [FamilySpec("drum", "a family for tests", DrumOptions, lambda options: None, sampler="flow")]
"""
GOOD = """\
[run]
output_dir = "out"
[model]
use = "drum"
path = "m"
train = "lora"
[[data]]
use = "folder"
path = "clips"
[train]
steps = 7
[optimizer]
lr = 1.0
"""


@pytest.fixture
def run(python: Python, install_plugin: Callable[..., Path]) -> Callable[..., subprocess.CompletedProcess[str]]:
    folder = install_plugin("drum", FAMILY)
    return lambda *arguments: python("-c", "from vtrain.cli.app import main; main()", *arguments, path=(folder,))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(GOOD)
    return path


def test_show_prints_every_value_with_its_origin(
    run: Callable[..., subprocess.CompletedProcess[str]], file: Path
) -> None:
    lines = run("config", "show", str(file)).stdout.splitlines()
    assert lines[0].split() == ["key", "value", "origin"]
    assert ["train.steps", "7", f"{file}:11"] in [line.split() for line in lines]
    assert ["run.seed", "42", "default"] in [line.split() for line in lines]


def test_show_as_json_has_typed_values(run: Callable[..., subprocess.CompletedProcess[str]], file: Path) -> None:
    rows = json.loads(run("config", "show", str(file), "--json").stdout)
    assert {"key": "train.steps", "value": 7, "origin": f"{file}:11", "resume": "tell"} in rows


def test_a_bad_file_is_exit_code_2_with_every_problem(
    run: Callable[..., subprocess.CompletedProcess[str]], file: Path
) -> None:
    file.write_text(GOOD.replace("steps", "stesp").replace("drum", "durm"))
    done = run("config", "show", str(file))
    assert done.returncode == 2
    assert done.stdout == ""
    assert f'  {file}:11: unknown key train.stesp.\n      Did you mean "steps"?\n' in done.stderr
    assert f'  {file}:4: no family is called "durm".\n      Did you mean "drum"?' in done.stderr


@pytest.mark.parametrize("command", [("plan",), ("run",), ("config", "show")])
def test_a_missing_file_is_a_clean_error_of_every_command(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, command: tuple[str, ...]
) -> None:
    done = run(*command, str(tmp_path / "none.toml"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_schema_of_all_installed_parts_is_valid_and_takes_the_example(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    import tomli

    schema = json.loads(run("config", "schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(tomli.loads(GOOD))


NOISY = """
import os
from pydantic import Field, field_validator
from vtrain.contract import Needs, Options, RegularizerSpec, hookimpl

class NoisyOptions(Options):
    weight: float = Field(1.0, description="how much")

    @field_validator("weight")
    @classmethod
    def _says(cls, value):
        print("noise of a validator")
        os.write(1, b"noise past Python")
        return value

class Noisy:
    def __init__(self, options):
        print("noise of build")

    def needs(self):
        return Needs()

    def describe(self):
        return ()

    def load(self, tap_widths):
        raise AssertionError("a plan loads nothing")

@hookimpl
def vtrain_regularizers():
    return [RegularizerSpec("noisy", "prints", NoisyOptions, Noisy)]
"""


def test_what_the_code_of_a_part_prints_does_not_reach_stdout(
    install_plugin: Callable[..., Path], file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    install_plugin("noisy", NOISY)
    file.write_text(
        GOOD.replace('use = "drum"\npath = "m"', 'use = "toy"') + '[[regularizer]]\nuse = "noisy"\nweight = 2.0\n'
    )
    show_config(file, as_json=True)
    out, err = capfd.readouterr()
    assert ("regularizer[0].use", "noisy") in [(row["key"], row["value"]) for row in json.loads(out)]
    assert "noise of a validator" in err
    planned(file)
    out, err = capfd.readouterr()
    assert out == ""
    assert "noise of build" in err
