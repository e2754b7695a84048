"""A place behind a URL, through fsspec: listed lazily in order, read by ranges, asked again when it fails."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from threading import Lock
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import quote, unquote, urlsplit

from vtrain.contract import SourceRef
from vtrain_builtin.place import Attempts, PlaceOptions, Redaction, StorageError, is_url
from vtrain_builtin.seekable import RemoteFile

_VERSION_KEYS = (
    "ETag", "etag", "sha256", "md5Hash", "blob_id", "LastModified", "last_modified", "Last-Modified", "mtime", "updated",
    "created",
)  # fmt: skip
"""Where fsspec's file systems tell that a file changed, the surest first."""

_AT_ONCE = 32
"""Requests for details of files that run at the same time."""

_DEEPEST = 100
"""Folders in one another."""

_READ = 1 << 16
_UNKNOWN, _UNREADABLE = "size unknown", "unreadable"
"""Versions of files that are not understood: opening them tells why."""


class FileSystem(Protocol):
    """What is used of an fsspec file system."""

    protocol: str | tuple[str, ...]
    async_impl: bool
    loop: Any

    def ls(self, path: str, detail: bool) -> list[dict[str, Any]]: ...
    def info(self, path: str) -> dict[str, Any]: ...
    def open(self, path: str, mode: str) -> BinaryIO: ...
    def invalidate_cache(self) -> None: ...
    def _strip_protocol(self, path: str) -> str: ...


