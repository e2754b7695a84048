"""`vtrain plugins check` in this process: a finding for each broken rule, with its place and its remedy, and never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vtrain.contract import ConfigError, plugin_rules
from vtrain.contract.plugin_rules import Found
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
    monkeypatch.setattr("vtrain.contract.plugin_rules._probed", lambda value, tables: {"registration": Found([])})


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
        ("def refs(self)", "def list(self)", "a_part_is_what_its_kind_must_be", 'lacks "refs"'),
        ("ShelfOptions, Shelf)", "ShelfOptions, lambda options: Shelf)", "a_part_is_what_its_kind_must_be",
         "the class Shelf, not an object"),
        ('"files on a shelf"', "None", "the_summary_is_one_line", "not one line"),
        ('"shelf", "files', '["x"], "files', "the_name_can_be_written_in_a_table", "['x'] is not a name"),
        ("return (SPEC,)", "return None", "hooks_return_specs_of_their_kind", "returned None, not an iterable"),
        ("return (SPEC,)", "return (SPEC, 1)", "hooks_return_specs_of_their_kind", "returned an int among"),
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
    assert "raises" not in found.problem.what
    assert len({each.rule for each in report.problems}) == 1, "no other rule trips over it"


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


def test_what_a_part_raises_when_it_is_asked_is_a_finding_with_its_line(
    checked: Callable[..., Report], tmp_path: Path
) -> None:
    report = checked(("self.location = options.path", "raise RuntimeError('no shelf')"))
    found = next(each for each in report.problems if each.rule == "a_part_is_what_its_kind_must_be")
    assert found.problem is not None
    assert found.problem.what == "it raises RuntimeError: no shelf."
    assert found.problem.where == f"{tmp_path}/site/shelf/shelf_plugin.py:11"


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
    assert hints(report) == {checking.HINT}
    (report,) = check("shelf", tables={("data_backend", "shelf"): {"path": "clips"}})
    assert {each.result for each in report.outcomes} == {"ok"}


def hints(report: Report) -> set[str]:
    """What is said of rules that were not tried, beside why."""
    skipped = [each.problem for each in report.outcomes if each.result == "not checked"]
    return {each.remedy for each in skipped if each and not each.what.startswith("see ")}


AFTER = """
    @model_validator(mode="after")
    def one(self):
        if self.path == "clips":
            raise ValueError("give another path")
        return self
"""
BEFORE = """
    @model_validator(mode="before")
    @classmethod
    def one(cls, given):
        if "path" not in given:
            raise ValueError("give another path")
        return given
"""


@pytest.mark.parametrize("validator", [AFTER, BEFORE])
def test_options_that_a_validator_refuses_without_a_table_are_not_checked_and_no_problem(
    install_plugin: InstallPlugin, validator: str
) -> None:
    source = SOUND.replace("import Field", "import Field, model_validator")
    install_plugin("shelf", source.replace("\nclass Shelf:", f"{validator}\nclass Shelf:"))
    (report,) = check("shelf")
    assert not report.problems
    (words,) = {each.problem.what for each in report.outcomes if each.rule == "options_are_frozen" and each.problem}
    assert words == "it refuses a table without options: Value error, give another path"
    assert hints(report) == {checking.HINT}
    (report,) = check("shelf", tables={("data_backend", "shelf"): {"path": "films"}})
    assert {each.result for each in report.outcomes} == {"ok"}


def test_options_that_a_validator_refuses_when_they_are_read_again_are_a_finding_with_its_words(
    checked: Callable[..., Report],
) -> None:
    refuses = BEFORE.replace('"path" not in given', '"path" in given')
    report = checked(("import Field", "import Field, model_validator"), ("\nclass Shelf:", f"{refuses}\nclass Shelf:"))
    assert {each.rule for each in report.problems} == {"options_survive_json", "options_survive_toml"}
    for each in report.problems:
        assert each.problem is not None
        assert "read again, it is refused: Value error, give another path." in each.problem.what


def test_a_validator_that_drops_unknown_keys_is_found(checked: Callable[..., Report]) -> None:
    drops = BEFORE.replace('if "path" not in given:', 'given.pop("no_such_option", None)\n        if False:')
    imported = ("import Field", "import Field, model_validator")
    found = only(checked(imported, ("\nclass Shelf:", f"{drops}\nclass Shelf:")))
    assert found.rule == "an_unknown_option_is_an_error"


def test_a_runs_file_is_named_only_where_it_would_help(install_plugin: InstallPlugin) -> None:
    install_plugin(
        "sgd",
        """
        from pydantic import Field
        from vtrain.contract import Options, OptimizerSpec, hookimpl

        class Rate(Options):
            lr: float = Field(0.1, description="learning rate")

        @hookimpl
        def vtrain_optimizers():
            return SPECS

        SPECS = (OptimizerSpec("sgd", "an optimizer", Rate, lambda options, groups: None),)
        """,
    )
    (report,) = check("sgd")
    assert not report.problems
    assert {each.rule for each in report.outcomes if each.result == "not checked"} >= {"abilities_are_spelt_right"}
    assert hints(report) == {""}


DIFFUSERS = """
from vtrain.contract import DiffusersFamily, FamilySpec, Options, hookimpl

