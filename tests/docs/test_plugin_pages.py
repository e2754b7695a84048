"""The pages of the small kinds: each shows its example to the letter, and names all that such a part can be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import vtrain.testing
from vtrain.contract import KINDS
from vtrain.contract.abilities import ABILITIES, Abilities, members

EXAMPLES = {
    "data-backend": "zip",
    "optimizer": "lion",
    "regularizer": "disperse",
    "sampler": "levels",
    "tracker": "post",
}
"""Page -> its example: the folder vtrain-zip of examples/plugins."""
SORTS = {page: (page.replace("-", " "),) for page in EXAMPLES} | {
    "optimizer": (),
    "regularizer": ("regularizer", "loss module"),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_page_shows_its_example_to_the_letter(kind: str, root: Path, every_block: tuple[Any, ...]) -> None:
    folder = root / "examples/plugins" / f"vtrain-{EXAMPLES[kind]}"
    shown = {block.file: block.text for block in every_block if block.page.stem == kind and block.file}
    there = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.is_file()}
    assert len(there) == 3
    assert shown == there


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_page_names_every_member_that_a_part_must_have_and_every_ability_with_what_is_lacking(
    kind: str, root: Path
) -> None:
    text = (root / "docs/plugins" / f"{kind}.md").read_text(encoding="utf-8")
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    none = Abilities(object, ())
    for known in (ABILITIES.get(sort, none) for sort in SORTS[kind]):
        assert [name for name in members(known.must) - {"mro"} if not re.search(rf"\b{name}\b", code)] == []
        for ability in known.can:
            (row,) = re.findall(rf"^\|[^|]+\?[^|]*\| (`{ability.__name__}`[^|]*) \| [^|]+ \|$", text, re.MULTILINE)
            assert [name for name in members(ability) if f"`{name}" not in row] == [], ability


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_page_names_the_rules_the_spec_and_how_to_begin(kind: str, root: Path) -> None:
    text = (root / "docs/plugins" / f"{kind}.md").read_text(encoding="utf-8")
    kit = "".join(word.capitalize() for word in kind.split("-")) + "Tests"
    assert kit in vtrain.testing.__all__
    assert f"`{kit}`" in text
    (spec,) = [each for each in KINDS if each.kind == kind.replace("-", "_")]
    assert f"`{spec.__name__}`" in text
    begin = " ".join(text.split())
    assert f"`vtrain plugins new vtrain-{EXAMPLES[kind]} --kind {kind}`" in begin
