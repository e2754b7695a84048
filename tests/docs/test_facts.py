"""Lists on the pages that the code has too are the code's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vtrain.contract
import vtrain.testing
from vtrain.cli.app import app
from vtrain.cli.run import UNVALIDATED
from vtrain.config.foreign import FORMATS
from vtrain.contract import HOOK_SPECS, VtrainError
from vtrain.contract.abilities import ABILITIES, members
from vtrain.data.decoding.video import SUFFIXES
from vtrain_sanavideo.geometry import OFFICIAL_480P, OFFICIAL_720P
from vtrain_wan.family import TI2VFamily, Wan21Family


@pytest.fixture
def said(root: Path) -> Any:
    """said("data.md"): the page's words, line breaks as spaces."""
    return lambda name: " ".join((root / "docs" / name).read_text(encoding="utf-8").split())


def kinds(source: str) -> Iterator[str]:
    """The kinds of reasons that a module skips files for."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Skipped":
            kind = node.args[1]
            if isinstance(kind, ast.Constant):
                yield str(kind.value)


def test_every_reason_to_skip_a_file_is_on_the_page(root: Path) -> None:
    found = {kind for file in (root / "core/vtrain/data").rglob("*.py") for kind in kinds(file.read_text())}
    assert {"too short", "bad caption"} <= found
    rows = re.findall(r"^\| ([^|]+) \| ", (root / "docs" / "data.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found | {"not a video", "decoding"} <= set(rows)


def test_the_suffixes_of_videos_are_the_codes(said: Any) -> None:
    listed = re.search(r"by suffix: ([a-z0-9 ]+), whatever", said("data.md"))
    assert listed is not None
    assert {f".{suffix}" for suffix in listed[1].split()} == SUFFIXES


def test_the_buckets_are_the_codes(said: Any) -> None:
    listed = re.search(r"is the 11 official buckets: ([0-9x ]+)\.", said("sanavideo.md"))
    assert listed is not None
    assert listed[1].split() == [str(size) for size in OFFICIAL_480P]
    listed = re.search(r"has these 11 buckets: ([0-9x ]+)\.", said("sanavideo.md"))
    assert listed is not None
    assert listed[1].split() == [str(size) for size in OFFICIAL_720P]


def test_the_hooks_are_the_codes(root: Path) -> None:
    text = (root / "docs" / "plugins.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(vtrain_\w+)` \| `(\w+)` \|", text, flags=re.MULTILINE))
    assert rows == {hook: spec.__name__ for hook, spec in HOOK_SPECS.items()}


def test_every_member_and_ability_of_a_family_stands_on_its_page(root: Path) -> None:
    text = (root / "docs" / "plugins" / "family.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", text))
    for sort in ("family", "denoiser", "video codec"):
        parts = ABILITIES[sort]
        assert not {name for each in (parts.must, *parts.can) for name in members(each)} - named, sort
        assert not {each.__name__ for each in parts.can} - named, sort


def test_the_classes_of_the_kit_are_the_codes(said: Any) -> None:
    assert all(f"`{name}`" in said("plugins.md") for name in vtrain.testing.__all__)


def test_the_classes_of_errors_are_the_codes(root: Path) -> None:
    text = (root / "docs" / "errors.md").read_text(encoding="utf-8")
    classes = {name for name in vars(vtrain.contract) if name.endswith("Error")} - {VtrainError.__name__}
    assert set(re.findall(r"^\| `(\w+Error)` \|", text, flags=re.MULTILINE)) == classes
    assert VtrainError.exit_code == 2
    codes = re.findall(r"^\| ([\d, ]+) \|", text, flags=re.MULTILINE)
    assert codes[:3] == ["0", str(VtrainError.exit_code), str(UNVALIDATED)]


def table(text: str) -> list[tuple[list[str], list[str]]]:
    """Of each row of a page's tables: the code in its first cell, and in its second."""
    rows = re.findall(r"^\| ([^|]*`[^|]*) \| ([^|]*) \|", text, flags=re.MULTILINE)
    return [(re.findall(r"`([^`]+)`", first), re.findall(r"`([^`]+)`", second)) for first, second in rows]


def test_the_table_of_simpletuners_keys_has_all_that_a_file_is_known_by_and_only_keys_that_are_here(root: Path) -> None:
    rows = table((root / "docs" / "simpletuner.md").read_text(encoding="utf-8"))
    assert FORMATS[0].keys <= {key for first, _ in rows for key in first}
    said = {key for _, second in rows for key in second} - {"[[data]]"}
    resume = (root / "docs" / "resume.md").read_text(encoding="utf-8")
    assert len(said) > 40
    assert [
        key for key in said if not re.search(rf"^\| `{re.escape(key)}(?: \(\w+\))?` \|", resume, re.MULTILINE)
    ] == []
    assert all((root / name).exists() for each in FORMATS for name in re.findall(r"docs/\w+\.md", each.remedy))


def test_the_changelog_names_every_command(root: Path) -> None:
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    names = {str(command.name) for command in app.registered_commands}
    assert names >= {"run", "plan"}
    for name in names | {"plugins list", "plugins show", "config schema", "config show"}:
        assert re.search(rf"`(vtrain )?{name}`", text), name


def test_the_plugin_of_the_readme_is_that_of_the_page(every_block: tuple[Any, ...]) -> None:
    for file in ("vtrain_motion.py", "pyproject.toml"):
        pages = ("README.md", "plugins.md")
        same = [block.text for block in every_block if block.file == file and block.page.name in pages]
        assert len(same) == 2
        assert same[0] == same[1]
        assert len(same[0].splitlines()) <= 45


def test_planted_kinds_are_found() -> None:
    assert list(kinds('Skipped("dropped", "too odd", "because")')) == ["too odd"]


def test_the_page_on_wan_lists_its_buckets(said: Any) -> None:
    listed = dict(re.findall(r"\| (wan\S+ \| \S+) \| ([0-9x ]+) \|", said("wan.md")))
    families = {"wan21": Wan21Family, "wan22-ti2v": TI2VFamily}
    wanted = {
        f"{name} | {bucket_set}": " ".join(map(str, sizes))
        for name, family in families.items()
        for bucket_set, sizes in family.sizes.items()
    }
    assert listed == wanted


def test_no_page_is_left_open() -> None:
    root = Path(__file__).parents[2]
    pages = [page for folder in (".", "docs", "docs/plugins", "benchmarks") for page in (root / folder).glob("*.md")]
    assert len(pages) > 30
    assert [page.name for page in pages if "TODO" in page.read_text(encoding="utf-8")] == []
