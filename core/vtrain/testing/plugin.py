"""The rules of a plugin: what every part says of itself, its entry module, its hooks, its imports."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import tomli
from pydantic import ValidationError

from vtrain.contract import ENTRY_POINT_GROUP, HOOK_SPECS, KINDS, PROJECT, Moved, OptimizerSpec, Options, Spec
from vtrain.testing.sampler import required


class SpecTests:
    """A registered part.

    table: the options that its table needs, as the configuration file gives them; {} when every option has a default.
    """

    table: Mapping[str, object] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        """The spec. Override it."""
        required("spec", "the Spec under test, as the plugin registers it")

    @pytest.fixture(scope="class")
    @classmethod
    def options(cls, spec: Spec) -> Options:
        return spec.options.model_validate(dict(cls.table))

    def test_the_spec_is_of_a_known_kind(self, spec: Spec) -> None:
        """A spec is one of the six kinds."""
        assert type(spec) in KINDS

    def test_the_name_can_be_written_in_a_table(self, spec: Spec) -> None:
        """A name is lower case letters, digits, "-" and "_", and starts with a letter."""
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", spec.name), spec.name

    def test_the_summary_is_one_line(self, spec: Spec) -> None:
        """A summary fits on one line of `vtrain plugins list`."""
        assert spec.summary.strip() == spec.summary
        assert 0 < len(spec.summary) <= 120
        assert "\n" not in spec.summary

    def test_options_are_described(self, spec: Spec) -> None:
        """Every option says what it means, for `vtrain plugins show`."""
        assert issubclass(spec.options, Options)
        bare = [name for name, field in spec.options.model_fields.items() if not (field.description or "").strip()]
        assert not bare, f"without a description: {', '.join(bare)}"

    def test_an_unknown_option_is_an_error(self, spec: Spec) -> None:
        """A key that the part does not know never passes."""
        with pytest.raises(ValidationError, match="no_such_option"):
            spec.options.model_validate({**self.table, "no_such_option": 1})

    def test_options_are_frozen(self, options: Options) -> None:
        """Options cannot be changed after they were read."""
        with pytest.raises(ValidationError, match="frozen"):
            setattr(options, next(iter(type(options).model_fields), "anything"), None)

    def test_options_survive_json(self, spec: Spec, options: Options) -> None:
        """Written to JSON and read again, options are equal: plans and checkpoints keep them so."""
        written = json.loads(options.model_dump_json())
        assert spec.options.model_validate(written) == options

    def test_options_survive_toml(self, spec: Spec, options: Options) -> None:
        """Written into a configuration file, every option, and so every default, is read back as it was."""
        text = "\n".join(f"{name} = {toml_text(value)}" for name, value in written_options(options).items())
        assert spec.options.model_validate(tomli.loads(text)) == options, f"they are others after\n{text}"

    def test_options_have_a_json_schema(self, spec: Spec) -> None:
        """`vtrain config schema` can describe every option, with its default."""
        schema = json.loads(json.dumps(spec.options.model_json_schema()))
        properties = schema.get("properties", {})
        assert properties.keys() == spec.options.model_fields.keys()
        for name, field in spec.options.model_fields.items():
            assert field.is_required() or "default" in properties[name], f"{name}: no default in the schema"

    def test_an_optimizer_has_a_learning_rate(self, spec: Spec) -> None:
        """An optimizer's options have `lr`, which the learning-rate schedule scales."""
        if isinstance(spec, OptimizerSpec):
            assert "lr" in spec.options.model_fields

    def test_an_optimizer_says_which_weights_it_moves(self, spec: Spec) -> None:
        """moves is made of "fp32", "bf16" and "sharded", and has a type of weights in it."""
        if isinstance(spec, OptimizerSpec):
            assert spec.moves <= set(get_args(Moved)), f"moves: {sorted(spec.moves)}"
            assert spec.moves - {"sharded"}, "it moves neither fp32 nor bf16 weights"


def written_options(options: Options) -> dict[str, object]:
    """As a file has them: what is None is absent."""
    return {name: value for name, value in options.model_dump(mode="json").items() if value is not None}


def toml_text(value: object) -> str:
    """A value as TOML has it; in tables what is None is absent."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{toml_text(str(k))} = {toml_text(v)}' for k, v in value.items() if v is not None)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml_text, value))}]"
    assert value is not None, "a list with nothing in it, None, which no TOML file can hold"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else repr(value)


HEAVY = ("torch", "diffusers", "transformers", "accelerate")

PROBE = """
import importlib, json, sys
from vtrain.contract import HOOK_SPECS, SupportsStepCheck
module, heavy, tables = sys.argv[1], set(json.loads(sys.argv[2])), json.loads(sys.argv[3])
entry = importlib.import_module(module)
specs = {(spec.kind, spec.name): spec for hook in HOOK_SPECS for spec in getattr(entry, hook, tuple)()}
for kind, name, table in tables:
    spec = specs[kind, name]
    part = spec.build(spec.options.model_validate(table), *([{}] if kind == "sampler" else []))
    if isinstance(part, SupportsStepCheck):
        part.check_steps(50)
