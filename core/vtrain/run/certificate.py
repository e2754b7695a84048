"""The certificate of a run: what was compared, what was not and why, and the verdict."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["sound", "sound as far as compared", "not sound"]

CERTIFICATE = "certificate.json"
FORMAT = 1

NEVER = (
    "seconds, data_wait and memory in metrics.jsonl: they are measured",
    "videos in samples/, tensorboard/, exports/ and what trackers keep",
    "estimates in plan.json, and events behind the last checkpoint: nothing says what they were",
)
"""What no verifying looks at."""


@dataclass(frozen=True)
class Finding:
    """Something that is not what the run says it is. where: a file, or a place in one; what: how it differs."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Retrained:
    """Steps that were trained again: those after `first`, to `last`. bits: whether all is the same bit for bit. difference: the
    largest, by the measures of `compare.TOLERANCE` and MOVED; 0 where bits are the same, None where something is no number."""

    first: int
    last: int
    rows: int
    tensors: int
    files: int
    bits: bool
    difference: float | None


@dataclass(frozen=True)
class Certificate:
    """What a verification found. run: the output folder. verdict: "sound as far as compared" where something could not be compared
    (not_compared says what and why), "not sound" with each of findings. compared: how much, by name. retrained: steps that were
    trained again. not_asked: what all = True trains again beside. versions, hashes: of what was compared, and of what compared it.
    file: where it was written, None where it could not be."""

    run: Path
    verdict: Verdict
    findings: tuple[Finding, ...]
    not_compared: tuple[str, ...]
    not_asked: tuple[str, ...]
    compared: Mapping[str, int]
    retrained: tuple[Retrained, ...]
    versions: Mapping[str, str]
    hashes: Mapping[str, Any]
    file: Path | None

    def as_json(self) -> dict[str, Any]:
        """As certificate.json has it."""
        found = {name: str(each) if isinstance(each, Path) else each for name, each in asdict(self).items()}
        del found["file"]
        return {"format": FORMAT, "time": round(time.time(), 3), **found, "never_compared": list(NEVER)}


@dataclass
class Report:
    """What is found, in the order in which it is. say: called with each line for people."""

    say: Callable[[str], None]
    findings: list[Finding] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    not_asked: list[str] = field(default_factory=list)
    compared: dict[str, int] = field(default_factory=dict)
    retrained: list[Retrained] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, Any] = field(default_factory=dict)

    def found(self, findings: Iterable[Finding]) -> int:
        """Take and say each; gives how many."""
        count = 0
        for each in findings:
            if each not in self.findings:
                self.findings.append(each)
                self.say(f"FOUND: {each}")
            count += 1
        return count

    def skip(self, text: str) -> None:
        self.not_compared.append(text)
        self.say(f"not compared: {text}")

    @property
    def verdict(self) -> Verdict:
        if self.findings:
            return "not sound"
        return "sound as far as compared" if self.not_compared else "sound"


def written(folder: Path, report: Report, *, writable: bool) -> Certificate:
    """The certificate, put in the run's folder in place of an earlier one."""
    file = folder / CERTIFICATE
    made = Certificate(
        folder, report.verdict, tuple(report.findings), tuple(report.not_compared), tuple(report.not_asked),
        report.compared, tuple(report.retrained), report.versions, report.hashes, file,
    )  # fmt: skip
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(made.as_json(), indent=2, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        report.say(f"WARNING: the certificate could not be written: {error}")
        return replace(made, file=None)
    report.say(f"certificate: {file}")
    return made
