"""Errors that are the user's to mend: what is wrong, where, and what to do. They end a run with exit code 2, no traceback."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong.

    where: a place the user can open, "config.toml:12", a file or a folder; "" when there is none.
    what: the fault, in one sentence.
    remedy: what to do about it; "" when `what` says it already.
    """

    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{place}{self.what}{remedy}"


class VtrainError(Exception):
    """Base of every error a user can mend; carries one or more problems, all reported at once.

    reported: set on processes beside the one that reports it.
    """

    exit_code = 2
    reported = False

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        if not self.problems:
            raise ValueError("an error without a problem")
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[VtrainError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class ConfigError(VtrainError):
    """The configuration file cannot be read, or says something that cannot be done."""


class PluginError(VtrainError):
    """A plugin that this run names is missing or broken."""


class ModelError(VtrainError):
    """The model folder lacks something, or holds something else than the family expects."""


class DataError(VtrainError):
    """A dataset, or one file of it, cannot be used."""


class CheckpointError(VtrainError):
    """A checkpoint cannot be written, is damaged, or does not belong to this run."""


class TrainingError(VtrainError):
    """Training cannot go on, for example because a loss is not finite."""


class DeviceError(VtrainError):
    """The machine cannot do what is asked of it: a card that is full or cannot be used, or that lacks a number format."""
