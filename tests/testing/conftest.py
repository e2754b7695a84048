"""How a rule of the kit is run on a part that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest


@pytest.fixture
def breaks() -> Callable[..., None]:
    """Run the named rule of a kit; it must fail as a test does, and with a text that says what is wrong, `says` among it.

    subject: the rule's arguments; under "attributes" those of the kit's class, where it needs some.
    """

    def check(kit: object, rule: str, subject: Mapping[str, Any], says: str = "") -> None:
        for name, value in subject.get("attributes", {}).items():
            setattr(kit, name, value)
        given = {name: value for name, value in subject.items() if name != "attributes"}
        with pytest.raises((AssertionError, pytest.fail.Exception)) as caught:
            getattr(type(kit), rule)(kit, **given)
        first = str(caught.value).partition("\nassert ")[0]
        assert first
        assert says in first, f"{first!r} does not say {says!r}"

    return check


@pytest.fixture
def rules_of() -> Callable[[type], set[str]]:
    """The names of a kit's rules."""
    return lambda kit: {name for name in dir(kit) if name.startswith("test_")}