class Storage:
    """The files below a URL. Names are relative to it. Threads may share it; it pickles without its connections.

    location: the URL without secrets; where a custom endpoint is named, with it.
    """

    def __init__(self, options: PlaceOptions, url: str | None = None) -> None:
        self._options = options
        self._url = url or options.path
        redaction = Redaction(self._url)
        self.location = redaction.location
        endpoint = options.storage_options.get("endpoint_url")
        if isinstance(endpoint, str):
            scheme, _, rest = self.location.partition("://")
            self.location = f"{scheme}+{Redaction(endpoint).location}/{rest}"
        self.attempts = Attempts(options.retries, options.timeout, redaction)
        self._lock = Lock()
        self._opened: tuple[FileSystem, str] | None = None
        self._query = urlsplit(self._url).query if self._web else ""

    def __reduce__(self) -> tuple[type[Storage], tuple[PlaceOptions, str]]:
        return type(self), (self._options, self._url)

    @property
    def _web(self) -> bool:
        return self._url.startswith(("http://", "https://"))

    def refs(self) -> Iterator[SourceRef]:
        """Every file below, sorted by name: one page, or one folder, is held at a time. Raises StorageError."""
        system, root = self._system()
        if hasattr(system, "call_s3") and "s3" in _protocols(system):
            yield from self._s3_pages(system, root)
            return
        levels = [self._level(system, "")]
        while levels:
            entry = next(levels[-1], None)
            if entry is None:
                levels.pop()
            elif entry.id.endswith("/"):
                if len(levels) == _DEEPEST:
                    raise StorageError(f"{entry.id} is folder in folder {_DEEPEST} deep: does a link lead back?")
                levels.append(self._level(system, entry.id))
            else:
                yield entry

    def ref(self, name: str) -> SourceRef:
        """One file. Raises StorageError."""
        system, _ = self._system()
        path = self._path(name)
        ask = partial(call, system, "info", path, timeout=self._options.timeout)
        return _ref(name, self._attempts(name)(ask))

    def look_up(self, names: Iterable[str]) -> Iterator[SourceRef | StorageError]:
        """Each file's ref or why there is none, in order; many are asked for at once where the file system can."""
        system, _ = self._system()
        remaining = iter(names)
        while several := list(islice(remaining, _AT_ONCE)):
            for name, found in zip(several, self._infos(system, several), strict=True):
                yield found if isinstance(found, StorageError) else _ref(name, found)

    def open(self, ref: SourceRef) -> BinaryIO:
        """A seekable file. Raises StorageError."""
        size = ref.size
        if size == 0 or ref.version in (_UNKNOWN, _UNREADABLE):
            now = self.ref(ref.id)
            if now.version == _UNKNOWN:
                raise StorageError("the server does not tell the file's size")
            size = now.size
        return self.section(ref.id, 0, size)

    def section(self, name: str, start: int, size: int) -> BinaryIO:
        """`size` bytes of a file from `start`, as a seekable file. Raises StorageError."""
        system, _ = self._system()
        fetch = Ranges(system, self._path(name), self._attempts(name))
        return cast("BinaryIO", io.BufferedReader(RemoteFile(fetch, size, start), _READ))

    def _system(self) -> tuple[FileSystem, str]:
        """The file system, of this place's own, and the path of the place in it. Raises StorageError."""
        with self._lock:
            if self._opened is None:
                self._opened = self.attempts(self._connect)
            return self._opened

    def _connect(self) -> tuple[FileSystem, str]:
        from fsspec.core import url_to_fs

        # fsspec would otherwise share one instance with all that ask alike, and this one is changed below.
        options: dict[str, Any] = {**self._options.storage_options, "skip_instance_cache": True}
        if self._url.startswith(("s3://", "s3a://")):
            options["config_kwargs"] = {
                "connect_timeout": self._options.timeout,
                "read_timeout": self._options.timeout,
                "retries": {"total_max_attempts": 1},  # no tries of botocore's own within one of ours
                **options.get("config_kwargs", {}),
            }
        url = self._url.partition("?")[0].partition("#")[0] if self._web else self._url
        system, root = url_to_fs(url, **options)
        if hasattr(system, "call_s3"):
            system.retries = 1  # tries: this module counts them
        return cast("FileSystem", system), str(root).rstrip("/")

    def _path(self, name: str) -> str:
        """A file's or folder's path in the file system. A name may be a URL of the same storage."""
        system, root = self._system()
        if is_url(name):
            return str(system._strip_protocol(name))
        if not self._web:
            return f"{root}/{name}" if name else root
        path = f"{root}/{quote(name)}"
        return f"{path}?{self._query}" if self._query else path

    def _attempts(self, name: str) -> Attempts:
        """A name that is a URL may hold secrets of its own."""
        return replace(self.attempts, redaction=Redaction(name)) if is_url(name) else self.attempts

    def _ask(self, system: FileSystem, method: str, *arguments: Any, **named: Any) -> Any:
        return self.attempts(lambda: call(system, method, *arguments, timeout=self._options.timeout, **named))

    def _level(self, system: FileSystem, folder: str) -> Iterator[SourceRef]:
        """What a folder holds, sorted as ids are; folders end in "/". Raises StorageError."""
        path = self._path(folder)
        listed = self._ask(system, "ls", path if self._web else path.rstrip("/") or path, detail=True)
        system.invalidate_cache()  # fsspec keeps all that it has listed
        if (
            not folder
            and [info.get("type") for info in listed] == ["file"]
            and not self._name(str(listed[0]["name"]), "")
        ):
            raise StorageError("it is a file, not a folder")
        found: dict[str, Mapping[str, Any]] = {}
        for info in listed:
            name = self._name(str(info["name"]), folder)
            if name:
                found[folder + name + ("/" if info.get("type") == "directory" else "")] = info
        sizeless = [name for name, info in found.items() if info.get("size") is None and not name.endswith("/")]
        details = dict(zip(sizeless, self.look_up(sizeless), strict=True))
        for name, info in sorted(found.items()):
            known = details.get(name)
            if isinstance(known, StorageError):
                yield SourceRef(name, 1, _UNREADABLE)
            else:
                yield known or _ref(name, info)

    def _name(self, path: str, folder: str) -> str:
        """An entry's own name in its folder; "" for what is no entry of it: the folder itself, links to elsewhere."""
        asked = self._path(folder)
        starts = {
            f"{asked.partition('?')[0].strip('/')}/",
            f"{asked.strip('/')}/",
        }  # fsspec adds links to a URL's query
        path = path.lstrip("/")
        start = max((start for start in starts if path.startswith(start)), key=len, default=None)
        if start is None:
            return ""
        name = path[len(start) :].rstrip("/")
        if "/" in name or name in (".", "..") or (self._web and ("?" in name or "#" in name)):
            return ""
        return unquote(name) if self._web else name

    def _s3_pages(self, system: FileSystem, root: str) -> Iterator[SourceRef]:
        """S3 lists a whole prefix by pages of a thousand, in the order of keys. Raises StorageError."""
        bucket, _, key = root.partition("/")
        prefix = f"{key}/" if key else ""
        token: dict[str, str] = {}
        last = ""
        while True:
            page = self._ask(system, "call_s3", "list_objects_v2", Bucket=bucket, Prefix=prefix, **token)
            for info in page.get("Contents", ()):
                name = str(info["Key"])[len(prefix) :]
                if name < last:
                    raise StorageError(
                        "it lists its files in no order, as S3 directory buckets do; copy them elsewhere"
                    )
                last = name
                if name and not name.endswith("/"):
                    yield _ref(name, {**info, "size": info["Size"]})
            if not page.get("IsTruncated"):
                break
            token = {"ContinuationToken": page["NextContinuationToken"]}
        if not last and prefix and not page.get("Contents"):
            raise StorageError("no key starts with it", missing=True)

    def _infos(self, system: FileSystem, names: list[str]) -> list[dict[str, Any] | StorageError]:
        paths = [self._path(name) for name in names]
        if not system.async_impl:
            return [self._info(name, partial(system.info, path)) for name, path in zip(names, paths, strict=True)]
        import asyncio

        async def all_of(paths: list[str]) -> list[Any]:
            asked = (asyncio.wait_for(cast("Any", system)._info(path), self._options.timeout) for path in paths)
            return await asyncio.gather(*asked, return_exceptions=True)

        from fsspec.asyn import sync

        # All at once for the first try; what fails is asked again by itself.
        first = sync(system.loop, all_of, paths)
        return [
            answer if isinstance(answer, dict) else self._info(name, partial(self._again, system, path))
            for name, path, answer in zip(names, paths, first, strict=True)
        ]

    def _again(self, system: FileSystem, path: str) -> dict[str, Any]:
        return cast("dict[str, Any]", call(system, "info", path, timeout=self._options.timeout))

    def _info(self, name: str, ask: Callable[[], dict[str, Any]]) -> dict[str, Any] | StorageError:
        try:
            return self._attempts(name)(ask)
        except StorageError as error:
            return error


