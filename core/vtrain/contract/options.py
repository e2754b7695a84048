"""Options of parts: typed, described, each with its rule at a resume; and text that must not show a secret."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

_WEB = ("http://", "https://")
_NAMES = ("github://", "git://")
"""Schemes whose "x:y@" names a repository."""

_URL = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<user>[^/?#]*@)?(?P<rest>[^?#]*)(?P<query>\?[^#]*)?(?P<fragment>#.*)?",
    re.IGNORECASE | re.DOTALL,
)


class HoldsSecret(ValueError):
    """A validator of options raises it for a value that holds a secret: its words are told, the value is not."""


class HoldsControlCharacter(ValueError):
    """A path holds one, as a Windows path in double quotes does. literal: the path as it was meant, for the file."""

    def __init__(self, path: str, char: str) -> None:
        name, typed = _CONTROL.get(char, "a control character"), json.dumps(char)[1:-1]
        super().__init__(f'no path holds {name}, which "{typed}" in double quotes is')
        meant = json.dumps(path, ensure_ascii=False)[1:-1].replace("\\\\", "\\").replace('\\"', '"')
        if path[:1] == "\\" != path[1:2]:  # of a server: two were typed
            meant = f"\\{meant}"
        self.literal = f"'{meant}'" if "'" not in meant else json.dumps(meant, ensure_ascii=False)


_CONTROL = {"\t": "a tab", "\n": "a line break", "\r": "a carriage return", "\b": "a backspace", "\f": "a form feed"}


def check_path_text(text: str) -> str:
    """The same text. Raises HoldsControlCharacter."""
    for char in text:
        if ord(char) < 32 or ord(char) == 127:
            raise HoldsControlCharacter(text, char)
    return text


def without_secrets(text: str) -> str:
    """A URL, or a chain of them with "::", with "***" for user, password, query and fragment; other texts as they are.

    Away from the web "?" and "#" may belong to a name or a pattern: there what follows is hidden if it has a "=".
    """
    return "::".join(map(_shown, text.split("::"))) if "://" in text else text


def _shown(part: str) -> str:
    found = _URL.fullmatch(part)
    if found is None:
        return part
    scheme, user, rest, query, fragment = (
        found[name] or "" for name in ("scheme", "user", "rest", "query", "fragment")
    )
    if user and scheme.lower() not in _NAMES:
        user = "***@"
    if scheme.lower() in _WEB or "=" in query + fragment:
        query, fragment = "?***" if query else "", "#***" if fragment else ""
    return f"{scheme}{user}{rest}{query}{fragment}"


Resume = Literal["free", "tell", "refuse"]
"""What another value means when a run is resumed.

free: nothing, it is taken. tell: it changes the run from here on, which is reported; the rule of an option that declares none.
refuse: it is another run, and an error.
"""


class Options(BaseModel):
    """Base of all options. A subclass is frozen, forbids unknown keys and describes each of its fields.

    Raises TypeError when the subclass is defined if a field has no description, or a resume rule that is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True, protected_namespaces=())

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        bare = [name for name, field in cls.model_fields.items() if not field.description]
        if bare:
            raise TypeError(f"{cls.__name__}: no description for {', '.join(bare)}")
        for name in cls.model_fields:
            if resume_rule(cls, name) not in get_args(Resume):
                rules = ", ".join(get_args(Resume))
                raise TypeError(f"{cls.__name__}.{name}: no such resume rule; there are {rules}")


def fixed(default: Any = ..., **details: Any) -> Any:
    """A pydantic Field whose value may not change when a run is resumed; of a table, that of no key in it."""
    return Field(default, json_schema_extra={"resume": "refuse"}, **details)


def free(default: Any = ..., **details: Any) -> Any:
    """A pydantic Field whose value may change when a run is resumed and says nothing of the run: no word of it then."""
    return Field(default, json_schema_extra={"resume": "free"}, **details)


def resume_rule(options: type[Options], field: str) -> Resume:
    """What another value of `field` means at a resume: as `fixed` or `free` declared it, "tell" of a plain Field."""
    extra = options.model_fields[field].json_schema_extra
    return cast(Resume, extra.get("resume", "tell")) if isinstance(extra, dict) else "tell"


@dataclass(frozen=True)
class Location:
    """Marks a type of options that say where something is: at a resume what lies there is compared, not how the path is spelt.

    That of a family or a regularizer which is `fixed` may change where its fingerprints stay the same.
    """


def is_location(options: type[Options], field: str) -> bool:
    """Whether `field`, or what it is a table or a list of, is marked with a `Location`."""
    info = options.model_fields[field]
    return _marked((*info.metadata, info.annotation))


def _marked(parts: tuple[object, ...]) -> bool:
    return any(isinstance(each, Location) or _marked(get_args(each)) for each in parts)


def _folder(info: ValidationInfo) -> Path:
    """The folder that relative paths start from: the configuration file's own."""
    context = info.context
    return Path(context["folder"]) if isinstance(context, dict) and "folder" in context else Path.cwd()


