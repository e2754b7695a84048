"""What a family may say of captions before its text encoder is loaded: extras that it reads, its wording, its tokens. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args, runtime_checkable

from vtrain.contract.checkpoints import digest, tokenizer_hashes
from vtrain.contract.errors import ModelError, Problem
from vtrain.contract.records import Caption, Role

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from vtrain.contract.protocols import HashFile

_TAKEN = ("caption", "captions", "text", "file", "path", "bytes", "id", "role")
"""Keys of caption files and columns of tables that mean something else."""


ExtraType = Literal["int", "float", "text"]


@dataclass(frozen=True)
class CaptionExtra:
    """What a family reads of a clip beside its caption: a key of JSON sidecars, a column of tables.

    name: lower case letters, digits and "_". minimum, maximum: of a number, both allowed values. summary: what it means, one
    line. default: what stands for an absent one, for people ("30", "the option pace"). Raises ValueError.
    """

    name: str
    type: ExtraType
    summary: str
    minimum: float | None = None
    maximum: float | None = None
    default: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name) or self.name in _TAKEN:
            what = f"lower case letters, digits and _, and none of {', '.join(_TAKEN)}"
            raise ValueError(f'"{self.name}" is no name of an extra: {what}')
        if self.type not in get_args(ExtraType):
            raise ValueError(
                f"the extra {self.name} is of type {self.type!r}, not one of {', '.join(get_args(ExtraType))}"
            )
        if not self.summary.strip() or "\n" in self.summary:
            raise ValueError(f"the summary of the extra {self.name} is not one line: {self.summary!r}")
        if self.type == "text" and (self.minimum, self.maximum) != (None, None):
            raise ValueError(f"the extra {self.name} is a text, which has no least and no largest value")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"the extra {self.name}: {self.minimum:g} is more than {self.maximum:g}")

    @property
    def kind(self) -> str:
        """ "whole number from 0 on"."""
        noun = {"int": "whole number", "float": "number", "text": "text"}[self.type]
        low, high = self.minimum, self.maximum
        if low is not None and high is not None:
            return f"{noun} from {low:g} to {high:g}"
        return noun + (f" from {low:g} on" if low is not None else f" up to {high:g}" if high is not None else "")


@runtime_checkable
class SupportsCaptionExtras(Protocol):
    """A family that reads more of a clip than its caption."""

    @property
    def caption_extras(self) -> tuple[CaptionExtra, ...]:
        """Those of FamilySpec.caption_extras; `default` may be what the options say."""
        ...


@runtime_checkable
class SupportsWording(Protocol):
    """A family that can say what its text encoder reads of a caption."""

    def wording(self, caption: Caption, role: Role) -> str:
        """The text with all that the role adds to it, as it is cut into tokens. Raises DataError as encoding it would."""
        ...


@dataclass(frozen=True)
class TokenCount:
    """What one text encoder makes of a caption. encoder: its name. tokens: that the caption would take, above limit or not.

    limit: tokens that the denoiser is given at most. lost: what the encoder does not read to the end, as names of extras, or
    "text" for the caption itself; empty if all is read. cut: the end of the wording that is not read.
    """

    encoder: str
    tokens: int
    limit: int
    lost: tuple[str, ...] = ()
    cut: str = ""


class TokenCounter(Protocol):
    """A family's tokenizers at work, without its text encoders."""

    def count(self, captions: Sequence[Caption], role: Role) -> Sequence[tuple[TokenCount, ...]]:
        """For each caption one for each text encoder, exactly as `encode` cuts it."""
        ...


@runtime_checkable
class SupportsTokenCounts(Protocol):
    """A family that can count tokens before its text encoders are loaded, and without torch."""

    def token_fingerprint(self, hash_file: HashFile) -> str:
        """Changes whenever a count could: tokenizers, instruction, limits."""
        ...

    def open_token_counter(self) -> AbstractContextManager[TokenCounter]:
        """Raises ModelError with the reason where this model folder's tokens can be counted by its text encoder alone."""
        ...


def token_digest(folder: Path, hash_file: HashFile, mark: str, *settings: object) -> str:
    """For `SupportsTokenCounts.token_fingerprint`: of the tokenizer in a folder, the package tokenizers and what else counts."""
    return digest(mark, tokenizer_hashes(folder, hash_file), metadata.version("tokenizers"), *settings)


def _read(folder: Path) -> Tokenizer:
    """A tokenizer.json, which then neither cuts nor pads. Raises ModelError."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        what = (
            "there is no tokenizer.json, so tokens cannot be counted without the text encoder; what is too long is cut."
        )
        remedy = "Save the tokenizer once with transformers, which writes it."
        raise ModelError(Problem(str(folder), what, remedy))
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exceptions
        raise ModelError(Problem(str(file), f"no tokenizer can be read: {error}", "Download it again.")) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TokenizerCounter:
    """A `TokenCounter` of one text encoder that reads the first tokens of a wording, by a tokenizer.json, without transformers.

    folder: of the tokenizer. encoder: its name. limit: tokens that the denoiser is given at most, those put around a text among
    them. wording: as `SupportsWording` has it. A family whose encoder reads more tokens, or whose wording ends in an extra,
    overrides `room` and `ending`. Raises ModelError.
    """

    def __init__(self, folder: Path, encoder: str, limit: int, wording: Callable[[Caption, Role], str]) -> None:
        self._tokenizer, self._encoder, self._limit, self._wording = _read(folder), encoder, limit, wording
        self._specials = len(self._tokenizer.encode("").ids)  # tokens that are put around every text

    def room(self, role: Role) -> int:
        """Tokens that the encoder reads: the limit, and those that the denoiser is not given, such as an instruction's."""
        return self._limit

    def ending(self, caption: Caption, role: Role) -> tuple[str, str]:
        """The extra with which a wording ends, and how: ("pace", "pace: 3."); ("", "") for none."""
        return "", ""

    def count(self, captions: Sequence[Caption], role: Role) -> list[tuple[TokenCount, ...]]:
        """One for each caption. Raises DataError as the wording does."""
        words = [self._wording(caption, role) for caption in captions]
        found = self._tokenizer.encode_batch(words, add_special_tokens=False)
        room = self.room(role)
        counts: list[tuple[TokenCount, ...]] = []
        for caption, text, encoding in zip(captions, words, found, strict=True):
            beyond = len(encoding.ids) + self._specials - room
            lost, cut = (
                self._lost(caption, role, text, encoding.offsets[max(0, len(encoding.ids) - beyond)][0])
                if beyond > 0
                else ((), "")
            )
            counts.append((TokenCount(self._encoder, self._limit + beyond, self._limit, lost, cut),))
        return counts

    def _lost(self, caption: Caption, role: Role, text: str, start: int) -> tuple[tuple[str, ...], str]:
        """What is cut and the words themselves. start: of the first token that is not read."""
        extra, ending = self.ending(caption, role)
        words = text[start : len(text) - len(ending)].strip()
        return (*(("text",) if words else ()), *((extra,) if extra else ())), text[start:]
