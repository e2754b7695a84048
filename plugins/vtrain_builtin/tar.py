"""Data backend "tar": webdataset shards, plain tar files, read in place."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import astuple, replace
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO, cast

from pydantic import Field, field_validator

from vtrain.contract import DataBackendSpec, DataError, Problem, SourceRef
from vtrain_builtin.files import NamedFiles, Section
from vtrain_builtin.ordered import sorted_rows
from vtrain_builtin.pattern import expand
from vtrain_builtin.place import PlaceOptions, PlacePath
from vtrain_builtin.tar_index import BLOCK, Member, members

SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Of files that are looked into; the compressed ones are told, not passed over."""

_READ = 1 << 16


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
                raise DataError(Problem(place, what, "Mend the file, or leave it out of data.path.")) from error

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
        return cast("BinaryIO", io.BufferedReader(Section(file, BLOCK, size), _READ))


def _name(member: Member) -> str:
    """A member's name as part of an id: relative, without parts that lead elsewhere."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    return "/".join("%2e%2e" if part == ".." else part for part in parts)


_SOUND = re.compile(r"@(\d+)\+(\d+) (\d+) (\d+) (\d+) (.*)", re.DOTALL)


def _version(member: Member, shard: SourceRef) -> str:
    """Where the bytes are, and the shard's own version; or what is wrong with the member."""
    if member.fault:
        return f"!{member.fault}\n{shard.version}"
    return f"@{member.start}+{member.size} {member.header} {len(shard.id)} {shard.size} {shard.version}"


TAR = DataBackendSpec(
    name="tar",
    summary="tar files with videos and captions (webdataset shards), local or through fsspec, read in place",
    options=TarOptions,
    build=TarShards,
)
