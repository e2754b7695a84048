"""What pages point at is there, and their generated parts are what the generator gives now."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vtrain.testing
from vtrain.config import load
from vtrain.contract.events import EVENTS
from vtrain.registry import discover
from vtrain.train.settings import declared

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = ("core/", "plugins/", "sanavideo_plugin", "wan_plugin", "tests/", "docs/", "examples/", "benchmarks/")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = Path(__file__).parents[2] / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tests_there() -> set[str]:
    """Names of all tests of the repository, the kit's rules included."""
    root = Path(__file__).parents[2]
    found: set[str] = set()
    for folder in ("tests", "sanavideo_plugin/tests", "wan_plugin/tests", "core/vtrain/testing"):
        for file in (root / folder).rglob("*.py"):
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            found |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return found


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """What headings are called in links, as GitHub makes it."""
    heads = re.findall(r"^#+ (.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def link_fault(page: Path, target: str) -> str:
    if target.startswith(("https://", "http://", "mailto:")):
        return ""
    name, _, anchor = target.partition("#")
    path = page.parent / name if name else page
    if not path.exists():
        return f"{target}: no such file"
    if anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
        return f"{target}: no such heading"
    return ""


def name_fault(root: Path, known: set[str], name: str) -> str:
    """Code in a page's prose that names a file or a test which is not there."""
    if re.fullmatch(r"test_\w+", name) and name not in known:
        return f"{name}: no such test"
    if name.startswith(FOLDERS) and " " not in name and not (root / name).exists():
        return f"{name}: no such file"
    return ""


def test_links_resolve(page: Path) -> None:
    targets = LINK.findall(prose(page.read_text(encoding="utf-8")))
    assert [fault for target in targets if (fault := link_fault(page, target))] == []


def test_files_and_tests_that_are_named_exist(page: Path, root: Path, tests_there: set[str]) -> None:
    names = CODE.findall(prose(page.read_text(encoding="utf-8")))
    assert [fault for name in names if (fault := name_fault(root, tests_there, name))] == []


def test_planted_wrong_links_and_names_are_found(root: Path, tests_there: set[str]) -> None:
    page = root / "docs" / "resume.md"
    assert link_fault(page, "nothing.md")
    assert link_fault(page, "#no-such-heading")
    assert link_fault(page, "#what-may-change") == ""
    assert name_fault(root, tests_there, "test_that_is_not_there")
    assert name_fault(root, tests_there, "core/vtrain/nothing.py")
    assert name_fault(root, tests_there, "core/vtrain/train") == ""


def sketched(page: str) -> set[str]:
    """Paths of Python files in the pictures of a page."""
    pictures = re.findall(r"^```text\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    return {path for picture in pictures for path in re.findall(r"[\w/]+/\w+\.py", picture)}


def test_files_in_the_pictures_of_the_architecture_exist(root: Path) -> None:
    paths = sketched((root / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert len(paths) > 20
    assert [path for path in paths if not (root / path).exists() and not (root / "core/vtrain" / path).exists()] == []


def test_the_picture_of_the_layers_has_each_at_its_rank(root: Path) -> None:
    layers = re.search(r"^```text\n(.*?)^```$", (root / "docs/architecture.md").read_text(), re.MULTILINE | re.DOTALL)
    assert layers is not None
    found: dict[str, int] = {}
    for rank, words in re.findall(r"^ (\d)  (.*)$", layers[1], flags=re.MULTILINE):
        there = {path.name.removesuffix(".py") for path in (root / "core" / "vtrain").iterdir()}
        found |= {word: int(rank) for word in re.findall(r"(?:^|\s{3,})(\w+)(?:\.py)?", words) if word in there}
    source = ast.parse((root / "tests" / "test_layers.py").read_text(encoding="utf-8"))
    ranks = next(
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "RANK"
    )
    assert found == ranks


def wishes(page: str) -> dict[str, tuple[list[str], list[str]]]:
    """Heading -> the files and the tests that it names."""
    found = {}
    for part in page.split("\n## ")[1:]:
        files, tests = (
            re.search(rf"^{label}: (.*?)(?:\n\n|\n*\Z)", part, re.MULTILINE | re.DOTALL) for label in ("Files", "Tests")
        )
        assert files is not None, part
        assert tests is not None, part
        found[part.splitlines()[0]] = (CODE.findall(files[1]), CODE.findall(tests[1]))
    return found


def test_every_wish_of_where_do_i_change_names_files_and_tests_that_exist(root: Path) -> None:
    found = wishes((root / "docs" / "where-do-i-change.md").read_text(encoding="utf-8"))
    assert len(found) >= 12
    for wish, (files, tests) in found.items():
        assert files, wish
        assert tests, wish
        assert [path for path in (*files, *tests) if not (root / path).exists()] == [], wish
        assert all("/test" in f"/{path}" for path in tests), wish


def test_each_of_the_sentences_names_a_test(root: Path, tests_there: set[str]) -> None:
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", (root / "docs/architecture.md").read_text(), flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 15))
    assert all(set(CODE.findall(tests)) & tests_there for _, tests in rows)


def test_generated_parts_are_up_to_date(page: Path, generator: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")
    assert generator.fresh(text) == text, "run: python docs/generate.py"


def test_a_changed_generated_part_is_found(root: Path, generator: ModuleType) -> None:
    text = (root / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert "| `seed` | whole number | `42` |" in text
    assert generator.fresh(text.replace("| `seed` | whole number | `42` |", "| `seed` | whole number | `43` |")) == text


def test_the_generated_pages_have_every_key_of_every_table(root: Path, generator: ModuleType) -> None:
    configuration = (root / "docs" / "configuration.md").read_text(encoding="utf-8")
    resume = (root / "docs" / "resume.md").read_text(encoding="utf-8")
    keys = [key for key, _ in generator.rules()]
    assert len(keys) > 70
    for key in keys:
        assert f"`{key}`" in resume, key
        assert f"`{key.split(' ')[0].split('.', 1)[1]}`" in configuration, key


def test_every_event_and_each_of_its_fields_is_on_the_page_with_its_type_and_meaning(
    root: Path, generator: ModuleType
) -> None:
    page = (root / "docs" / "events.md").read_text(encoding="utf-8")
    for kind in (*EVENTS.values(), *generator.RECORDS):
        part = page.split(f"### `{kind.__name__}`\n")[1].split("\n### ")[0]
        rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", part, re.MULTILINE)
        assert [name for name, _, _ in rows] == [each.name for each in fields(kind)], kind
        assert all(of_type.strip() and meaning.strip() for _, of_type, meaning in rows), kind


def test_every_rule_of_the_kit_is_on_its_page_with_what_it_holds(root: Path) -> None:
    page = (root / "docs" / "plugins" / "rules.md").read_text(encoding="utf-8")
    kits = [getattr(vtrain.testing, name) for name in vtrain.testing.__all__]
    rules = {name for kit in kits for name in dir(kit) if name.startswith("test_")}
    assert len(rules) > 100
    assert [rule for rule in sorted(rules) if not re.search(rf"^\| `{rule}` \| \S.* \|$", page, re.MULTILINE)] == []


def test_each_planted_mistake_names_a_rule_that_the_kit_has(root: Path) -> None:
    page = (root / "docs" / "plugins" / "rules.md").read_text(encoding="utf-8").split("## Planted mistakes")[1]
    found = re.findall(r"^\| .+ \| `(test_\w+)` \| .+ \|$", page, re.MULTILINE)
    assert len(found) >= 25
    assert set(found) <= {name for kit in vtrain.testing.__all__ for name in dir(getattr(vtrain.testing, kit))}


def test_a_field_that_nobody_explains_is_no_page(generator: ModuleType) -> None:
    @dataclass(frozen=True)
    class Odd:
        """Something. known: what it is."""

        known: int
        unknown: int

    with pytest.raises(KeyError, match="unknown"):
        generator.described(Odd)


@pytest.mark.parametrize("name", ["sanavideo-2b-full.toml", "sanavideo-2b-lora.toml", "demo.toml"])
def test_the_resume_table_says_what_resume_does(root: Path, generator: ModuleType, name: str) -> None:
    said: dict[str, str] = {key.split(" ")[0]: option.resume for key, option in generator.rules()}
    done = declared(load(root / "examples" / name, discover()))
    assert len(done) > 60
    for key, setting in done.items():
        plain = re.sub(r"\[\d+\]", "", key)
        plain = re.sub(r"^(validation\.(?:prompts|images))\..*", r"\1", plain)  # keys there are the user's own
        assert said[plain] == setting.resume, key


def test_a_regularizer_refuses_as_the_table_says(
    root: Path,
    tmp_path: Path,
    installed_from: Callable[[Path, Path], Path],
    monkeypatch: pytest.MonkeyPatch,
    make_block: Callable[..., Any],
    as_file: Callable[[Any], str],
) -> None:
    monkeypatch.syspath_prepend(str(installed_from(root / "docs" / "plugins.md", tmp_path)))
    path = tmp_path / "config.toml"
    path.write_text(as_file(make_block("toml", '[[regularizer]]\nuse = "motion"', "fragment")), encoding="utf-8")
    done = declared(load(path, discover()))
    assert done["regularizer[0].use"].resume == "refuse"
    assert done["regularizer[0].weight"].resume == "tell"
