"""The rules of a spec: what every part says of itself, whatever its kind."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import pytest
from pydantic import ValidationError

from vtrain.contract import KINDS, OptimizerSpec, Options, Spec
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
