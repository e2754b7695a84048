"""Data backend "tar": webdataset shards, plain tar files, read in place: their headers once, then members where they lie.

Headers are ustar, GNU and pax; Python's tarfile unpacks a block of 512 bytes, and the walk from one to the next is ours. tarfile's
own takes a shard that was cut off in a header or between members for one that ends there (10,005 of 20,000 members, and no error).
A subclass of TarInfo that raises at such headers mends that, in bounded memory too, but tarfile passes over pax records that it
cannot parse: a member then comes under the first 100 bytes of its name, without its suffix, and is no clip any more. fsspec's tar
file system stands on tarfile.

Format: POSIX.1-2017 "pax", Extended Interchange Format; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO, cast

from pydantic import Field, field_validator

from vtrain.contract import DataBackendSpec, DataError, Problem, SourceRef
from vtrain_builtin.files import NamedFiles, expand
from vtrain_builtin.folder import sorted_rows
from vtrain_builtin.place import PlaceOptions, PlacePath
from vtrain_builtin.seekable import FilePart

SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Of files that are looked into; the compressed ones are told, not passed over."""

_READ = 1 << 16
BLOCK = 512
_LONGEST_EXTRA = 1 << 20
"""Bytes of a long name or of pax records."""

_LOOK_AHEAD = 1 << 16
"""Bytes after the end mark that have to be zeros; tar fills up to 10,240."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_FOLDER, _LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"5", b"L", b"K", b"x", b"g"
_PLAIN = (b"0", b"\0", b"7")
_REFUSED = {
    b"1": "is a hard link: links in shards are not followed", b"2": "is a link: links in shards are not followed",
    b"3": "is a device", b"4": "is a device", b"6": "is a pipe", b"S": "is a sparse file: pack it as a plain one",
}  # fmt: skip


class TarOptions(PlaceOptions):
    """Options of the "tar" backend."""

    path: PlacePath = Field(
        min_length=1,
        description='tar files: one, a pattern such as "shards/clips-{000..011}.tar" or "shards/*.tar", or a folder of '
        "them; local, or a URL of fsspec; a relative path starts at the configuration file",
    )

    @field_validator("path")
    @classmethod
    def _few_enough(cls, path: str) -> str:
        expand(path)
        return path


class TarShards:
    """Files in tar files. A member's version says where its bytes are, so that it is opened without reading the index.

    location: the path as it was written, without secrets.
    """

    def __init__(self, options: TarOptions) -> None:
        self._files = NamedFiles(options, SUFFIXES, "tar file")
        self.location = self._files.location

    def shards(self) -> Iterator[SourceRef]:
        """Version: time of change, or the storage's own tag. Raises DataError."""
        return self._files.refs()

    def members(self, shard: SourceRef) -> Iterator[SourceRef]:
        """Sorted by id. What is damaged is a file too, which does not open. Raises OSError."""
        if shard.version == "missing":
            raise FileNotFoundError(2, "there is no such file")
        with self._files.folder.open(shard) as file:
            found = ((f"{shard.id}/{_name(member)}", json.dumps(astuple(member))) for member in members(file))
            for name, rows in groupby(sorted_rows(found), key=itemgetter(0)):
                same = [Member(*json.loads(row)) for _, row in rows]
                member = same[-1]
                if len(same) > 1:
                    member = replace(
                        member, fault=f"the shard holds {len(same)} files of this name: rename all but one"
                    )
                yield SourceRef(name, member.size or int(bool(member.fault)), _version(member, shard))

    def refs(self) -> Iterator[SourceRef]:
        """The members of all shards. Raises DataError."""
        for shard in sorted(self.shards(), key=lambda ref: f"{ref.id}/"):
            try:
                yield from self.members(shard)
            except OSError as error:
                place = f"{self._files.folder.location}/{shard.id}"
                what = f"the shard cannot be read: {error.strerror or error}."
                raise DataError(Problem(place, what, "Fix the file, or remove it from data.path.")) from error

    def open(self, ref: SourceRef) -> BinaryIO:
        """The header before the member is read with it, and has to be the one that was listed. Raises OSError."""
        if ref.version.startswith("!"):
            raise OSError(ref.version[1:].partition("\n")[0])
        match = _SOUND.fullmatch(ref.version)
        if match is None:
            raise FileNotFoundError(2, "no shard holds it")
        start, size, header, length, shard_size = (int(number) for number in match.groups()[:5])
        shard = SourceRef(ref.id[:length], shard_size, match[6])
        file = self._files.folder.section(shard, start - BLOCK, BLOCK + size)
        if zlib.crc32(file.read(BLOCK)) != header:
            file.close()
            raise OSError(f"the shard {shard.id} has changed since it was listed")
        return cast("BinaryIO", io.BufferedReader(FilePart(file, BLOCK, size), _READ))


