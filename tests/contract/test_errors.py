"""Errors a user can mend."""

from __future__ import annotations

import pytest

from vtrain.contract import ConfigError, Problem, VtrainError


def test_a_problem_reads_as_place_fault_and_remedy() -> None:
    assert str(Problem("config.toml:3", "it is wrong.", "Mend it.")) == "config.toml:3: it is wrong. Mend it."
    assert str(Problem("", "it is wrong.")) == "it is wrong."


def test_an_error_carries_all_its_problems() -> None:
    problems = [Problem("a", "one"), Problem("b", "two")]
    error = ConfigError(problems)
    assert error.problems == tuple(problems)
    assert str(error) == "a: one\nb: two"
    assert isinstance(error, VtrainError)


def test_an_error_without_a_problem_is_a_bug() -> None:
    with pytest.raises(ValueError, match="without a problem"):
        VtrainError([])
