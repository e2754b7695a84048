"""The rules of a spec and its options. The conformance kit, `vtrain plugins check` and the catalog call the same functions.

A rule gives problems: where, what is wrong, what to do. It has the name of the kit's test without "test_". One that cannot be
tried raises NotChecked. Importing this imports no torch.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Set
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

from vtrain.contract.captions import CaptionExtra
from vtrain.contract.errors import Problem
from vtrain.contract.options import Options
from vtrain.contract.specs import (
    KINDS,
    RESERVED_KEYS,
    FamilySpec,
    Moved,
    OptimizerSpec,
    SamplerSpec,
    Spec,
    listed,
)

if TYPE_CHECKING:
    from pydantic import ValidationError

Table = Mapping[str, object]
"""The options that a part's table needs, as the file gives them."""
Problems = Iterator[Problem]
SpecRule = Callable[[Spec, Table], Problems]

NONE: Table = MappingProxyType({})


class NotChecked(Exception):
    """A rule cannot be tried; the words say why."""


class OptionsNeeded(NotChecked):
    """It can be tried with other options than the table has."""


def place_of(thing: object, word: str = "") -> str:
    """ "/plugin/file.py:12" of a class or a function, at its first line that begins with `word`; "" where it has no source."""
    try:
        lines, first = inspect.getsourcelines(thing)  # type: ignore[arg-type]
        file = inspect.getsourcefile(thing)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""
    at = (number for number, line in enumerate(lines) if word and re.match(rf"\s*{re.escape(word)}\b", line))
    return f"{file}:{first + next(at, 0)}"


def options_of(spec: Spec, table: Table) -> Options:
    """Raises OptionsNeeded where `table` lacks options without a default, or a validator refuses it; NotChecked."""
    from pydantic import ValidationError

    fields = _fields(spec)
    needed = [name for name, field in fields.items() if field.is_required() and name not in table]
    if needed:
        raise OptionsNeeded(f"it needs the option {listed(needed)}")
    try:
        return spec.options.model_validate(dict(table))
    except ValidationError as error:
        given = f"with {listed(table)}" if table else "without options"
        raise OptionsNeeded(f"it refuses a table {given}: {_refusal(error)}") from error


def _refusal(error: ValidationError) -> str:
    """ "rate: Input should be greater than 0" of the first of its errors; one of all options together has no name."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))


def _fields(spec: Spec) -> Mapping[str, Any]:
    options: object = spec.options
    if not (isinstance(options, type) and issubclass(options, Options)):
        raise NotChecked("it has no options class")
    return options.model_fields


# -- of a spec, which a catalog asks for too: without these a part cannot be used ------------------------------------------

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def the_name_can_be_written_in_a_table(spec: Spec, table: Table = NONE) -> Problems:
    """A name is lower case letters, digits, "-" and "_", and starts with a letter or digit."""
    if not (isinstance(spec.name, str) and _NAME.fullmatch(spec.name)):
        what = f"{spec.name!r} is not a name: lower case letters, digits, - and _, starting with a letter or digit."
        yield Problem("", what, 'Call it as users shall write it behind `use =`, such as "my-part".')


def the_summary_is_one_line(spec: Spec, table: Table = NONE) -> Problems:
    """A summary is one line of text."""
    if not (isinstance(spec.summary, str) and spec.summary.strip() and len(spec.summary.splitlines()) == 1):
        yield Problem("", "its summary is not one line of text.", "Say in one line what the part is.")


def options_are_a_table(spec: Spec, table: Table = NONE) -> Problems:
    """Options are a class of vtrain.contract.Options, frozen, strict, and written in the file by their field names."""
    options: object = spec.options
    if not (isinstance(options, type) and issubclass(options, Options)):
        what = f"its options are {options!r}, not a subclass of vtrain.contract.Options."
        yield Problem("", what, "Derive them: class MyOptions(Options).")
        return
    if why := _unmade(options):
        what = f"its options {options.__name__} cannot be made: {why}."
        yield Problem(place_of(options), what, "Import their types for real, not for type checkers alone.")
        return
    if options.model_config.get("extra") != "forbid" or not options.model_config.get("frozen"):
        what = f"its options {options.__name__} must stay frozen and forbid unknown keys."
        yield Problem(place_of(options), what, "Leave `extra` and `frozen` of Options as they are.")
    for name, field in options.model_fields.items():
        if field.alias or field.validation_alias:
            what = f'options are written in the file by their field names, so an alias is not possible: "{name}".'
            yield Problem(place_of(options, name), what, "Rename the field and drop its alias.")


def _unmade(options: type[Options]) -> str:
    """Why pydantic cannot read values into a class: a type that is imported for type checkers alone, for example."""
    from pydantic import PydanticUndefinedAnnotation, PydanticUserError

    if not options.__pydantic_complete__:
        try:
            options.model_rebuild()
        except (PydanticUndefinedAnnotation, PydanticUserError, TypeError) as error:
            return " ".join(str(error).splitlines()[0].split()).removesuffix(".")
    return ""


def no_option_is_a_key_of_vtrain(spec: Spec, table: Table = NONE) -> Problems:
    """No option has the name of a key that the part's table has anyway, such as `use`."""
    taken = RESERVED_KEYS.get(getattr(spec, "kind", ""), frozenset()) & set(_fields(spec))
    if taken:
        what = f"its options {listed(taken)} collide with vtrain's own keys of that table."
        yield Problem(place_of(spec.options, min(taken)), what, "Rename them.")


