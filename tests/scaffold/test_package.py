"""`vtrain plugins new`: each kind's package keeps the rules that need no model, and a name that cannot be is refused in words."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vtrain.contract import KINDS, Catalog, ConfigError, plugin_rules, spec_rules
from vtrain.contract.spec_rules import NotChecked
from vtrain.registry import discover
from vtrain.scaffold.package import LONGEST, Names, new_plugin, rendered

NOTHING = Catalog({}, ())
SORTS = [kind.kind for kind in KINDS]
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """write(name, kind): a new package, on the path."""

    def made(name: str, kind: str) -> Path:
        place = new_plugin(name, kind, tmp_path, NOTHING)
        monkeypatch.syspath_prepend(str(place))
        return place

    return made


def refused(name: str, folder: Path, kind: str = "sampler", catalog: Catalog = NOTHING) -> str:
    with pytest.raises(ConfigError) as caught:
        new_plugin(name, kind, folder, catalog)
    return str(caught.value)


@pytest.mark.parametrize("kind", SORTS)
def test_a_new_plugin_keeps_every_rule_that_needs_no_model(kind: str, write: Write) -> None:
    write(f"vtrain-fresh-{kind}", kind)
    value = f"vtrain_fresh_{kind}.plugin"
    entry = importlib.import_module(value)
    found = [*plugin_rules.hooks_are_spelt_right(entry), *plugin_rules.hooks_return_specs_of_their_kind(entry)]
    found += plugin_rules.only_the_contract_is_imported(value)
    (spec,) = plugin_rules.specs_of(entry)
    assert (spec.kind, spec.name) == (kind, f"fresh-{kind.replace('_', '-')}")
    table = {"optimizer": {"lr": 0.1}, "data_backend": {"path": "clips"}}.get(kind, {})
    for rule in spec_rules.SPEC_RULES:
        found += rule(spec, table)
    try:
        found += plugin_rules.a_part_is_what_its_kind_must_be(spec, plugin_rules.built(spec, table))
    except NotChecked:
        assert kind == "optimizer"
    assert found == []


def test_every_file_compiles_and_is_formatted_whatever_the_name(tmp_path: Path) -> None:
    for kind in SORTS:
        (tmp_path / kind).mkdir()
        for name in ("q", "Q" * LONGEST, f"vtrain-{'long-' * 4}names"):
            for file in new_plugin(name, kind, tmp_path / kind, NOTHING).rglob("*.py"):
                compile(file.read_text(encoding="utf-8"), str(file), "exec")
    for arguments in (("check", "-q"), ("format", "--check", "-q")):
        command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", SORTS)
def test_a_package_has_all_that_its_author_needs_and_nothing_is_left_to_fill_in(kind: str) -> None:
    files = {str(path): text for path, text in rendered(Names.of("vtrain-drum"), kind)}
    wanted = {"pyproject.toml", "README.md", ".gitignore", ".github/workflows/test.yml"}
    assert files.keys() > wanted | {"vtrain_drum/py.typed", "vtrain_drum/plugin.py", "tests/test_conformance.py"}
    assert 'drum = "vtrain_drum.plugin"' in files["pyproject.toml"]
    assert '"vtrain>=0.1,<0.2"' in files["pyproject.toml"]
    an = "An optimizer" if kind == "optimizer" else f"A {kind.replace('_', ' ')}"
    assert f"\n{an} for vtrain: " in files["README.md"]
    left = [path for path, text in files.items() for word in ("$$", "$module", "$part", "${Name") if word in text]
    assert left == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("2fast", "no name of a distribution"),
        ("my plugin", "no name of a distribution"),
        ("../up", "no name of a distribution"),
        ("", "no name of a distribution"),
        ("x" * (LONGEST + 1), f"{LONGEST} are the most"),
        ("class", "a word of Python"),
        ("json", "would hide one"),
        ("vtrain-3d", "its class would be called 3d, which Python takes for no name"),
        ("vtrain-noise-level", "its class would be called NoiseLevel"),
        ("vtrain", "is installed already"),
        ("pytest", "is installed already"),
    ],
)
def test_a_name_that_cannot_be_is_refused_and_nothing_is_written(tmp_path: Path, name: str, told: str) -> None:
    assert told in refused(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vtrain-size", "family"),
        ("vtrain-needs", "regularizer"),
        ("vtrain-path", "data_backend"),
        ("vtrain-field", "optimizer"),
        ("vtrain-event", "tracker"),
    ],
)
def test_a_class_that_would_hide_what_its_module_uses_is_refused_and_only_there(
    tmp_path: Path, name: str, kind: str
) -> None:
    """What a template uses is read from it: whatever it will use is refused too."""
    assert "which its own module uses for something else" in refused(name, tmp_path, kind)
    assert new_plugin(name, "sampler", tmp_path, NOTHING).is_dir()


def test_the_name_of_a_part_can_be_written_whatever_is_between_its_words() -> None:
    assert {Names.of(f"vtrain{mark}motion{mark}loss").part for mark in ("-", "--", ".", "_-", "__")} == {"motion-loss"}


def test_a_name_that_another_distribution_has_is_refused(tmp_path: Path) -> None:
    told = refused("vtrain-flow", tmp_path, catalog=discover(["builtin"]))
    assert 'has a sampler called "flow"' in told
    assert 'has an optimizer called "adamw"' in refused("vtrain-adamw", tmp_path, "optimizer", discover(["builtin"]))


def test_a_package_that_cannot_be_written_whole_is_removed_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(path: Path, text: str, **settings: str) -> int:
        if path.name == "plugin.py":
            raise OSError(28, "No space left on device", str(path))
        return write(path, text, **settings)

    monkeypatch.setattr(Path, "write_text", full)
    assert "plugin.py: it cannot be written: No space left on device." in refused("vtrain-drum", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten_and_all_problems_are_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        new_plugin("json", "tracker", tmp_path, NOTHING)
    told = str(caught.value)
    assert "would hide one" in told
    assert "this is there already" in told
    assert [path.name for path in (tmp_path / "json").iterdir()] == ["mine.txt"]
    assert "no such folder" in refused("drum", tmp_path / "nowhere")
