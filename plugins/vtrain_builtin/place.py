"""Where a data backend's files are: a local path or a URL of fsspec, and how patiently a URL is asked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, ClassVar, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from pydantic import BeforeValidator, Field, JsonValue, PlainSerializer, TypeAdapter, ValidationInfo, model_validator

from vtrain.contract import HoldsSecret, LocalPath, Options, without_secrets

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

PlacePath = Annotated[str, BeforeValidator(_place), _told]
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
        self.words = tuple(sorted((form for form in forms if form), key=len, reverse=True))

    def __call__(self, text: str) -> str:
        for word in self.words:
            text = text.replace(word, "***")
        return text
