"""Whose fault it is: by the part that a fault names, or by the code on the way of an exception."""

from __future__ import annotations

import importlib
import pickle
import sys
from functools import partial
from pathlib import Path

import pytest

from vtrain.contract import DataBackendSpec, Options, PluginError, Registered, TrackerSpec
from vtrain.registry.blame import PartFault, at_step, blame


class OwnOptions(Options):
    """Of the module of these tests."""


def backend(name: str, version: str) -> Registered:
    return Registered(DataBackendSpec(name, name, OwnOptions, object), name, f"vtrain-{name}", version)  # type: ignore[arg-type]


def test_a_fault_gains_distribution_version_and_step_and_survives_the_way_to_another_process() -> None:
    fault = pickle.loads(pickle.dumps(PartFault("data_backend", "b", ["it lists None.", "and more"])))  # noqa: S301
    with pytest.raises(PluginError) as caught, blame([backend("a", "1"), backend("b", "2")]), at_step(812):
        raise fault
    assert type(caught.value) is PluginError, "the class that events name"
    assert [str(each) for each in caught.value.problems] == [
        f'step 812: the data backend "b" of vtrain-b 2: {what}. This is a fault of the data backend\'s plugin. '
        "Report it to its author, or use another version of vtrain-b."
        for what in ("it lists None", "and more")
    ]


def test_a_fault_of_one_of_several_parts_blames_none_of_them() -> None:
    with (
        pytest.raises(PluginError, match=r"^the data backend: it lists None") as caught,
        blame([backend("a", "1"), backend("b", "2")]),
    ):
        raise PartFault("data_backend", "", "it lists None")
    assert "vtrain-" not in str(caught.value)


def test_the_first_process_alone_reports_a_fault_that_all_raise() -> None:
    fault = PartFault("data_backend", "", "it lists None")
    fault.reported = True
    assert fault.at("step 3").of([backend("a", "1")]).reported


def fails() -> None:
    raise ZeroDivisionError("in this module")


def test_a_part_with_the_contracts_own_options_is_found_by_its_build_and_not_blamed_for_core() -> None:
    part = Registered(TrackerSpec("t", "t", Options, partial(fails)), "t", "vtrain-t", "1")  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError) as caught, blame([part]):
        fails()
    assert caught.value.__notes__ == [f"in vtrain-t 1 (tracker t), module {__name__}"]
    elsewhere = Registered(TrackerSpec("t", "t", Options, pickle.loads), "t", "vtrain-t", "1")
    with pytest.raises(ValueError, match="without a problem") as in_core, blame([elsewhere]):
        PluginError(())
    assert not hasattr(in_core.value, "__notes__")


SHARED = """
from vtrain.contract import Options
class Own(Options): ...
def fails(): raise KeyError("here")
"""


def test_of_packages_in_one_namespace_the_one_whose_code_it_is_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second", "neighbour"):
        (tmp_path / "ourcompany" / name).mkdir(parents=True)
        (tmp_path / "ourcompany" / name / "__init__.py").touch()
        (tmp_path / "ourcompany" / name / "plugin.py").write_text(SHARED, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("first", "second", "neighbour")
    modules = {name: importlib.import_module(f"ourcompany.{name}.plugin") for name in names}
    parts = [
        Registered(TrackerSpec(name, name, modules[name].Own, object), name, f"vtrain-{name}", "1")  # type: ignore[arg-type]
        for name in names[:2]
    ]
    with pytest.raises(KeyError) as caught, blame(parts):
        modules["second"].fails()
    assert caught.value.__notes__ == ["in vtrain-second 1 (tracker second), module ourcompany.second.plugin"]
    with pytest.raises(KeyError) as foreign, blame(parts):
        modules["neighbour"].fails()
    assert not hasattr(foreign.value, "__notes__"), "no part of the run is in that package"
    for name in [name for name in sys.modules if name.startswith("ourcompany")]:
        monkeypatch.delitem(sys.modules, name)
