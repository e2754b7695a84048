"""The hooks: registration only."""

from __future__ import annotations

import inspect

from vtrain.contract import ENTRY_POINT_GROUP, HOOK_SPECS, KINDS, RESERVED_KEYS, Hooks
from vtrain.contract.specs import NOUNS


def test_there_are_six_hooks_one_for_each_kind_of_part() -> None:
    declared = {name for name, _ in inspect.getmembers(Hooks, inspect.isfunction)}
    assert declared == set(HOOK_SPECS)
    assert set(HOOK_SPECS.values()) == set(KINDS)
    assert len(KINDS) == 6


def test_hooks_take_no_arguments_and_are_no_firstresult_or_historic() -> None:
    for name in HOOK_SPECS:
        hook = getattr(Hooks, name)
        assert list(inspect.signature(hook).parameters) == ["self"]
        assert not hook.vtrain_spec["firstresult"]
        assert not hook.vtrain_spec["historic"]


def test_the_number_in_the_group_is_the_api_version() -> None:
    assert ENTRY_POINT_GROUP == "vtrain.v1"


def test_every_kind_has_its_reserved_keys_and_its_noun() -> None:
    kinds = {spec.kind for spec in KINDS}
    assert set(RESERVED_KEYS) == set(NOUNS) == kinds
    assert all("use" in keys for keys in RESERVED_KEYS.values())
