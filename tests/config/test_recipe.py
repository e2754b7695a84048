"""What a family's own recipe sets of its sampler's options: defaults, of which `config show` says whose they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vtrain.config import Config, load, show
from vtrain.contract import Catalog, FamilySpec, PluginError, Problem

Tables = dict[str, str]


@pytest.fixture
def shifted(good: Tables) -> Tables:
    return {**good, "model": good["model"].replace("tiny", "shifted")}


def rows(config: Config) -> list[tuple[str, object, str]]:
    return [
        (row.key, row.value, row.origin.replace(str(config.path), config.path.name))
        for row in show(config)
        if row.key.startswith("sampler.")
    ]


def test_a_familys_recipe_is_the_default_of_its_samplers_options(read: Callable[..., Config], shifted: Tables) -> None:
    assert rows(read(shifted)) == [
        ("sampler.use", "bent", "default of shifted"),
        ("sampler.shift", 5.0, "default of shifted"),
        ("sampler.kind", "uniform", "default of bent"),
        ("sampler.power", 2, "default of shifted"),
    ]


@pytest.mark.parametrize("use", ["", 'use = "bent"\n'])
def test_what_the_file_says_is_taken_instead(read: Callable[..., Config], shifted: Tables, use: str) -> None:
    config = read({"sampler": f"[sampler]\n{use}shift = 1\n", **shifted})
    line = 2 + bool(use)
    assert rows(config)[1] == ("sampler.shift", 1.0, f"config.toml:{line}")
    assert rows(config)[3] == ("sampler.power", 2, "default of shifted")
    assert config.sampler.options.model_fields_set == {"shift"}, "only what the file says counts as given"


def test_the_recipe_is_of_the_familys_own_sampler_alone(read: Callable[..., Config], shifted: Tables) -> None:
    config = read({"sampler": '[sampler]\nuse = "flow"\n', **shifted})
    assert rows(config)[1] == ("sampler.shift", 3.0, "default of flow")
    assert config.sampler.registered.spec.name == "flow"


def test_wrong_values_in_the_file_are_reported_as_ever(problems: Callable[..., list[Problem]], shifted: Tables) -> None:
    (problem,) = problems({"sampler": "[sampler]\nshift = 0\n", **shifted})
    assert (problem.where, problem.what) == ("config.toml:2", "sampler.shift: must be greater than 0, got 0.")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"shfit": 5.0}, 'it has no option "shfit". Did you mean "shift"?'),
        ({"shift": "five"}, 'shift: expected a number, got "five".'),
        ({"shift": -1.0}, "shift: must be greater than 0, got -1.0."),
        ({"kind": "normal"}, 'kind: expected "logit-normal" or "uniform", got "normal".'),
    ],
)
def test_a_recipe_that_the_sampler_does_not_take_is_the_plugins_error(
    write: Callable[..., Path], catalog: Catalog, shifted: Tables, recipe: dict[str, object], words: str
) -> None:
    part = catalog.parts["family", "shifted"]
    assert isinstance(part.spec, FamilySpec)
    broken = replace(part, spec=replace(part.spec, sampler_options=recipe))
    with pytest.raises(PluginError) as caught:
        load(write(shifted), replace(catalog, parts={**catalog.parts, ("family", "shifted"): broken}))
    assert str(caught.value).startswith(
        'vtrain-small 1.0: what its family "shifted" sets of the sampler "bent" is wrong: '
    )
    assert words in str(caught.value)


def test_the_scale_of_timesteps_is_the_familys_now(problems: Callable[..., list[Problem]], good: Tables) -> None:
    (problem,) = problems({"sampler": "[sampler]\ntimestep_scale = 1000.0\n", **good})
    assert problem.where == "config.toml:2"
    assert problem.what == "there is no sampler.timestep_scale any more."
    assert "The unit of the timestep belongs to the model family" in problem.remedy
