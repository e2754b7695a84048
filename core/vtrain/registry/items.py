"""One registered spec: whether core can use it."""

from __future__ import annotations

import re

from vtrain.contract import RESERVED_KEYS, FamilySpec, OptimizerSpec, Options, Spec
from vtrain.contract.lookup import listed

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def fault_of(spec: Spec) -> str:
    """What is wrong with a spec, in one sentence; "" if nothing is. A spec's fields are not trusted to be of their types."""
    faults = (_name, _summary, _options, _build, _own)
    return next((fault for check in faults if (fault := check(spec))), "")


def _name(spec: Spec) -> str:
    if isinstance(spec.name, str) and _NAME.fullmatch(spec.name):
        return ""
    return f"{spec.name!r} is not a name: lower case letters, digits, - and _, starting with a letter or digit"


def _summary(spec: Spec) -> str:
    if isinstance(spec.summary, str) and spec.summary.strip() and len(spec.summary.splitlines()) == 1:
        return ""
    return "its summary is not one line of text"


def _options(spec: Spec) -> str:
    options: object = spec.options
    if not (isinstance(options, type) and issubclass(options, Options)):
        return f"its options are {options!r}, not a subclass of vtrain.contract.Options"
    if options.model_config.get("extra") != "forbid" or not options.model_config.get("frozen"):
        return f"its options {options.__name__} must stay frozen and forbid unknown keys"
    if aliased := [name for name, field in options.model_fields.items() if field.alias or field.validation_alias]:
        return f"options are written in the file by their field names, so an alias is not possible: {listed(aliased)}"
    if taken := RESERVED_KEYS[spec.kind] & set(options.model_fields):
        return f"its options {listed(taken)} collide with vtrain's own keys of that table"
    return ""


def _build(spec: Spec) -> str:
    build: object = getattr(spec, "build", None)
    return "" if callable(build) else f"its build is {build!r}, not a function"


def _own(spec: Spec) -> str:
    """What one kind asks for beyond the others."""
    if isinstance(spec, FamilySpec) and not (isinstance(spec.sampler, str) and _NAME.fullmatch(spec.sampler)):
        return f"its sampler is {spec.sampler!r}, not the name of one"
    if isinstance(spec, OptimizerSpec) and "lr" not in spec.options.model_fields:
        return 'an optimizer has an option "lr"'
    return ""
