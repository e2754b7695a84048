"""Where a data backend's files are: a local path or a URL of fsspec; and how patiently a URL is asked.

Which failures pass, how long to wait, and every failure as one kind of error. Not by tenacity: tried, it passes every test
in a loop as long as that of `Attempts.__call__` (stop, wait, retry and after set as callables, the count of tries taken
from its statistics), and what is long here, telling failures that pass from those that last over a dozen libraries'
exceptions, and wording them, is what one writes for it anyway. botocore's own knows S3 alone.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Self, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from pydantic import BeforeValidator, Field, JsonValue, PlainSerializer, TypeAdapter, ValidationInfo, model_validator

from vtrain.contract import DataError, HoldsSecret, LocalPath, Location, Options, Problem, without_secrets

_LOCAL = TypeAdapter[Path](LocalPath)
_SECRET = re.compile(
    r"secret|token|password|passwd|credential|access_?key|account_?key|authorization|cookie|(^|_)(key|pass|pat|auth)$",
    re.IGNORECASE,
)
_NO_SECRETS = ("anon", "cloud", "google_default", True, False, None)
"""What stands under such keys and says where secrets come from: gcsfs's token = "anon"."""
_REPOSITORIES = ("github", "git")
"""Schemes whose "x:y@" is no user and password."""

