"""How a rule of the kit is run on a part that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest


@pytest.fixture
def breaks() -> Callable[[object, str, Mapping[str, object]], None]:
    """Run the named rule of a kit; it must fail as a test does, and with some text that says what is wrong."""

    def check(kit: object, rule: str, subject: Mapping[str, object]) -> None:
        with pytest.raises((AssertionError, pytest.fail.Exception)) as caught:
            getattr(type(kit), rule)(kit, **subject)
        assert str(caught.value)

    return check


@pytest.fixture
def rules_of() -> Callable[[type], set[str]]:
    """The names of a kit's rules."""
    return lambda kit: {name for name in dir(kit) if name.startswith("test_")}
