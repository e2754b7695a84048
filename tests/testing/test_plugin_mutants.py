"""Every rule about specs and plugins fails for one that breaks it, and a kit without its fixture says what to give."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
from pydantic import AfterValidator, ConfigDict, Field, create_model

from vtrain.contract import Options, SamplerSpec, Spec, plugin_rules
from vtrain.testing import (
    DataBackendTests,
    FamilyTests,
    PluginTests,
    RegularizerTests,
    SamplerTests,
    SpecTests,
)
from vtrain_builtin.adamw import ADAMW
from vtrain_builtin.flow import FLOW, FlowOptions

Subject = dict[str, Any]


class Loose(Options):
    """Options that take any key and can be changed."""

    model_config = ConfigDict(extra="ignore", frozen=False)
    size: int = Field(3, description="a number")


class Undescribed(Options):
    """Options whose description is blank."""

    size: int = Field(3, description=" ")


class OneWay(Options):
    """Options that come back from JSON as others."""

    size: Annotated[int, AfterValidator(lambda size: 2 * size)] = Field(3, description="a number")


class Hidden(Options):
    """Options with a default that the schema does not show."""

    size: int = Field(default_factory=lambda: 3, description="a number")


class Listed(Options):
    """Options that no TOML file can say."""

    sizes: list[int | None] = Field([1, None], description="numbers")


class Reserved(Options):
    """Options with a key of vtrain's own."""

    use: int = Field(3, description="a number")


class Unknown(Spec):
    """A seventh kind."""


SPECS: Mapping[str, Callable[[], Subject]] = {
    "test_the_spec_is_of_a_known_kind": lambda: {"spec": Unknown("a", "b", FlowOptions)},
    "test_the_name_can_be_written_in_a_table": lambda: {"spec": replace(FLOW, name="My Flow")},
    "test_the_summary_is_one_line": lambda: {"spec": replace(FLOW, summary="one\ntwo")},
    "test_options_are_described": lambda: {"spec": replace(FLOW, options=Undescribed)},
    "test_an_unknown_option_is_an_error": lambda: {"spec": replace(FLOW, options=Loose)},
    "test_the_summary_fits_a_line": lambda: {"spec": replace(FLOW, summary="long " * 30)},
    "test_options_are_a_table": lambda: {"spec": replace(FLOW, options=dict)},
    "test_no_option_is_a_key_of_vtrain": lambda: {"spec": replace(FLOW, options=Reserved)},
    "test_build_is_a_function": lambda: {"spec": replace(FLOW, build=None)},
    "test_what_a_spec_names_can_be_found": lambda: {"spec": replace(FLOW, timesteps_of="No Family")},
    "test_options_are_frozen": lambda: {"spec": replace(FLOW, options=Loose)},
    "test_options_survive_json": lambda: {"spec": replace(FLOW, options=OneWay)},
    "test_options_survive_toml": lambda: {"spec": replace(FLOW, options=Listed)},
    "test_options_have_a_json_schema": lambda: {"spec": replace(FLOW, options=Hidden)},
    "test_an_optimizer_says_which_weights_it_moves": lambda: {"spec": replace(ADAMW, moves=frozenset({"sharded"}))},
    "test_an_optimizer_has_a_learning_rate": lambda: {"spec": replace(ADAMW, options=FlowOptions)},
}
"""Rule -> the arguments that break it."""

SOUND = """
from vtrain.contract import SamplerSpec, hookimpl
from vtrain_builtin.flow import Flow, FlowOptions


def build(options, scheduler):
    return Flow(options, scheduler)


@hookimpl
def vtrain_samplers():
    return (SamplerSpec("odd", "a sampler", FlowOptions, build),)
"""

