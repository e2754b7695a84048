"""Asking a storage again: which failures pass, how long to wait, and every failure as one kind of error.

Not by tenacity: tried, it passes every test in a loop as long as that of `Attempts.__call__` (stop, wait, retry and after set as
callables, the count of tries taken from its statistics), and what is long here, telling failures that pass from those that last
over a dozen libraries' exceptions, and wording them, is what one writes for it anyway. botocore's own knows S3 alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from vtrain.contract import DataError, Problem
from vtrain_builtin.place import Redaction

ResultT = TypeVar("ResultT")

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

    def __call__(self, ask: Callable[[], ResultT], failed: Callable[[], None] | None = None) -> ResultT:
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
