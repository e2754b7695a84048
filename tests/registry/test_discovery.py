"""Discovery on real distributions in a temporary folder: what works registers, what does not is a row with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import Field

from vtrain.contract import Catalog, Failure, FamilySpec, OptimizerSpec, Options, SamplerSpec, Spec
from vtrain.registry import discover
from vtrain.registry.discovery import fault_of

InstallPlugin = Callable[..., Path]

GOOD = """
    from pydantic import Field
    from vtrain.contract import Options, TrackerSpec, hookimpl

    class Nothing(Options):
        volume: int = Field(3, ge=0, description="how loud")

    @hookimpl
    def vtrain_trackers():
        return [TrackerSpec("{name}", "a tracker for tests", Nothing, lambda options: None)]
"""


def good(name: str) -> str:
    return GOOD.replace("{name}", name)


def failures_of(catalog: Catalog, entry_point: str) -> list[Failure]:
    return [failure for failure in catalog.failures if failure.entry_point == entry_point]


def only(catalog: Catalog, entry_point: str) -> Failure:
    found = failures_of(catalog, entry_point)
    assert len(found) == 1, found
    return found[0]


def test_a_plugin_registers_its_part_with_its_distribution(install_plugin: InstallPlugin) -> None:
    install_plugin("drum", good("drum"), version="2.5")
    part = discover().find("tracker", "drum")
    assert part is not None
    assert (part.entry_point, part.distribution, part.version, part.spec.summary) == (
        "drum",
        "drum",
        "2.5",
        "a tracker for tests",
    )


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise SystemExit('no GPU here')", "SystemExit: no GPU here"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:\n    pass", "SyntaxError"),
        ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_a_row_and_others_still_register(
    install_plugin: InstallPlugin, source: str, told: str
) -> None:
    install_plugin("broken", source)
    install_plugin("drum", good("drum"))
    catalog = discover()
    failure = only(catalog, "broken")
    assert told in failure.reason
    assert (failure.distribution, failure.version) == ("broken", "1.0")
    assert catalog.find("tracker", "drum") is not None


def test_an_import_error_names_the_deepest_line_of_the_plugin_itself(install_plugin: InstallPlugin) -> None:
    folder = install_plugin("broken", "import json\n\n\njson.loads('[')")
    assert only(discover(), "broken").reason.endswith(f"({folder / 'broken_plugin.py'}:4)")


def test_ctrl_c_while_a_plugin_is_imported_is_not_a_failure_of_the_plugin(install_plugin: InstallPlugin) -> None:
    install_plugin("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discover(["slow"])


def test_an_entry_point_to_nothing_is_a_row(install_plugin: InstallPlugin) -> None:
    folder = install_plugin("empty", "")
    (folder / "empty-1.0.dist-info" / "entry_points.txt").write_text("[vtrain.v1]\nempty = empty_plugin:missing\n")
    assert "AttributeError" in only(discover(), "empty").reason


def test_a_declaration_that_cannot_be_read_is_a_row(install_plugin: InstallPlugin) -> None:
    folder = install_plugin("torn", good("torn"))
    (folder / "torn-1.0.dist-info" / "entry_points.txt").write_text("[vtrain.v1]\nno equals sign\n")
    catalog = discover()
    rows = [failure for failure in catalog.failures if failure.distribution == "torn"]
    assert len(rows) == 1
    assert catalog.find("tracker", "torn") is None


@pytest.mark.parametrize("marker", ["@hookimpl\n", ""])
def test_a_misspelt_hook_fails_the_plugin_with_the_right_spelling(install_plugin: InstallPlugin, marker: str) -> None:
    install_plugin("typo", f"from vtrain.contract import hookimpl\n{marker}def vtrain_tracker():\n    return ()\n")
    reason = only(discover(), "typo").reason
    assert "no hook is called vtrain_tracker" in reason
    assert 'Did you mean "vtrain_trackers"?' in reason


def test_a_misspelt_hook_keeps_the_plugins_other_hooks_from_registering(install_plugin: InstallPlugin) -> None:
    install_plugin("drum", good("drum") + "\n    @hookimpl\n    def vtrain_samplerz():\n        return ()\n")
    catalog = discover()
    assert "vtrain_samplerz" in only(catalog, "drum").reason
    assert catalog.find("tracker", "drum") is None


def test_a_hook_without_its_marker_is_reported_and_not_ignored(install_plugin: InstallPlugin) -> None:
    install_plugin("bare", "def vtrain_trackers():\n    return ()\n")
    assert "vtrain_trackers has no @hookimpl" in only(discover(), "bare").reason


def test_a_hook_with_arguments_is_reported(install_plugin: InstallPlugin) -> None:
    install_plugin(
        "curious", "from vtrain.contract import hookimpl\n@hookimpl\ndef vtrain_trackers(config):\n    return ()\n"
    )
    assert "takes no arguments" in only(discover(), "curious").reason


def test_a_hook_wrapper_is_reported(install_plugin: InstallPlugin) -> None:
    source = (
        "from vtrain.contract import hookimpl\n@hookimpl(wrapper=True)\ndef vtrain_trackers():\n    return (yield)\n"
    )
    install_plugin("wrapping", source)
    assert "is a wrapper" in only(discover(), "wrapping").reason


def test_an_imported_module_whose_name_begins_like_a_hook_is_none(install_plugin: InstallPlugin) -> None:
    install_plugin("drum", "    import vtrain_builtin\n" + good("drum"))
    assert failures_of(discover(["drum"]), "drum") == []


def test_a_plugin_that_registers_nothing_is_a_row(install_plugin: InstallPlugin) -> None:
    install_plugin("blank", "")
    assert only(discover(), "blank").reason == "it registers nothing"


def test_another_api_version_is_reported_without_being_imported(install_plugin: InstallPlugin, tmp_path: Path) -> None:
    proof = tmp_path / "imported"
    install_plugin("future", f"open({str(proof)!r}, 'w').close()", group="vtrain.v2")
    reason = only(discover(), "future").reason
    assert "version 2 of the plugin API" in reason
    assert "version 1" in reason
    assert not proof.exists()


@pytest.mark.parametrize("value", ["None", "3", "'text'", "TrackerSpec('a', 'b', Nothing, print)"])
def test_a_hook_that_returns_no_iterable_of_specs_is_reported(install_plugin: InstallPlugin, value: str) -> None:
    source = good("drum").replace("return [TrackerSpec", f"return {value}\n        [TrackerSpec")
    install_plugin("odd", source)
    failure = only(discover(), "odd")
    assert "not an iterable of TrackerSpec" in failure.reason
    assert failure.kind == "tracker"


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ("'text'", "returned a str among its TrackerSpecs"),
        ("SamplerSpec('s', 'x', Nothing, print)", "returned a SamplerSpec among its TrackerSpecs"),
        ("TrackerSpec('Upper Case', 'x', Nothing, print)", "'Upper Case' is not a name"),
        ("TrackerSpec('', 'x', Nothing, print)", "'' is not a name"),
        ("TrackerSpec('-dash', 'x', Nothing, print)", "'-dash' is not a name"),
        ("TrackerSpec(None, 'x', Nothing, print)", "None is not a name"),
        ("TrackerSpec('two-lines', 'x\\ny', Nothing, print)", "summary is not one line"),
        ("TrackerSpec('dictionary', 'x', dict, print)", "not a subclass of vtrain.contract.Options"),
        ("TrackerSpec('no-build', 'x', Nothing, None)", "build is None"),
        ("TrackerSpec('collides', 'x', Takes, print)", '"use" collide'),
        ("TrackerSpec('aliased', 'x', Aliased, print)", "alias"),
        ("TrackerSpec('loose', 'x', Loose, print)", "must stay frozen and forbid unknown keys"),
    ],
)
def test_one_bad_item_fails_alone_and_the_good_one_registers(
    install_plugin: InstallPlugin, item: str, told: str
) -> None:
    models = """
    from vtrain.contract import SamplerSpec
    class Takes(Options):
        use: int = Field(3, description="taken")
    class Aliased(Options):
        loud: int = Field(3, alias="LOUD", description="how loud")
    class Loose(Options, extra="allow"):
        pass
    """
    source = good("drum").replace("    @hookimpl", models + "\n    @hookimpl").replace("return [", f"return [{item}, ")
    install_plugin("mixed", source)
    catalog = discover()
    assert told in only(catalog, "mixed").reason
    assert catalog.find("tracker", "drum") is not None


class Rated(Options):
    """Options of any part."""

    lr: float = Field(1.0, description="a rate")


@pytest.mark.parametrize(
    ("kind", "wrong", "reason"),
    [
        (
            FamilySpec,
            {"sampler": "flow", "sampler_options": 3},
            "its sampler_options are 3, not values by the name of an",
        ),
        (FamilySpec, {"sampler": "flow", "sampler_options": {1: 2}}, "its sampler_options are {1: 2}"),
        (SamplerSpec, {"timesteps_of": True}, "its timesteps_of is True, not the name of a family"),
        (OptimizerSpec, {"moves": "bf16"}, "its moves are 'bf16', not of "),
        (OptimizerSpec, {"moves": frozenset({"int8"})}, "its moves are frozenset({'int8'}), not of "),
    ],
)
def test_fields_of_a_spec_that_are_not_what_they_must_be_are_told(
    kind: Callable[..., Spec], wrong: dict[str, object], reason: str
) -> None:
    assert reason in fault_of(kind("odd", "a part", Rated, print, **wrong))


def test_an_optimizer_without_lr_is_reported(install_plugin: InstallPlugin) -> None:
    source = good("drum").replace("TrackerSpec", "OptimizerSpec").replace("vtrain_trackers", "vtrain_optimizers")
    install_plugin("still", source)
    assert only(discover(), "still").reason == 'an optimizer has an option "lr"'


@pytest.mark.parametrize(
    ("extras", "told"),
    [
        ("('pace',)", "not a tuple of vtrain.contract.CaptionExtra"),
        ("(CaptionExtra('pace', 'int', 'x'),) * 2", 'a name twice: "pace", "pace"'),
        ("(CaptionExtra('Pace', 'int', 'x'),)", '"Pace" is no name of an extra'),
        ("(CaptionExtra('pace', 'integer', 'x'),)", "the extra pace is of type 'integer', not one of int, float, text"),
        ("(CaptionExtra('pace', 'int', ''),)", "the summary of the extra pace is not one line: ''"),
    ],
)
def test_caption_extras_that_could_not_be_read_are_reported(
    install_plugin: InstallPlugin, extras: str, told: str
) -> None:
    source = good("deep").replace("TrackerSpec", "FamilySpec").replace("vtrain_trackers", "vtrain_families")
    source = source.replace("options: None)", f"options: None, sampler='flow', caption_extras={extras})")
    install_plugin("deep", source.replace("import Options", "import CaptionExtra, Options"))
    assert told in only(discover(), "deep").reason


def test_an_option_named_like_a_key_of_its_table_is_reported(install_plugin: InstallPlugin) -> None:
    source = good("disk").replace("TrackerSpec", "DataBackendSpec").replace("vtrain_trackers", "vtrain_data_backends")
    install_plugin("disk", source.replace("volume", "repeats"))
    failure = only(discover(), "disk")
    assert failure.reason == 'its options "repeats" collide with vtrain\'s own keys of that table'
    assert (failure.kind, failure.name) == ("data_backend", "disk")


def test_a_name_registered_by_two_distributions_is_usable_from_neither(install_plugin: InstallPlugin) -> None:
    install_plugin("first", good("drum"))
    install_plugin("second", good("drum"), version="3.0")
    catalog = discover()
    assert catalog.find("tracker", "drum") is None
    assert '"second" of second 3.0' in only(catalog, "first").reason
    assert '"first" of first 1.0' in only(catalog, "second").reason


def test_a_name_registered_twice_by_one_plugin_is_not_usable(install_plugin: InstallPlugin) -> None:
    spec = 'TrackerSpec("drum", "again", Nothing, lambda options: None)'
    install_plugin("echo", good("drum").replace("return [", f"return [{spec}, "))
    catalog = discover()
    assert catalog.find("tracker", "drum") is None
    assert [failure.name for failure in failures_of(catalog, "echo")] == ["drum", "drum"]


def test_the_same_name_in_two_kinds_is_no_duplicate(install_plugin: InstallPlugin) -> None:
    install_plugin("first", good("drum"))
    source = good("drum").replace("TrackerSpec", "SamplerSpec").replace("vtrain_trackers", "vtrain_samplers")
    install_plugin("second", source)
    catalog = discover()
    assert catalog.find("tracker", "drum") is not None
    assert catalog.find("sampler", "drum") is not None


def test_the_allow_list_keeps_the_others_from_being_imported(
    install_plugin: InstallPlugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = tmp_path / "imported"
    install_plugin("shut", f"open({str(proof)!r}, 'w').close()")
    install_plugin("drum", good("drum"))
    monkeypatch.setenv("VTRAIN_PLUGINS", " drum ,")
    catalog = discover()
    assert list(catalog.parts) == [("tracker", "drum")]
    assert only(catalog, "shut").reason == "not in VTRAIN_PLUGINS"
    assert only(catalog, "builtin").reason == "not in VTRAIN_PLUGINS"
    assert not proof.exists()


def test_a_name_in_the_allow_list_that_is_not_installed_is_reported(
    install_plugin: InstallPlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("drum", good("drum"))
    monkeypatch.setenv("VTRAIN_PLUGINS", "drumm")
    reason = only(discover(), "drumm").reason
    assert "no such plugin is installed" in reason
    assert 'Did you mean "drum"?' in reason


def test_an_empty_allow_list_allows_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTRAIN_PLUGINS", "")
    assert not discover().parts


def test_two_discoveries_give_the_same_rows_in_the_same_order(install_plugin: InstallPlugin) -> None:
    for name in ("zither", "alto", "middle"):
        install_plugin(name, good(name) if name != "alto" else "1 / 0")
    first, second = discover(), discover()
    assert list(first.parts) == list(second.parts) == sorted(first.parts)
    assert first.failures == second.failures


def test_what_a_plugin_prints_on_import_does_not_reach_stdout(
    install_plugin: InstallPlugin, capsys: pytest.CaptureFixture[str]
) -> None:
    install_plugin("loud", "print('hello from a plugin')\n" + good("loud").replace("\n    ", "\n"))
    assert discover().find("tracker", "loud") is not None
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hello from a plugin" in captured.err


def test_an_object_that_breaks_registration_takes_nobody_else_down(install_plugin: InstallPlugin) -> None:
    install_plugin(
        "bomb", "class Bomb:\n    @property\n    def vtrain_trackers(self):\n        raise OSError('boom')\n"
    )
    folder = install_plugin("bomb2", "from bomb_plugin import Bomb\nplugin = Bomb()\n")
    (folder / "bomb2-1.0.dist-info" / "entry_points.txt").write_text("[vtrain.v1]\nbomb2 = bomb2_plugin:plugin\n")
    install_plugin("drum", good("drum"))
    catalog = discover()
    assert "boom" in only(catalog, "bomb2").reason
    assert catalog.find("tracker", "drum") is not None


def test_a_distribution_found_twice_on_the_path_counts_once(
    install_plugin: InstallPlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install_plugin("drum", good("drum"))
    monkeypatch.syspath_prepend(str(folder))
    assert discover().find("tracker", "drum") is not None