PLUGINS: Mapping[str, tuple[str, str]] = {
    "test_hooks_are_spelt_right": ("def vtrain_samplers", "def vtrain_sampler"),
    "test_hooks_return_specs_of_their_kind": ("def vtrain_samplers", "def vtrain_families"),
    "test_registration_imports_nothing_heavy": ("def build", "import torch\n\n\ndef build"),
    "test_parts_are_built_without_anything_heavy": ("    return Flow", "    import torch\n    return Flow"),
    "test_a_part_is_what_its_kind_must_be": ("    return Flow(options, scheduler)", "    return object()"),
    "test_only_the_contract_is_imported": ("def build", "from vtrain import registry\n\n\ndef build"),
}
"""Rule -> (part of SOUND, what replaces it so that the rule is broken)."""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], type[PluginTests]]]:
    """Writes an entry module `mutant_plugin` and gives a kit for it, for this process and those it starts."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(source: str) -> type[PluginTests]:
        (tmp_path / "mutant_plugin.py").write_text(source, encoding="utf-8")
        return type("OddPlugin", (PluginTests,), {"entry_module": "mutant_plugin"})

    yield write
    sys.modules.pop("mutant_plugin", None)


def arguments(kit: type[PluginTests], rule: str) -> Subject:
    """What pytest would give the rule."""
    module: ModuleType = importlib.import_module(kit.entry_module)
    known = {"module": module, "specs": list(getattr(module, "vtrain_samplers", tuple)())}
    wanted = getattr(kit, rule).__code__.co_varnames[1 : getattr(kit, rule).__code__.co_argcount]
    return {name: known[name] for name in wanted}


@pytest.mark.parametrize("rule", SPECS)
def test_the_rule_fails_for_a_spec_that_breaks_it(rule: str, breaks: Callable[..., None]) -> None:
    breaks(SpecTests(), rule, SPECS[rule]())


@pytest.mark.parametrize("rule", PLUGINS)
def test_the_rule_fails_for_a_plugin_that_breaks_it(
    rule: str, plugin: Callable[[str], type[PluginTests]], breaks: Callable[..., None]
) -> None:
    kit = plugin(SOUND.replace(*PLUGINS[rule]))
    breaks(kit(), rule, arguments(kit, rule))


@pytest.mark.parametrize("rule", PLUGINS)
def test_the_rule_passes_for_the_plugin_that_the_mutants_are_made_from(
    rule: str, plugin: Callable[[str], type[PluginTests]]
) -> None:
    kit = plugin(SOUND)
    getattr(kit, rule)(kit(), **arguments(kit, rule))


def test_what_a_plugin_prints_and_does_when_python_ends_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "talks.py").write_text("import atexit; atexit.register(print, '[1]\\nbye')", encoding="utf-8")
    assert list(plugin_rules.registration_imports_nothing_heavy("talks")) == []
    (tmp_path / "leaves.py").write_text("import os; os._exit(0)", encoding="utf-8")
    (problem,) = plugin_rules.registration_imports_nothing_heavy("leaves")
    assert problem.what == "importing leaves ends Python, with exit code 0."


def test_what_registration_and_building_raise_is_said_with_its_line(
    plugin: Callable[[str], type[PluginTests]], tmp_path: Path
) -> None:
    plugin(SOUND.replace("    return Flow", "    options.no_such_option\n    return Flow"))
    (problem,) = plugin_rules.parts_are_built_without_anything_heavy("mutant_plugin", {("sampler", "odd"): {}})
    assert problem.where == f"{tmp_path}/mutant_plugin.py:7"
    assert problem.what.startswith("building sampler odd raises AttributeError: ")
    plugin(SOUND.replace("    return (Sampler", "    1 / 0\n    return (Sampler"))
    (problem,) = plugin_rules.registration_imports_nothing_heavy("mutant_plugin")
    assert problem.where == f"{tmp_path}/mutant_plugin.py:12"
    assert problem.what == "importing mutant_plugin raises ZeroDivisionError: division by zero."


def test_a_plugin_without_an_entry_point_is_found(
    plugin: Callable[[str], type[PluginTests]], breaks: Callable[..., None]
) -> None:
    rule = "test_the_plugin_is_installed_under_an_entry_point"
    kit = plugin(SOUND)
    breaks(kit(), rule, arguments(kit, rule))


def test_every_rule_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(SpecTests) == SPECS.keys()
    assert rules_of(PluginTests) == PLUGINS.keys() | {"test_the_plugin_is_installed_under_an_entry_point"}


def test_options_are_named_that_a_plugins_part_still_needs(
    plugin: Callable[[str], type[PluginTests]], breaks: Callable[..., None]
) -> None:
    kit = plugin(SOUND)
    needy = create_model("Needy", __base__=Options, rate=(int, Field(description="a number")))
    spec = SamplerSpec("odd", "a sampler", needy, lambda options, scheduler: FLOW.build(FlowOptions(), scheduler))
    with pytest.raises(pytest.fail.Exception, match="rate"):
        kit().test_parts_are_built_without_anything_heavy([spec])


def test_a_kit_without_its_fixture_says_what_to_give(
    tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    lacking = {
        FamilyTests: "fixture `family`",
        SamplerTests: "fixture `sampler`",
        RegularizerTests: "fixture `regularizer`",
        DataBackendTests: "fixture `backend`",
        SpecTests: "fixture `spec`",
        PluginTests: "class attribute `entry_module`",
    }
    lines = [f"class Test{kit.__name__}({kit.__name__}):\n    pass\n" for kit in lacking]
    file = tmp_path / "test_part.py"
    file.write_text("from vtrain.testing import *\n\n\n" + "\n\n".join(lines), encoding="utf-8")
    done = python("-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(file))
    assert done.returncode == 1, done.stdout + done.stderr
    for kit, what in lacking.items():
        assert re.search(rf"Give a {what}: |Give the {what}: ", done.stdout), (
            f"{kit.__name__} does not ask for its {what}"
        )
    assert "passed" not in done.stdout.splitlines()[-1]
