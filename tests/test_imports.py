"""What the light commands import, seen in sys.modules of a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from PIL import Image

Python = Callable[..., "subprocess.CompletedProcess[str]"]

HEAVY = {"torch", "diffusers", "transformers", "accelerate"}
PROBE = """
import json, sys
sys.argv = ["vtrain", *json.loads(sys.argv[1])]
from vtrain.cli.app import main
try:
    main()
except SystemExit as end:
    code = end.code
print("\\n" + json.dumps([code, sorted({name.split(".")[0] for name in sys.modules}), sorted(sys.modules)]))
"""
GOOD = """
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
steps = 1
[optimizer]
lr = 1.0
"""
FAMILY = """
from pydantic import Field
from vtrain.contract import FamilySpec, Options, hookimpl

class DrumOptions(Options):
    path: str = Field(description="where")

@hookimpl
def vtrain_families():
    return [FamilySpec("drum", "a family for tests", DrumOptions, lambda options: None, sampler="flow")]
"""


@pytest.fixture
def imported(python: Python) -> Callable[..., tuple[int, set[str], set[str]]]:
    """imported("plugins", "list") -> exit code, top-level packages and all modules that the command imported."""

    def run(*arguments: str, path: tuple[Path, ...] = ()) -> tuple[int, set[str], set[str]]:
        done = python("-c", PROBE, json.dumps(arguments), path=path)
        assert done.returncode == 0, done.stderr
        code, packages, modules = json.loads(done.stdout.splitlines()[-1])
        return code or 0, set(packages), set(modules)

    return run


def test_the_probe_sees_a_heavy_import(
    imported: Callable[..., tuple[int, set[str], set[str]]], install_plugin: Callable[..., Path]
) -> None:
    folder = install_plugin("drum", "import torch\n" + dedent(FAMILY))
    (folder / "torch.py").touch()  # found before the real one, which need not be there
    _, packages, _ = imported("plugins", "list", path=(folder,))
    assert packages & HEAVY == {"torch"}


def test_help_imports_neither_plugins_nor_pydantic(imported: Callable[..., tuple[int, set[str], set[str]]]) -> None:
    code, packages, modules = imported("--help")
    assert code == 0
    assert not packages & {*HEAVY, "pydantic", "pluggy", "rich", "av", "numpy", "tree_sitter", "vtrain_builtin"}
    assert not modules & {"vtrain.contract", "vtrain.registry", "vtrain.config", "importlib.metadata"}


@pytest.mark.parametrize("arguments", [("plugins", "list"), ("plugins", "list", "--json")])
def test_listing_plugins_imports_nothing_heavy(
    imported: Callable[..., tuple[int, set[str], set[str]]], arguments: tuple[str, ...]
) -> None:
    code, packages, modules = imported(*arguments)
    assert code == 0
    assert not packages & {*HEAVY, "av", "numpy", "tree_sitter", "ftfy", "wcwidth"}
    assert {"vtrain_sanavideo.plugin", "vtrain_wan.plugin"} <= modules
    assert not modules & {"vtrain_sanavideo.family", "vtrain_sanavideo.flow", "vtrain_sanavideo.crepa"}
    assert not modules & {"vtrain_wan.family", "vtrain_wan.text", "vtrain_wan.checkpoint"}


@pytest.mark.parametrize("arguments", [("plugins", "show", "adamw"), ("config", "schema")])
def test_describing_options_imports_nothing_heavy(
    imported: Callable[..., tuple[int, set[str], set[str]]], arguments: tuple[str, ...]
) -> None:
    code, packages, _ = imported(*arguments)
    assert code == 0
    assert not packages & HEAVY


def test_showing_a_configuration_imports_nothing_heavy(
    imported: Callable[..., tuple[int, set[str], set[str]]], install_plugin: Callable[..., Path], tmp_path: Path
) -> None:
    folder = install_plugin("drum", FAMILY)
    (tmp_path / "config.toml").write_text(GOOD)
    code, packages, _ = imported("config", "show", str(tmp_path / "config.toml"), path=(folder,))
    assert code == 0
    assert not packages & HEAVY


def test_planning_data_that_are_known_imports_neither_numpy_nor_rich_nor_what_decodes(
    imported: Callable[..., tuple[int, set[str], set[str]]], tmp_path: Path
) -> None:
    (tmp_path / "clips").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "clips" / "red.png")
    (tmp_path / "clips" / "red.txt").write_text("a red field")
    config = tmp_path / "config.toml"
    image = '"clips"\nimages = true\nvideo = { min_frames = 1 }'
    config.write_text(GOOD.replace('"drum"\npath = "m"', '"toy"').replace('"clips"', image))
    decoding = {"vtrain.data.decoding.process", "multiprocessing.pool"}
    code, _, first = imported("plan", str(config))
    assert code == 0
    assert decoding <= first
    code, packages, modules = imported("plan", str(config))
    assert code == 0
    assert not packages & {*HEAVY, "av", "numpy", "rich"}
    assert not modules & {*decoding, "vtrain_sanavideo.crepa"}


@pytest.mark.parametrize("command", [("plan",), ("run",), ("config", "show")])
def test_refusing_a_bad_configuration_imports_nothing_heavy(
    imported: Callable[..., tuple[int, set[str], set[str]]], tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "bad.toml").write_text("[run]\noutput = 3\n")
    code, packages, _ = imported(*command, str(tmp_path / "bad.toml"))
    assert code == 2
    assert not packages & HEAVY


def test_the_entry_modules_of_all_installed_plugins_import_nothing_heavy(python: Python) -> None:
    code = (
        "import sys; from importlib.metadata import entry_points\n"
        "names = [entry.load().__name__ for entry in entry_points(group='vtrain.v1')]\n"
        "print(len(names), *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    count, *packages = done.stdout.split()
    assert int(count) >= 2
    assert not set(packages) & HEAVY


def test_importing_the_contract_imports_nothing_heavy(python: Python) -> None:
    done = python("-c", "import sys, vtrain.contract; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    assert not set(done.stdout.split()) & {*HEAVY, "numpy", "av", "rich", "typer"}
