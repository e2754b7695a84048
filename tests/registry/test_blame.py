"""Whose fault it is: by the part that a fault names, or by the code on the way of an exception."""

from __future__ import annotations

import pickle
from functools import partial

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
