"""What others rely on is checked in as text: whoever changes it sees so, and decides."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

API = Path(__file__).with_name("api.py")


@pytest.fixture(scope="module")
def api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api", API)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_contract_is_what_its_checked_in_text_says(api: ModuleType) -> None:
    found = api.differences(api.texts())
    if found:
        pytest.fail("\n".join([*found, "", f"If that is meant: {api.WRITE}"]), pytrace=False)


def test_the_text_is_made_without_torch(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = f"import runpy, sys; runpy.run_path({str(API)!r})['texts'](); print('torch' in sys.modules)"
    done = python("-c", code)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.parametrize(
    ("file", "line", "other"),
    [
        ("contract.txt", "    steps: int\n", "    steps: float\n"),
        ("contract.txt", "ENTRY_POINT_GROUP = 'vtrain.v1'", "ENTRY_POINT_GROUP = 'vtrain.v2'"),
        ("testing.txt", "    rule test_options_are_frozen\n", ""),
        ("events.txt", "VERSION = 1", "VERSION = 2"),
        ("commands.txt", "    --yes: bool = False\n", ""),
        ("options.txt", "seed: whole number; = 42; >= 0,", "seed: whole number; = 43; >= 0,"),
        ("library.txt", "signals: bool=False", "signals: bool=True"),
    ],
)
def test_a_name_a_default_or_a_rule_that_changed_is_a_difference(
    api: ModuleType, tmp_path: Path, file: str, line: str, other: str
) -> None:
    now = {each.name: each.read_text(encoding="utf-8") for each in api.FOLDER.glob("*.txt")}
    assert line in now[file]
    for name, text in now.items():
        (tmp_path / name).write_text(text.replace(line, other) if name == file else text, encoding="utf-8")
    found = api.differences(now, tmp_path)
    assert found[:2] == [f"--- api/{file}", f"+++ api/{file}, as it is"]
    assert any(each.startswith("+") and line.split("\n")[0].strip() in each for each in found)


def test_what_is_inherited_from_a_class_that_is_not_exported_stands_with_the_class_that_is(api: ModuleType) -> None:
    text = (api.FOLDER / "testing.txt").read_text(encoding="utf-8")
    rules = text.split("class RegularizerTests")[1].split("\n\n")[0]
    assert "rule test_feature_arithmetic_equals_what_the_encoder_gives" in rules
    assert "fixture of the class regularizer -> Regularizer" in rules


def test_what_a_plugin_of_this_repository_imports_of_the_contract_is_in_the_text(api: ModuleType) -> None:
    """Also of its modules below: "plugins import vtrain.contract" says of them what may be relied on."""
    text = (api.FOLDER / "contract.txt").read_text(encoding="utf-8")
    assert "listed" in api.taken()["vtrain.contract.specs"]
    for module, names in api.taken().items():
        section = text.split(f"# {module}\n")[1].split("\n# ")[0]
        for name in names:
            assert any(line.startswith((f"def {name}(", f"class {name}", f"{name} =")) for line in section.splitlines())