class Ranges:
    """Reads ranges of one file; a connection that drops is made again where it broke off. Raises StorageError."""

    def __init__(self, system: FileSystem, path: str, attempts: Attempts) -> None:
        self._system, self._path, self._attempts = system, path, attempts
        self._file: BinaryIO | None = None

    def __call__(self, start: int, end: int) -> bytes:
        parts: list[bytes] = []
        at = start
        while at < end:
            part = self._attempts(partial(self._some, at, end), failed=self._drop)
            if len(part) > end - at:
                raise StorageError("the server sends whole files where a part is asked for (it knows no ranges)")
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _some(self, start: int, end: int) -> bytes:
        """At least one byte."""
        if self._system.async_impl:
            part = call(self._system, "cat_file", self._path, timeout=self._attempts.timeout, start=start, end=end)
        else:
            if self._file is None:
                self._file = self._system.open(self._path, "rb")
            self._file.seek(start)
            part = self._file.read(end - start)
        if not part:
            raise OSError(f"it ends at byte {start}, before its listed size")
        return bytes(part)

    def _drop(self) -> None:
        self._file = None


def call(system: FileSystem, method: str, *arguments: Any, timeout: float, **named: Any) -> Any:
    """A method of a file system, with a limit on its time where it is asynchronous inside."""
    if not system.async_impl:
        return getattr(system, method)(*arguments, **named)
    from fsspec.asyn import sync

    return sync(system.loop, getattr(system, f"_{method}"), *arguments, timeout=timeout, **named)


def _protocols(system: FileSystem) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _ref(name: str, info: Mapping[str, Any]) -> SourceRef:
    """Version: the storage's own tag, or time of change, of a file."""
    size = info.get("size")
    if not isinstance(size, int):
        return SourceRef(name, 1, _UNKNOWN)  # 0 bytes would be told as an empty file, unopened by a decoder
    version = next((f"{key} {info[key]}" for key in _VERSION_KEYS if info.get(key)), "")
    return SourceRef(name, size, version)