print(json.dumps(sorted(heavy & sys.modules.keys())))
"""
"""Run in a process of its own: which heavy modules registration, and building the given parts, import."""


def heavy_imports(module: str, tables: Sequence[tuple[str, str, Mapping[str, object]]] = ()) -> list[str]:
    """Of importing an entry module, calling its hooks and building parts from (kind, name, table)."""
    command = [sys.executable, "-c", PROBE, module, json.dumps(HEAVY), json.dumps(list(tables))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def hook_functions(module: ModuleType) -> dict[str, object]:
    """What the entry module offers under a hook's prefix or marks as an implementation."""
    marked = f"{PROJECT}_impl"
    return {name: value for name, value in vars(module).items() if name.startswith("vtrain_") or hasattr(value, marked)}


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a Python file, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "vtrain":
                yield from ((node.lineno, f"vtrain.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


class PluginTests:
    """A plugin. entry_module: what its entry point names, "vtrain_toy.plugin".

    tables: (kind, name) -> options, as JSON, for each part that has required ones; the other parts are built from defaults.
    """

    entry_module: str = ""
    tables: Mapping[tuple[str, str], Mapping[str, object]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def module(cls) -> ModuleType:
        if not cls.entry_module:
            pytest.fail(
                "Give the class attribute `entry_module`: the module that the entry point names.", pytrace=False
            )
        return importlib.import_module(cls.entry_module)

    @pytest.fixture(scope="class")
    @classmethod
    def specs(cls, module: ModuleType) -> list[Spec]:
        return [spec for hook in HOOK_SPECS for spec in getattr(module, hook, tuple)()]

    def test_the_plugin_is_installed_under_an_entry_point(self, module: ModuleType) -> None:
        """The distribution declares the entry module in the group of this API version."""
        named = [entry.value for entry in entry_points(group=ENTRY_POINT_GROUP)]
        assert module.__name__ in named, f"the group {ENTRY_POINT_GROUP} has {', '.join(sorted(named)) or 'nothing'}"

    def test_hooks_are_spelt_right(self, module: ModuleType) -> None:
        """Every hook of the entry module is one of the six, takes no argument and is marked with @hookimpl."""
        hooks = hook_functions(module)
        assert hooks, f"{self.entry_module} has no hook"
        unknown = sorted(hooks.keys() - HOOK_SPECS.keys())
        assert not unknown, f"no such hook: {', '.join(unknown)}; the hooks are {', '.join(HOOK_SPECS)}"
        for name, hook in hooks.items():
            assert callable(hook), f"{name} is not callable"
            assert hasattr(hook, f"{PROJECT}_impl"), f"{name} is not marked with @hookimpl"
            assert not inspect.signature(hook).parameters, f"{name} takes arguments"

    def test_hooks_return_specs_of_their_kind(self, module: ModuleType) -> None:
        """Each hook returns an iterable of its kind of spec, the same each time, no name twice."""
        for hook, kind in HOOK_SPECS.items():
            specs = list(getattr(module, hook, tuple)())
            assert all(isinstance(spec, kind) for spec in specs), f"{hook} returns something else than {kind.__name__}"
            assert len({spec.name for spec in specs}) == len(specs), f"{hook} returns a name twice"
            assert specs == list(getattr(module, hook, tuple)()), f"{hook} returns something else the second time"

    def test_registration_imports_nothing_heavy(self, module: ModuleType) -> None:
        """Importing the entry module and calling its hooks imports no torch, diffusers, transformers or accelerate."""
        heavy = heavy_imports(module.__name__)
        assert not heavy, f"importing {self.entry_module} imports {', '.join(heavy)}"

    def test_parts_are_built_without_anything_heavy(self, specs: list[Spec]) -> None:
        """Every part but an optimizer is built from its options, without torch, diffusers, transformers or accelerate."""
        given: list[tuple[str, str, Mapping[str, object]]] = []
        unknown = set(self.tables)
        for spec in specs:
            unknown.discard((spec.kind, spec.name))
            table = self.tables.get((spec.kind, spec.name))
            needed = [name for name, field in spec.options.model_fields.items() if field.is_required()]
            if isinstance(spec, OptimizerSpec):
                continue
            assert table is not None or not needed, f"give `tables` the options {needed} of {spec.kind} {spec.name}"
            given.append((spec.kind, spec.name, table or {}))
        assert not unknown, f"`tables` names parts that the plugin does not register: {sorted(unknown)}"
        heavy = heavy_imports(self.entry_module, given)
        assert not heavy, f"building {', '.join(name for _, name, _ in given)} imports {', '.join(heavy)}"

    def test_only_the_contract_is_imported(self, module: ModuleType) -> None:
        """The package imports vtrain.contract and nothing else of vtrain, so that core can change behind it."""
        assert module.__file__ is not None
        package = self.entry_module.split(".")[0]
        found = importlib.util.find_spec(package)
        assert found is not None
        roots = [Path(place) for place in found.submodule_search_locations or ()] or [Path(module.__file__)]
        files = [file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*.py")))]
        wrong = [
            f"{file.name}:{line} imports {name}"
            for file in files
            for line, name in imports_of(file)
            if name.split(".")[0] == "vtrain" and name != "vtrain.contract" and not name.startswith("vtrain.contract.")
        ]
        assert not wrong, "; ".join(wrong)