def normal(path: Path) -> Path:
    """Without "." and "..", where the shorter path leads to the same place: behind a link "link/.." is another folder."""
    short = Path(os.path.normpath(path))
    return short if short == path or os.path.realpath(short) == os.path.realpath(path) else path


def _local_path(value: object, info: ValidationInfo) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("a path is a text that is not empty")
    check_path_text(str(value))
    try:
        return normal(_folder(info) / Path(value).expanduser())
    except RuntimeError as error:
        raise ValueError("there is no such user, so no home folder to start from") from error


def _model_source(value: object, info: ValidationInfo) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError('a hub id such as "owner/name", or a folder')
    local = _local_path(value, info)
    looks_local = value.startswith((".", "~", "/")) or local.exists() or value.count("/") != 1
    return str(local) if looks_local else value


LocalPath = Annotated[
    Path, BeforeValidator(_local_path), Field(strict=False), WithJsonSchema({"type": "string"}), Location()
]
"""A file or folder; relative paths start at the configuration file's folder, "~" is the home folder. Becomes absolute."""

ModelSource = Annotated[str, BeforeValidator(_model_source), Location()]
"""A folder, or a hub id "owner/name" if no such folder exists. A folder becomes an absolute path."""


def _digits(value: float) -> str:
    """A number as the grammar of durations takes it: all its digits, no exponent."""
    return format(Decimal(repr(value)).normalize(), "f")


Unit = Literal["steps", "epochs", "seconds"]


@dataclass(frozen=True)
class Duration:
    """A length of training: "500 steps", "2 epochs", "90 s", "10 min" or "1.5 h". A step is an optimizer step.

    value: > 0; whole for steps. unit: "steps", "epochs" or "seconds".
    """

    value: float
    unit: Unit

    _UNITS: ClassVar[dict[str, tuple[Unit, float]]] = {
        "step": ("steps", 1), "steps": ("steps", 1), "epoch": ("epochs", 1), "epochs": ("epochs", 1),
        "s": ("seconds", 1), "sec": ("seconds", 1), "min": ("seconds", 60), "h": ("seconds", 3600),
    }  # fmt: skip
    _FORM: ClassVar[str] = r"^\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|s|sec|min|h)\s*$"

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Read a duration. Raises ValueError that shows the grammar."""
        if isinstance(text, Duration):
            return text
        match = re.match(cls._FORM, text) if isinstance(text, str) else None
        if match is None:
            raise ValueError('a duration is a number and a unit in quotes, such as "500 steps", "2 epochs" or "10 min"')
        unit, factor = cls._UNITS[match[2]]
        value = float(match[1]) * factor
        if value <= 0:
            raise ValueError("a duration is greater than 0")
        if unit == "steps" and value != int(value):
            raise ValueError("a number of steps is whole")
        return cls(value, unit)

    def in_steps(self, per_epoch: float) -> int | None:
        """In optimizer steps, at least 1; None for one in seconds. per_epoch: optimizer steps in an epoch."""
        if self.unit == "seconds":
            return None
        return max(1, round(self.value if self.unit == "steps" else self.value * per_epoch))

    def __str__(self) -> str:
        if self.unit != "seconds":
            return f"{_digits(self.value)} {self.unit if self.value != 1 else self.unit[:-1]}"
        for name, size in (("h", 3600), ("min", 60)):
            if self.value % size == 0:
                return f"{_digits(self.value / size)} {name}"
        return f"{_digits(self.value)} s"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.to_string_ser_schema(when_used="always")
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": cls._FORM, "examples": ["500 steps", "2 epochs", "10 min"]}


Decay = Literal["constant", "linear", "cosine", "polynomial"]
"""How a value falls after its warm-up. With `cycles` above 1 the decay is repeated, over equal parts of its length."""


def scheduled(
    step: int,
    *,
    full: float,
    end: float,
    warmup: int,
    length: int,
    decay: Decay = "constant",
    power: float = 1.0,
    cycles: int = 1,
) -> float:
    """A value (a learning rate's factor, a loss's weight) at the zero-based optimizer step: linear warm-up, then decay.

    Warm-up of w steps: step i has (i + 1) / w of `full`, so that step w - 1 is the first with all of it; without warm-up
    that is step 0. Decay from that step a on: p = (i - a) / length, at most 1, and the value is end + (full - end) q;
    linear: q = 1 - p, cosine: q = (1 + cos(pi p)) / 2, polynomial: q = (1 - p) ** power. length: in steps.
    cycles: with more than 1, p is that of the cycle: the fraction of cycles x p, and 1 at the end (SGDR, arXiv 1608.03983).
    """
    if step < warmup:
        return full * (step + 1) / warmup
    if decay == "constant":
        return full
    done, whole = min(step - max(warmup - 1, 0), max(length, 1)), max(length, 1)
    # Of whole numbers: a fraction times cycles may fall just short of the next cycle.
    progress = done * cycles % whole / whole if done < whole else 1.0
    if decay == "cosine":
        left = (1 + math.cos(math.pi * progress)) / 2
    else:
        left = (1 - progress) ** (power if decay == "polynomial" else 1)
    return end + (full - end) * left