_URL = re.compile(r"[a-z][a-z0-9+.-]*(::|://)", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Whether a path is a URL for fsspec; `file://` is a local path."""
    return bool(_URL.match(text)) and not text.startswith(("file://", "local://"))


def has_password(url: str) -> bool:
    """Whether a URL, or one of a chain, holds a password. Raises HoldsSecret for a URL that may hold one and cannot be read."""
    for part in url.split("::"):
        try:
            found = urlsplit(part)
            if found.scheme in ("http", "https"):
                _ = found.port
        except ValueError:
            raise HoldsSecret("this is not a URL: its host or port cannot be read") from None
        if found.password and found.scheme not in _REPOSITORIES:
            return True
    return False


def _remedy(url: str) -> str:
    """Where the password of a URL goes instead."""
    scheme = urlsplit(url.rpartition("::")[2]).scheme
    if scheme in ("http", "https"):
        return "give them in ~/.netrc, with storage_options = { client_kwargs = { trust_env = true } }"
    if scheme in ("s3", "s3a"):
        return (
            "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE in the environment, or ~/.aws/credentials"
        )
    return f"give the password in the environment as FSSPEC_{scheme.upper()}_PASSWORD, or in the storage's own file"


def _place(value: object, info: ValidationInfo) -> str:
    if isinstance(value, str) and is_url(value):
        if has_password(value):
            raise HoldsSecret(f"the URL holds a password, and this file is copied into the run: {_remedy(value)}")
        return value
    if isinstance(value, str) and value.startswith(("file://", "local://")):
        value = unquote(urlsplit(value).path)
    return os.path.abspath(_LOCAL.validate_python(value, context=info.context))  # noqa: PTH100 (follows no link)


def _hidden(value: JsonValue) -> JsonValue:
    """The same with all URLs in it told without their secrets."""
    if isinstance(value, dict):
        return {key: _hidden(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_hidden(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value


_told = PlainSerializer(_hidden, when_used="json")
"""JSON is what is shown and kept of a value."""

PlacePath = Annotated[str, BeforeValidator(_place), _told, Location()]
"""An absolute local path, or a URL as it was written. Relative paths start at the configuration file."""


class PlaceOptions(Options):
    """Options of every backend that reads a local path or a URL. names_urls: whether a local place may name URLs."""

    names_urls: ClassVar[bool] = False

    path: PlacePath = Field(min_length=1, description="the place: a local path or a URL of fsspec")
    retries: int = Field(4, ge=0, le=100, description="of a URL: how often a failed request is made again")
    timeout: float = Field(
        30.0, gt=0, le=3600, description="of a URL: seconds that one request may take before it counts as failed"
    )
    storage_options: Annotated[dict[str, JsonValue], _told] = Field(
        {},
        description="of a URL: options of its fsspec file system, such as endpoint_url; secrets come from the environment",
    )

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        if found := sorted(secret_keys(self.storage_options)):
            raise HoldsSecret(
                f"storage_options holds {', '.join(found)}: secrets come from the environment or the storage's own "
                "credentials file, never from this file"
            )
        if self.storage_options and not self.names_urls and not is_url(self.path):
            raise ValueError("storage_options is for a URL, and path is a local one")
        return self


def secret_keys(options: JsonValue, under: str = "") -> Iterable[str]:
    """Keys, at any depth, under which secrets are given, or URLs with a password. under: the key of `options` itself."""
    if isinstance(options, dict):
        for key, value in options.items():
            if _SECRET.search(key) and value not in _NO_SECRETS:
                yield key
            else:
                yield from secret_keys(value, key)
    elif isinstance(options, list):
        for value in options:
            yield from secret_keys(value, under)
    elif isinstance(options, str) and is_url(options) and has_password(options):
        yield under


class Redaction:
    """A URL without its secrets: user, password, query and fragment; and texts in which they occur."""

    def __init__(self, url: str) -> None:
        parts = [urlsplit(part) for part in url.split("::")]
        self.location = "::".join(
            f"{part.scheme}://{part.netloc.rpartition('@')[2]}{part.path.rstrip('/')}" if part.scheme else part.path
            for part in parts
        )
        words = [word for part in parts for word in (part.password, part.username, part.query, part.fragment) if word]
        words += [value for part in parts for _, value in parse_qsl(part.query)]
        forms = {form for word in words for form in (word, unquote(word), quote(word, safe=""))}
        # The longest first: one that is a part of another would leave the rest of it.
        self.words = tuple(sorted((form for form in forms if form), key=len, reverse=True))

    def __call__(self, text: str) -> str:
        for word in self.words:
            text = text.replace(word, "***")
        return text


AnswerT = TypeVar("AnswerT")

_FIRST_WAIT, _LONGEST_WAIT = 0.25, 8.0
"""Seconds before the second try, doubled before each further one."""

_LASTING = (
    FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ImportError, ValueError, TypeError,
    LookupError, AttributeError, NotImplementedError,
)  # fmt: skip
"""Failures that another try does not mend."""

_LASTING_NAMES = ("Credential", "Validation", "OfflineMode")
"""In names of exceptions: of botocore, huggingface_hub and others, which need not be installed."""

_PASSING_STATUS = frozenset((408, 425, 429))
"""HTTP: time-out of the request, too early, too many requests. All from 500 on pass too."""


class StorageError(OSError):
    """What a storage raised, in one sentence. missing: nothing is there. denied: credentials are missing or refused."""

    def __init__(
        self, reason: str, *, missing: bool = False, denied: bool = False, absent_package: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.missing = missing
        self.denied = denied
        self.absent_package = absent_package

    def at(self, location: str, what: str = "the dataset cannot be listed") -> DataError:
        """As an error of the dataset."""
        if self.missing:
            remedy = "Set data.path to the place that holds the clips."
            return DataError(Problem(location, f"it does not exist ({self.reason}).", remedy))
        if self.denied:
            remedy = (
                "Check the credentials in the environment (for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE) and their rights here; for a public bucket set data.storage_options = { anon = true }."
            )
        elif self.absent_package:
            remedy = "Install the package of this storage, such as s3fs, gcsfs, huggingface_hub or aiohttp."
        else:
            remedy = "Check data.path and the access to it."
        return DataError(Problem(location, f"{what}: {self.reason}.", remedy))


@dataclass(frozen=True)
class Attempts:
    """How a storage is asked. retries: tries after the first. timeout: seconds for each."""

    retries: int
    timeout: float
    redaction: Redaction

    def __call__(self, ask: Callable[[], AnswerT], failed: Callable[[], None] | None = None) -> AnswerT:
        """What `ask` gives, at the first try that does not fail. failed: called after each that does. Raises StorageError.

        Storages of all sorts raise exceptions of all sorts: whatever comes is the storage's failure.
        """
        for number in range(self.retries + 1):
            try:
                return ask()
            except Exception as error:  # noqa: BLE001 (file systems raise what they like; all is raised again below)
                if failed is not None:
                    failed()
                real = _beneath(error)
                if _lasts(real) or number == self.retries:
                    tries = 1 if _lasts(real) else number + 1
                    # Without its cause where there are secrets: that one's text, shown in a traceback, holds them.
                    raise self._told(real, tries) from (None if self.redaction.words else error)
            time.sleep(min(_FIRST_WAIT * 2**number, _LONGEST_WAIT))
        raise AssertionError("a loop of one try or more returns or raises")

    def _told(self, error: Exception, tries: int) -> StorageError:
        if isinstance(error, StorageError):
            return error
        text = " ".join(str(error).split()).rstrip(".")
        if isinstance(error, TimeoutError):
            text = f"no answer within {self.timeout:g} s"
        elif isinstance(error, FileNotFoundError):
            text = f"not found: {text}" if text and "not" not in text else text or "not found"
        elif not isinstance(error, OSError | ImportError) or not text:
            text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        text = self.redaction(text)[:300]
        denied = (
            isinstance(error, PermissionError) or "Credential" in type(error).__name__ or status(error) in (401, 403)
        )
        return StorageError(
            text if tries == 1 else f"{text}, {tries} times",
            missing=isinstance(error, FileNotFoundError),
            denied=denied,
            absent_package=isinstance(error, ImportError),
        )


def status(error: BaseException) -> int:
    """The HTTP status that an exception of aiohttp, requests, httpx, botocore or huggingface_hub carries; 0 for none."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        number = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        number = getattr(error, "status", None) or getattr(answer, "status_code", None) or getattr(error, "code", None)
    return number if isinstance(number, int) else 0


def _beneath(error: Exception) -> Exception:
    """fsspec's file system for the web says "not found" whatever happened: what did, where the exception tells."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    from_the_web = type(cause).__module__.startswith("aiohttp") and not status(cause)
    failed = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return cause if from_the_web or failed or status(cause) not in (0, 404, 410) else error


def _lasts(error: Exception) -> bool:
    if isinstance(error, StorageError):
        return True
    code = status(error)
    if 400 <= code < 600:
        return code < 500 and code not in _PASSING_STATUS
    return isinstance(error, _LASTING) or any(word in type(error).__name__ for word in _LASTING_NAMES)