def _name(member: Member) -> str:
    """A member's name as part of an id: relative, without parts that lead elsewhere."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    return "/".join("%2e%2e" if part == ".." else part for part in parts)


_SOUND = re.compile(r"@(\d+)\+(\d+) (\d+) (\d+) (\d+) (.*)", re.DOTALL)


def _version(member: Member, shard: SourceRef) -> str:
    """Where the bytes are, and the shard's own version; or what is wrong with the member."""
    if member.fault:
        return f"!{member.fault}\n{shard.version}"
    # With the shard's own: the members of a shard that was written again are other files.
    return f"@{member.start}+{member.size} {member.header} {len(shard.id)} {shard.size} {shard.version}"


@dataclass(frozen=True)
class Member:
    """A file in a tar. start: of its bytes; header: CRC-32 of the block before them. fault: why it cannot be read, or ""."""

    name: str
    start: int
    size: int
    header: int
    fault: str = ""


class TarFault(OSError):
    """A file that is no tar that can be read by seeking."""


def members(file: BinaryIO) -> Iterator[Member]:
    """Files in the order of the tar; folders are passed over. Damage ends it with a member that has a fault.

    Raises TarFault if not even the first header is sound, OSError from the file.
    """
    length = file.seek(0, io.SEEK_END)
    at = 0
    extra: dict[str, str] = {}
    while True:
        file.seek(at)
        block = file.read(BLOCK)
        if at == 0:
            _refuse_compressed(block)
        if not block or block == bytes(BLOCK):
            yield from _after_the_end(file, at, bool(block))
            return
        try:
            # As Python gives names of files: bytes that are not UTF-8 become lone surrogates.
            head = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size, name = _size(head.size, extra), extra.pop("path", head.name)
            start = at + BLOCK
            if head.type in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
                _read_extra(file, head.type, head.size, extra)
                at = start + -(-head.size // BLOCK) * BLOCK
                continue
        except (tarfile.HeaderError, ValueError) as error:
            if at == 0:
                raise TarFault(f"it is no tar file: {error}") from error
            yield _damage(at, f"the shard is damaged from byte {at} on: {error}")
            return
        sparse = any(key.startswith("GNU.sparse") for key in extra)
        extra = {}
        at = start + -(-size // BLOCK) * BLOCK
        if head.type == _FOLDER or (head.type in _PLAIN and name.endswith("/")):
            continue
        fault = _REFUSED[b"S"] if sparse else _REFUSED.get(head.type, "")
        if head.type not in _PLAIN and not fault:
            fault = f"is of an unknown kind ({head.type!r})"
        if not fault and start + size > length:
            fault = f"the shard ends in the middle of it: {max(0, length - start):,} of its {size:,} bytes are there"
        yield Member(name, start, size, zlib.crc32(block), fault)
        if start + size > length:
            return


def _damage(at: int, fault: str) -> Member:
    """What stands for files whose names are not known. Its suffix is one of videos: it is opened, and so reported."""
    return Member(f"(damaged from byte {at}).mp4", at, 1, 0, fault)


def _after_the_end(file: BinaryIO, at: int, marked: bool) -> Iterator[Member]:
    """Blocks of zeros end a tar and fill it up; without them it may be cut off, and what follows them is not read."""
    if not marked:
        yield _damage(at, "the shard has no end mark: it may be cut off here")
    elif any(file.read(_LOOK_AHEAD)):
        yield _damage(at, f"the shard continues after its end mark at byte {at}: two tar files in one are not read")


def _refuse_compressed(block: bytes) -> None:
    if not block:
        raise TarFault("it is empty (0 bytes)")
    for magic, name in _COMPRESSED.items():
        if block.startswith(magic):
            raise TarFault(
                f"it is compressed ({name}), and members of such a file cannot be sought: unpack it to a plain tar"
            )


def _size(size: int, extra: dict[str, str]) -> int:
    """A member's size; pax gives it where the header has no room. Raises ValueError."""
    size = int(extra.pop("size", size))
    if size < 0:
        raise ValueError(f"a size of {size} bytes")
    return size


def _read_extra(file: BinaryIO, kind: bytes, size: int, extra: dict[str, str]) -> None:
    """A long name, or pax records, for the member that comes next. Raises ValueError."""
    if not 0 <= size <= _LONGEST_EXTRA:
        raise ValueError(f"a name or record of {size:,} bytes")
    data = file.read(size)
    if len(data) < size:
        raise ValueError("it ends in a header")
    if kind == _LONG_NAME:
        extra["path"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    elif kind == _PAX:
        extra |= _records(data)


def _records(data: bytes) -> dict[str, str]:
    """pax: "<length> <key>=<value>\\n" each. Raises ValueError."""
    found = {}
    while data.strip(b"\0"):
        digits, space, rest = data.partition(b" ")
        length = int(digits)
        record, data = rest[: length - len(digits) - 2], data[length:]
        key, equals, value = record.partition(b"=")
        if not (space and equals) or length <= len(digits) + 2:
            raise ValueError("a pax record that is none")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
    return found


TAR = DataBackendSpec(
    name="tar",
    summary="tar files with videos and captions (webdataset shards), local or through fsspec, read in place",
    options=TarOptions,
    build=TarShards,
)