def build_is_a_function(spec: Spec, table: Table = NONE) -> Problems:
    """A spec's build can be called."""
    build: object = getattr(spec, "build", None)
    if not callable(build):
        yield Problem("", f"its build is {build!r}, not a function.", "Give the class of the part, or a function.")


def an_optimizer_has_a_learning_rate(spec: Spec, table: Table = NONE) -> Problems:
    """An optimizer's options have `lr`, which the learning-rate schedule scales."""
    if isinstance(spec, OptimizerSpec) and "lr" not in _fields(spec):
        remedy = 'Add it: lr: float = Field(gt=0, description="learning rate").'
        yield Problem(place_of(spec.options), 'an optimizer has an option "lr".', remedy)


def an_optimizer_says_which_weights_it_moves(spec: Spec, table: Table = NONE) -> Problems:
    """moves is made of "fp32", "bf16" and "sharded", and has a type of weights in it."""
    if not isinstance(spec, OptimizerSpec):
        return
    remedy = 'Such as moves=frozenset({"fp32", "sharded"}): those that it updates without loss.'
    if not (isinstance(spec.moves, Set) and set(get_args(Moved)) >= set(spec.moves)):
        yield Problem("", f"its moves are {spec.moves!r}, not of {listed(get_args(Moved))}.", remedy)
    elif not spec.moves - {"sharded"}:
        yield Problem("", "it moves neither fp32 nor bf16 weights.", remedy)


def what_a_spec_names_can_be_found(spec: Spec, table: Table = NONE) -> Problems:
    """A family's sampler, its options and its caption extras, and a sampler's family, are names and records of their types."""
    remedy = f"See the docstring of {type(spec).__name__}."
    if isinstance(spec, FamilySpec):
        recipe: object = spec.sampler_options
        if not (isinstance(spec.sampler, str) and _NAME.fullmatch(spec.sampler)):
            yield Problem("", f"its sampler is {spec.sampler!r}, not the name of one.", remedy)
        if not isinstance(recipe, Mapping) or not all(isinstance(name, str) for name in recipe):
            yield Problem("", f"its sampler_options are {recipe!r}, not values by the name of an option.", remedy)
        if fault := _extras(spec.caption_extras):
            yield Problem("", fault, remedy)
    if isinstance(spec, SamplerSpec):
        of: object = spec.timesteps_of
        if not (isinstance(of, str) and _NAME.fullmatch(of or "none")):
            yield Problem("", f"its timesteps_of is {of!r}, not the name of a family.", remedy)


def _extras(extras: object) -> str:
    """What is wrong with a family's caption extras."""
    if not (isinstance(extras, tuple) and all(isinstance(extra, CaptionExtra) for extra in extras)):
        return f"its caption_extras are {extras!r}, not a tuple of vtrain.contract.CaptionExtra."
    names = [extra.name for extra in extras]
    return "" if len(set(names)) == len(names) else f"its caption_extras have a name twice: {listed(names)}."


NEEDED: tuple[SpecRule, ...] = (
    the_name_can_be_written_in_a_table,
    the_summary_is_one_line,
    options_are_a_table,
    no_option_is_a_key_of_vtrain,
    build_is_a_function,
    an_optimizer_has_a_learning_rate,
    an_optimizer_says_which_weights_it_moves,
    what_a_spec_names_can_be_found,
)
"""A part that breaks one of these is none: a row below the list of plugins."""

# -- of a spec, for its users ----------------------------------------------------------------------------------------------


def the_spec_is_of_a_known_kind(spec: Spec, table: Table = NONE) -> Problems:
    """A spec is one of the six kinds."""
    if type(spec) not in KINDS:
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        yield Problem("", f"it is a {type(spec).__name__}, none of the six kinds.", f"They are {kinds}.")


def the_summary_fits_a_line(spec: Spec, table: Table = NONE) -> Problems:
    """A summary fits on one line of `vtrain plugins list`: at most 120 letters, none of them a space around it."""
    if isinstance(spec.summary, str) and (len(spec.summary) > 120 or spec.summary.strip() != spec.summary):
        what = f"its summary is {len(spec.summary)} letters long, or has spaces around it."
        yield Problem("", what, "At most 120 letters fit on a line of `vtrain plugins list`.")


