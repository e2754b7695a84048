"""The JSON Schema of the whole file: valid itself, and of one mind with the loader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import tomli

from vtrain.config import describe, json_schema, load
from vtrain.contract import Catalog, ConfigError, Options, PluginError, Registered, TrackerSpec

Tables = dict[str, str]


@pytest.fixture
def valid(catalog: Catalog) -> Callable[[str], bool]:
    validator = jsonschema.Draft202012Validator(json_schema(catalog))
    return lambda text: validator.is_valid(tomli.loads(text))


def test_the_schema_is_a_valid_schema_of_draft_2020_12(catalog: Catalog) -> None:
    schema = json_schema(catalog)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


def test_a_schema_without_any_plugin_is_valid_and_accepts_nothing(good: Tables) -> None:
    schema = json_schema(Catalog({}, ()))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert not jsonschema.Draft202012Validator(schema).is_valid(tomli.loads("\n".join(good.values())))


@pytest.mark.parametrize(
    "extra",
    [
        "",
        "[sampler]\nuse = 'flow'\nshift = 1",
        "[sampler]\nshift = 1",
        "[sampler]\nuse = 'bent'\npower = 1",
        "[[regularizer]]\nuse = 'pull'\nstages = [{ until = '5 steps', weight = 1 }]",
        "[[tracker]]\nuse = 'paper'\n[[tracker]]\nuse = 'tensorboard'",
        "[validation]\nevery = '10 min'\nsize = '832x480'\n[validation.prompts]\na = 'b'",
        "[lr_schedule]\nuse = 'linear'\nwarmup = '5 steps'",
        "[precision]\nbase = 'fp32'\nmixed = 'no'",
        "[cache]\ndir = 'x'\n[checkpoint]\nkeep = 1",
    ],
)
def test_what_loads_is_valid(
    valid: Callable[[str], bool], good: Tables, extra: str, write: Callable[..., Path], catalog: Catalog
) -> None:
    text = "\n".join([*good.values(), extra])
    load(write(text), catalog)
    assert valid(text)


def test_what_a_familys_recipe_sets_is_its_default_and_need_not_be_given(
    valid: Callable[[str], bool], good: Tables, catalog: Catalog
) -> None:
    text = "\n".join({**good, "model": good["model"].replace("tiny", "shifted")}.values())
    assert valid(text)
    assert valid(text + "[sampler]\nshift = 1")
    assert not valid(text + "[sampler]\nshift = 0")
    rules = [rule for rule in json_schema(catalog)["allOf"] if "default" in str(rule["then"])]
    assert [rule["then"]["properties"]["sampler"]["properties"] for rule in rules] == [
        {"shift": {"default": 5.0}, "power": {"default": 2}}
    ]


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("run", "[run]\noutput_dir = 3"),
        ("run", ""),
        ("run", "[run]\noutput_dir = 'x'\nnmae = 'x'"),
        ("model", "[model]\nuse = 'big'\npath = 'm'\ntrain = 'lora'"),
        ("model", "[model]\nuse = 'tiny'\ntrain = 'lora'"),
        ("model", "[model]\nuse = 'tiny'\npath = 'm'\ntrain = 'lora'\nmotion = 3"),
        ("model", "[model]\nuse = 'tiny'\npath = 'm'\ntrain = 'full'\nlora.rank = 3"),
        ("model", "[model]\nuse = 'strict'\npath = 'm'\ntrain = 'lora'\n[sampler]\nuse = 'flow'"),
        ("data", "data = []"),
        ("data", "[data]\nuse = 'folder'\npath = 'x'"),
        ("data", "[[data]]\nuse = 'folder'\npath = 'x'\n[data.video]\nfarmes = 1"),
        ("train", "[train]\nsteps = 1\nepochs = 1"),
        ("train", "[train]\nbatch_size = 1"),
        ("train", "[train]\nsteps = 0"),
        ("optimizer", "[optimizer]\nbetas = [0.9, 0.9]"),
        ("optimizer", "[optimizer]\nlr = 0"),
        ("more", "[checkpoint]\nevery = '5 lightyears'"),
        ("more", "[sampler]\nuse = 'own'\nshift = 3"),
        ("more", "[[tracker]]\nname = 'x'"),
        ("more", "[[regularizer]]\nuse = 'pull'\nstages = [{ weight = 1 }]"),
        ("more", "[whatever]"),
    ],
)
def test_what_does_not_load_is_not_valid(
    valid: Callable[[str], bool], good: Tables, table: str, text: str, write: Callable[..., Path], catalog: Catalog
) -> None:
    file = "\n".join({table: text, **{name: other for name, other in good.items() if name != table}}.values())
    with pytest.raises(ConfigError):
        load(write(file), catalog)
    assert not valid(file)


def test_descriptions_and_resume_rules_stand_at_the_keys(catalog: Catalog) -> None:
    schema = json_schema(catalog)
    run = schema["properties"]["run"]["properties"]
    assert run["seed"]["resume"] == "refuse"
    assert "may not change when a run is resumed" in run["seed"]["description"]
    assert run["name"]["resume"] == "tell"
    assert run["resume"]["resume"] == "free"
    model = schema["properties"]["model"]["anyOf"][0]["properties"]
    assert model["path"]["resume"] == model["use"]["resume"] == "refuse"
    assert model["motion_score"]["description"] == "a number added to captions"


def test_every_key_of_every_table_is_described_and_none_may_be_null(catalog: Catalog) -> None:
    def walk(schema: object) -> None:
        if isinstance(schema, dict):
            for field in schema.get("properties", {}).values() if schema.get("type") == "object" else ():
                assert field.get("description") or "properties" in field or field.get("type") in ("object", "array")
            assert schema.get("type") != "null"
            for inner in schema.values():
                walk(inner)
        elif isinstance(schema, list):
            for inner in schema:
                walk(inner)

    walk(json_schema(catalog))


def test_options_are_described_with_type_default_limits_and_meaning(catalog: Catalog) -> None:
    found = {}
    for part in catalog.parts.values():
        found |= {(part.spec.name, option.key): option for option in describe(part.spec.options)}
    path, score = found["tiny", "path"], found["tiny", "motion_score"]
    assert (path.type, path.required, path.default, path.resume) == ("text", True, "", "refuse")
    assert (score.type, score.default, score.limits) == ("whole number", "", ">= 0, <= 100")
    assert (found["adamw", "lr"].type, found["adamw", "lr"].limits) == ("number", "> 0")
    assert found["flow", "kind"].type == '"logit-normal" or "uniform"'
    assert (found["flow", "kind"].default, found["flow", "shift"].default) == ('"uniform"', "3.0")
    assert found["adamw", "betas"].default == "[0.9, 0.999]"
    assert found["pull", "stages"].type == "list of table"
    assert found["pull", "stages.until"].required
    assert found["pull", "stages.until"].type == 'text, such as "500 steps"'


def test_a_type_that_json_schema_cannot_describe_is_a_plugin_error_that_names_it(catalog: Catalog) -> None:
    from collections.abc import Callable as AnyCallable

    from pydantic import Field

    class Odd(Options):
        """Options with a function."""

        call: AnyCallable[[], int] | None = Field(None, description="a function")

    spec = TrackerSpec("odd", "odd", Odd, lambda options: None)  # type: ignore[arg-type,return-value]
    parts = {**catalog.parts, ("tracker", "odd"): Registered(spec, "odd", "odd", "1")}
    with pytest.raises(PluginError, match="Odd has a type that JSON Schema cannot describe"):
        json_schema(replace(catalog, parts=parts))
