"""`vtrain plugins check` in this process: a finding for each broken rule, with its place and its remedy, and never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vtrain.contract import ConfigError
from vtrain.registry import check as checking
from vtrain.registry.check import Outcome, Report, check

InstallPlugin = Callable[..., Path]
SOUND = """
from collections.abc import Iterator
from pydantic import Field
from vtrain.contract import DataBackendSpec, Options, SourceRef, hookimpl

class ShelfOptions(Options):
    path: str = Field("clips", description="the folder")

class Shelf:
    def __init__(self, options):
        self.location = options.path
    def refs(self):
        return iter(())
    def open(self, ref):
        raise OSError(ref.id)

SPEC = DataBackendSpec("shelf", "files on a shelf", ShelfOptions, Shelf)

@hookimpl
def vtrain_data_backends():
    return (SPEC,)
"""


@pytest.fixture(autouse=True)
def _no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two rules that start a process have tests of their own in tests/testing/test_plugin_mutants.py and below."""
    monkeypatch.setattr("vtrain.contract.plugin_rules._probed", lambda value, tables: {"registration": []})


@pytest.fixture
def checked(install_plugin: InstallPlugin) -> Callable[..., Report]:
    """checked(old, new, ...): the report of the sound plugin with parts of its source replaced."""

    def report(*replaced: tuple[str, str], name: str = "shelf", kind: str | None = None) -> Report:
        source = SOUND
        for old, new in replaced:
            assert old in source
            source = source.replace(old, new)
        install_plugin("shelf", source)
        (found,) = check(name, kind)
        return found

    return report


def only(report: Report) -> Outcome:
    assert len(report.problems) == 1, report.problems
    return report.problems[0]


def test_a_sound_plugin_has_no_problem_and_every_rule_is_tried(checked: Callable[..., Report]) -> None:
    report = checked()
    assert report.parts == ("data backend shelf",)
    assert {each.result for each in report.outcomes} == {"ok"}
    assert len(report.outcomes) == 23


@pytest.mark.parametrize("name", ["shelf", "Shelf"])
def test_a_plugin_is_found_by_its_entry_point_and_its_distribution(checked: Callable[..., Report], name: str) -> None:
    assert checked(name=name).plugin.distribution == "shelf"


def test_a_plugin_is_found_by_the_name_of_a_part_also_of_a_broken_one(install_plugin: InstallPlugin) -> None:
    install_plugin("shelf", SOUND.replace('"shelf"', '"attic"').replace("(Options):", "(Options, extra='ignore'):"))
    (report,) = check("attic")
    assert {each.rule for each in report.problems} == {"options_are_a_table", "an_unknown_option_is_an_error"}


@pytest.mark.parametrize(
    ("old", "new", "rule", "told"),
    [
        ("def vtrain_data_backends", "def vtrain_databackends", "hooks_are_spelt_right", 'mean "vtrain_data_backends"'),
        ("@hookimpl\n", "", "hooks_are_spelt_right", "has no @hookimpl"),
        ("backends():", "backends(config):", "hooks_are_spelt_right", "takes no arguments"),
        ("return (SPEC,)", "return SPEC", "hooks_return_specs_of_their_kind", "not an iterable"),
        ("return (SPEC,)", "return (SPEC, SPEC)", "hooks_return_specs_of_their_kind", "a name twice"),
        ("return (SPEC,)", "return [DataBackendSpec('a', 'b', ShelfOptions, lambda options: Shelf(options))]",
         "hooks_return_specs_of_their_kind", "the second time"),
        ('"files on', '"files ' + "on " * 50, "the_summary_fits_a_line", "letters long"),
        ('"the folder"', '" "', "options_are_described", '"path" does not say'),
        ("path: str", "weight: float = Field(1.0, description='w')\n    path: str", "no_option_is_a_key_of_vtrain", "collide"),
        ("def refs(self)", "def list(self)", "a_part_is_what_its_kind_must_be", 'has no "refs"'),
        ("def open(self", "def shard(self): ...\n    def open(self", "abilities_are_spelt_right", '"shard", which nothing'),
        ("class Shelf:", "from vtrain.data import order\nclass Shelf:", "only_the_contract_is_imported", "vtrain.data"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_a_finding_with_a_remedy(
    checked: Callable[..., Report], old: str, new: str, rule: str, told: str
) -> None:
    report = checked((old, new))
    found = next(each for each in report.problems if each.rule == rule)
    assert found.problem is not None
    assert told in found.problem.what
    assert found.problem.remedy


def test_the_place_of_a_finding_is_the_line_of_the_plugins_file(checked: Callable[..., Report], tmp_path: Path) -> None:
    found = only(checked(('"the folder"', '" "'))).problem
    assert found is not None
    assert found.where == f"{tmp_path}/site/shelf/shelf_plugin.py:7"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_an_import_that_fails_is_the_finding_and_no_traceback(
    install_plugin: InstallPlugin, source: str, told: str
) -> None:
    install_plugin("broken", source)
    (report,) = check("broken")
    (found,) = [each for each in report.problems if each.rule == checking.IMPORTED]
    assert found.problem is not None
    assert told in found.problem.what
    assert report.parts == ()


def test_an_import_that_hangs_is_a_finding(
    install_plugin: InstallPlugin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VTRAIN_PLUGIN_TIMEOUT", "1")
    monkeypatch.setenv("VTRAIN_PLUGINS", "stuck")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    install_plugin("stuck", "import time\ntime.sleep(60)")
    (report,) = check("stuck")
    found = only(report)
    assert found.problem is not None
    assert "takes longer than 1 s" in found.problem.what


def test_what_a_part_raises_when_it_is_asked_is_a_finding(checked: Callable[..., Report]) -> None:
    report = checked(("self.location = options.path", "raise RuntimeError('no shelf')"))
    found = next(each for each in report.problems if each.rule == "a_part_is_what_its_kind_must_be")
    assert found.problem is not None
    assert "RuntimeError: no shelf" in found.problem.what


def test_a_name_of_another_distribution_is_a_finding_that_names_it(
    install_plugin: InstallPlugin, checked: Callable[..., Report]
) -> None:
    install_plugin("attic", SOUND)
    found = only(checked())
    assert found.rule == "names_are_nobody_elses"
    assert found.problem is not None
    assert '"attic" of attic' in found.problem.what


def test_a_part_with_required_options_is_not_built_without_them(install_plugin: InstallPlugin) -> None:
    install_plugin("shelf", SOUND.replace('Field("clips", ', "Field("))
    (report,) = check("shelf")
    skipped = {each.rule for each in report.outcomes if each.result == "not checked"}
    assert {"options_survive_toml", "a_part_is_what_its_kind_must_be"} <= skipped
    assert not report.problems
    (report,) = check("shelf", tables={("data_backend", "shelf"): {"path": "clips"}})
    assert {each.result for each in report.outcomes} == {"ok"}


def test_another_version_of_the_contract_is_a_finding(install_plugin: InstallPlugin) -> None:
    install_plugin("future", SOUND, group="vtrain.v2")
    (report,) = check("future")
    found = next(each for each in report.problems if each.rule == "the_plugin_is_installed_under_an_entry_point")
    assert found.problem is not None
    assert '"vtrain.v2"; this vtrain speaks version 1' in found.problem.what


def test_a_name_that_nothing_has_is_an_error_with_what_there_is(install_plugin: InstallPlugin) -> None:
    install_plugin("shelf", SOUND)
    with pytest.raises(ConfigError, match='Did you mean "shelf"'):
        check("shelv")
    with pytest.raises(ConfigError, match="has no tracker"):
        check("shelf", "tracker")