def options_are_described(spec: Spec, table: Table = NONE) -> Problems:
    """Every option says what it means, for `vtrain plugins show`."""
    for name, field in _fields(spec).items():
        if not (field.description or "").strip():
            remedy = 'Say it: Field(..., description="...").'
            yield Problem(place_of(spec.options, name), f'the option "{name}" does not say what it means.', remedy)


def an_unknown_option_is_an_error(spec: Spec, table: Table = NONE) -> Problems:
    """A key that the part does not know never passes."""
    from pydantic import ValidationError

    _fields(spec)
    try:
        spec.options.model_validate({**table, "no_such_option": 1})
    except ValidationError as error:
        if all(each["loc"][:1] != ("no_such_option",) for each in error.errors(include_input=False)):
            options_of(spec, table)  # without that key: it may be the table that is refused, which proves nothing
        return
    remedy = "Leave `extra` of Options as it is, and let no validator drop keys."
    yield Problem(place_of(spec.options), "an option that it does not know passes without an error.", remedy)


def options_are_frozen(spec: Spec, table: Table = NONE) -> Problems:
    """Options cannot be changed after they were read."""
    from pydantic import ValidationError

    options = options_of(spec, table)
    try:
        setattr(options, next(iter(type(options).model_fields), "anything"), None)
    except ValidationError:
        return
    remedy = "Leave `frozen` of Options as it is."
    yield Problem(place_of(spec.options), "its options can be changed after they were read.", remedy)


def options_survive_json(spec: Spec, table: Table = NONE) -> Problems:
    """Written to JSON and read again, options are equal: plans and checkpoints keep them so."""
    options = options_of(spec, table)
    yield from _comes_back(spec, options, json.loads(options.model_dump_json()), "JSON")


def options_survive_toml(spec: Spec, table: Table = NONE) -> Problems:
    """Written as the file would have them and read again, options are equal; what is None is absent there."""
    import tomllib

    options = options_of(spec, table)
    written = json.loads(options.model_dump_json()).items()
    try:
        text = "\n".join(f"{_toml(key)} = {_toml(value)}" for key, value in written if value is not None)
    except ValueError:
        remedy = "A list has values alone; give an absent one a value of its own."
        yield Problem(place_of(spec.options), "its options have None in a list, which no file can say.", remedy)
        return
    yield from _comes_back(spec, options, tomllib.loads(text), "TOML")


def _toml(value: object) -> str:
    """JSON as TOML has it inline. Raises ValueError for None, but as a value of a table, where the key is absent."""
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{_toml(key)} = {_toml(each)}" for key, each in value.items() if each is not None) + " }"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if value is None:
        raise ValueError("TOML has no None")
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comes_back(spec: Spec, options: Options, written: Table, form: str) -> Problems:
    from pydantic import ValidationError

    try:
        again: Options | None = spec.options.model_validate(dict(written))
    except ValidationError as error:
        again, why = None, f"it is refused: {_refusal(error)}"
    if again is None or again != options:
        after = {} if again is None else dict(again)
        changed = [name for name, value in dict(options).items() if name not in after or after[name] != value]
        what = why if again is None else f"it is another: {listed(changed)}"
        remedy = "A validator must take what it made, and a type what its JSON is: Field(strict=False) for tuples."
        name = changed[0] if changed else ""
        yield Problem(place_of(spec.options, name), f"written as {form} and read again, {what}.", remedy)


def options_have_a_json_schema(spec: Spec, table: Table = NONE) -> Problems:
    """`vtrain config schema` can describe every option, with its default."""
    fields = _fields(spec)
    schema = json.loads(json.dumps(spec.options.model_json_schema())).get("properties", {})
    for name in sorted(schema.keys() ^ fields.keys()):
        what = f'the JSON schema and the options differ in "{name}".'
        yield Problem(place_of(spec.options), what, "Leave model_json_schema as it is.")
    for name, field in fields.items():
        if name in schema and not field.is_required() and "default" not in schema[name]:
            remedy = "Give the default itself, not a default_factory."
            yield Problem(place_of(spec.options, name), f'the option "{name}" has no default in the schema.', remedy)


SPEC_RULES: tuple[SpecRule, ...] = (
    the_spec_is_of_a_known_kind,
    *NEEDED,
    the_summary_fits_a_line,
    options_are_described,
    an_unknown_option_is_an_error,
    options_are_frozen,
    options_survive_json,
    options_survive_toml,
    options_have_a_json_schema,
)
"""All that is asked of a spec."""

OF_KINDS: Mapping[SpecRule, tuple[type[Spec], ...]] = {
    an_optimizer_has_a_learning_rate: (OptimizerSpec,),
    an_optimizer_says_which_weights_it_moves: (OptimizerSpec,),
    what_a_spec_names_can_be_found: (FamilySpec, SamplerSpec),
}
"""Rules that say nothing of other kinds than these."""
