"""Naming a part that is there, is not, or is broken."""

from __future__ import annotations

import pytest

from vtrain.contract import Catalog, ConfigError, Failure, Options, PluginError, Registered, TrackerSpec
from vtrain.registry import discover, part_or_error


class Nothing(Options):
    """No options."""


DRUM = Registered(TrackerSpec("drum", "a drum", Nothing, lambda options: None), "band", "band", "1.0")  # type: ignore[arg-type,return-value]


def catalog(*failures: Failure) -> Catalog:
    return Catalog({("tracker", "drum"): DRUM}, failures)


def test_an_installed_part_is_found() -> None:
    assert part_or_error(catalog(), "tracker", "drum", "config.toml:3") is DRUM


def test_an_unknown_name_gets_a_likely_one_and_the_list() -> None:
    with pytest.raises(ConfigError) as caught:
        part_or_error(catalog(), "tracker", "durm", "config.toml:3")
    text = str(caught.value)
    assert text.startswith('config.toml:3: no tracker is called "durm".')
    assert 'Did you mean "drum"?' in text
    assert 'Installed trackers: "drum".' in text


def test_a_part_of_another_kind_is_pointed_out() -> None:
    with pytest.raises(ConfigError, match='"drum" is a tracker'):
        part_or_error(catalog(), "sampler", "drum", "")
    with pytest.raises(ConfigError, match='"adamw" is an optimizer'):
        part_or_error(discover(["builtin"]), "sampler", "adamw", "")


def test_a_broken_part_is_a_plugin_error_with_its_reason() -> None:
    failure = Failure("band", "band", "1.0", "its build is None", "sampler", "waltz")
    with pytest.raises(PluginError, match=r'sampler "waltz" of band 1\.0 cannot be used: its build is None'):
        part_or_error(catalog(failure), "sampler", "waltz", "")


def test_a_plugin_of_that_name_that_could_not_be_imported_gives_its_reason() -> None:
    failure = Failure("waltz", "waltz-dist", "1.0", "ImportError: no torch")
    with pytest.raises(PluginError, match="ImportError: no torch"):
        part_or_error(catalog(failure), "sampler", "waltz", "")


def test_any_plugin_that_could_not_be_imported_is_mentioned_for_an_unknown_name() -> None:
    failure = Failure("other", "other-dist", "1.0", "ImportError: no torch")
    with pytest.raises(ConfigError, match=r'"other" of other-dist 1\.0 could not be loaded: ImportError: no torch'):
        part_or_error(catalog(failure), "sampler", "waltz", "")
