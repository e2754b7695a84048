"""The rules of a plugin: what every part says of itself, its entry module, its hooks, its imports.

They stand in `vtrain.contract.spec_rules` and `plugin_rules`, where `vtrain plugins check` calls them too.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType

import pytest

from vtrain.contract import OptimizerSpec, Problem, Spec, plugin_rules, spec_rules
from vtrain.contract.spec_rules import NotChecked
from vtrain.testing.sampler import required


def hold(problems: Iterable[Problem]) -> None:
    """Fail with all of them, each with its place and its remedy."""
    try:
        found = list(problems)
    except NotChecked as error:
        pytest.fail(f"This cannot be tried: {error}.", pytrace=False)
    assert not found, "\n".join(map(str, found))


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

    def test_the_spec_is_of_a_known_kind(self, spec: Spec) -> None:
        """A spec is one of the six kinds."""
        hold(spec_rules.the_spec_is_of_a_known_kind(spec))

    def test_the_name_can_be_written_in_a_table(self, spec: Spec) -> None:
        """A name is lower case letters, digits, "-" and "_", and starts with a letter or digit."""
        hold(spec_rules.the_name_can_be_written_in_a_table(spec))

    def test_the_summary_is_one_line(self, spec: Spec) -> None:
        """A summary is one line of text."""
        hold(spec_rules.the_summary_is_one_line(spec))

    def test_the_summary_fits_a_line(self, spec: Spec) -> None:
        """A summary fits on one line of `vtrain plugins list`: at most 120 letters."""
        hold(spec_rules.the_summary_fits_a_line(spec))

    def test_options_are_a_table(self, spec: Spec) -> None:
        """Options are a class of vtrain.contract.Options, frozen, strict, and written in the file by their field names."""
        hold(spec_rules.options_are_a_table(spec))

    def test_no_option_is_a_key_of_vtrain(self, spec: Spec) -> None:
        """No option has the name of a key that the part's table has anyway, such as `use`."""
        hold(spec_rules.no_option_is_a_key_of_vtrain(spec))

    def test_options_are_described(self, spec: Spec) -> None:
        """Every option says what it means, for `vtrain plugins show`."""
        hold(spec_rules.options_are_described(spec))

    def test_an_unknown_option_is_an_error(self, spec: Spec) -> None:
        """A key that the part does not know never passes."""
        hold(spec_rules.an_unknown_option_is_an_error(spec, self.table))

    def test_options_are_frozen(self, spec: Spec) -> None:
        """Options cannot be changed after they were read."""
        hold(spec_rules.options_are_frozen(spec, self.table))

    def test_options_survive_json(self, spec: Spec) -> None:
        """Written to JSON and read again, options are equal: plans and checkpoints keep them so."""
        hold(spec_rules.options_survive_json(spec, self.table))

    def test_options_survive_toml(self, spec: Spec) -> None:
        """Written as a file would have them and read again, options are equal."""
        hold(spec_rules.options_survive_toml(spec, self.table))

    def test_options_have_a_json_schema(self, spec: Spec) -> None:
        """`vtrain config schema` can describe every option, with its default."""
        hold(spec_rules.options_have_a_json_schema(spec))

    def test_build_is_a_function(self, spec: Spec) -> None:
        """A spec's build can be called."""
        hold(spec_rules.build_is_a_function(spec))

    def test_what_a_spec_names_can_be_found(self, spec: Spec) -> None:
        """A family's sampler, its options and its caption extras, and a sampler's family, are names and records of their types."""
        hold(spec_rules.what_a_spec_names_can_be_found(spec))

    def test_an_optimizer_has_a_learning_rate(self, spec: Spec) -> None:
        """An optimizer's options have `lr`, which the learning-rate schedule scales."""
        hold(spec_rules.an_optimizer_has_a_learning_rate(spec))

    def test_an_optimizer_says_which_weights_it_moves(self, spec: Spec) -> None:
        """moves is made of "fp32", "bf16" and "sharded", and has a type of weights in it."""
        hold(spec_rules.an_optimizer_says_which_weights_it_moves(spec))


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
        return plugin_rules.specs_of(module)

    def test_the_plugin_is_installed_under_an_entry_point(self, module: ModuleType) -> None:
        """The distribution declares the entry module in the group of this API version."""
        hold(plugin_rules.the_plugin_is_installed_under_an_entry_point(module.__name__))

    def test_hooks_are_spelt_right(self, module: ModuleType) -> None:
        """Every hook of the entry module is one of the six, takes no argument and is marked with @hookimpl."""
        hold(plugin_rules.hooks_are_spelt_right(module))

    def test_hooks_return_specs_of_their_kind(self, module: ModuleType) -> None:
        """Each hook returns an iterable of its kind of spec, the same each time, no name twice."""
        hold(plugin_rules.hooks_return_specs_of_their_kind(module))

    def test_registration_imports_nothing_heavy(self, module: ModuleType) -> None:
        """Importing the entry module and calling its hooks imports no torch, diffusers, transformers or accelerate."""
        hold(plugin_rules.registration_imports_nothing_heavy(module.__name__))

    def test_parts_are_built_without_anything_heavy(self, specs: list[Spec]) -> None:
        """Every part but an optimizer is built from its options, without torch, diffusers, transformers or accelerate."""
        self.check_tables(specs)
        hold(plugin_rules.parts_are_built_without_anything_heavy(self.entry_module, self.tables_of(specs)))

    def test_a_part_is_what_its_kind_must_be(self, specs: list[Spec]) -> None:
        """What build gives has every member of its kind's protocol."""
        for spec in specs:
            if not isinstance(spec, OptimizerSpec):
                part = plugin_rules.built(spec, self.tables_of([spec])[spec.kind, spec.name])
                hold(plugin_rules.a_part_is_what_its_kind_must_be(spec, part))

    def test_only_the_contract_is_imported(self, module: ModuleType) -> None:
        """The package imports vtrain.contract and nothing else of vtrain, so that core can change behind it."""
        hold(plugin_rules.only_the_contract_is_imported(module.__name__))

    def check_tables(self, specs: list[Spec]) -> None:
        """Fail for an entry of `tables` that no part has, and for a part without one that needs it."""
        unknown = self.tables.keys() - {(spec.kind, spec.name) for spec in specs}
        assert not unknown, f"`tables` names parts that the plugin does not register: {sorted(unknown)}"
        for spec in specs:
            try:
                spec_rules.options_of(spec, self.tables.get((spec.kind, spec.name), {}))
            except NotChecked as error:
                if not isinstance(spec, OptimizerSpec):
                    pytest.fail(f"Give `tables` the options of {spec.kind} {spec.name}: {error}.", pytrace=False)

    def tables_of(self, specs: list[Spec]) -> plugin_rules.Tables:
        return {
            (spec.kind, spec.name): self.tables.get((spec.kind, spec.name), {})
            for spec in specs
            if not isinstance(spec, OptimizerSpec)
        }