class Net:
    def load_loras(self, folder): ...

class Family(DiffusersFamily):
    def __init__(self, options): ...
    def denoiser_of(self, folder, device, dtype) -> Net: ...

Family.__abstractmethods__ = frozenset()
SPEC = FamilySpec("shelf", "a family", Options, Family, sampler="flow")

@hookimpl
def vtrain_families():
    return (SPEC,)
"""


def test_a_misspelt_ability_of_what_a_diffusers_family_loads_is_found(install_plugin: InstallPlugin) -> None:
    """Its load_denoiser is the contract's: the plan looks at its denoiser_of, and so does the check."""
    install_plugin("shelf", DIFFUSERS)
    (report,) = check("shelf")
    absent, found = [each.problem for each in report.problems if each.rule == "abilities_are_spelt_right"]
    assert absent is not None
    assert (
        'Net of shelf 1.0 lacks "blocks", "fold", "gradient_checkpointing", "module", "predict", "save".' in absent.what
    )
    assert found is not None
    assert 'Net of shelf 1.0 has "load_loras", which nothing asks for, and no "load_lora"' in found.what


def test_in_a_namespace_the_plugins_own_package_is_read_and_not_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"toy": "", "other": "import vtrain.data\n"}.items():
        (tmp_path / "company" / name).mkdir(parents=True)
        (tmp_path / "company" / name / "__init__.py").write_text(text, encoding="utf-8")
        (tmp_path / "company" / name / "plugin.py").write_text("import json\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert [name for _, name, _ in plugin_rules.imports_of("company.toy.plugin")] == ["json"]
    assert list(plugin_rules.only_the_contract_is_imported("company.other.plugin"))
    for name in [name for name in sys.modules if name.startswith("company")]:
        monkeypatch.delitem(sys.modules, name)


def test_another_version_of_the_contract_is_a_finding_and_is_not_imported(install_plugin: InstallPlugin) -> None:
    install_plugin("future", SOUND, group="vtrain.v2")
    (report,) = check("future")
    found = only(report)
    assert found.rule == "the_plugin_is_installed_under_an_entry_point"
    assert found.problem is not None
    assert '"vtrain.v2"; this vtrain speaks version 1' in found.problem.what
    assert "future_plugin" not in sys.modules


def test_a_plugin_that_may_not_be_imported_is_a_finding_and_is_not(
    install_plugin: InstallPlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("shelf", SOUND)
    monkeypatch.setenv("VTRAIN_PLUGINS", "builtin")
    (report,) = check("shelf")
    found = only(report)
    assert found.rule == checking.IMPORTED
    assert str(found.problem) == "it is not in VTRAIN_PLUGINS. Name it there, or unset VTRAIN_PLUGINS."
    assert "shelf_plugin" not in sys.modules


def test_a_name_that_nothing_has_is_an_error_with_what_there_is(install_plugin: InstallPlugin) -> None:
    install_plugin("shelf", SOUND)
    with pytest.raises(ConfigError, match='Did you mean "shelf"'):
        check("shelv")
    with pytest.raises(ConfigError, match=r"has no tracker\. Check all its parts, without --kind"):
        check("shelf", "tracker")
