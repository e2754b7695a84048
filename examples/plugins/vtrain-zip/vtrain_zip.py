"""`zip`: clips and captions in a zip archive, opened where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, cast
from zipfile import BadZipFile, ZipFile, ZipInfo

from vtrain.contract import DataBackendSpec, DataError, LocalPath, Options, Problem, SourceRef, fixed, hookimpl


class ZipOptions(Options):
    """Options of `zip`."""

    path: LocalPath = fixed(description="the archive; a relative path starts at the configuration file")


class ZipPlace:
    """The backend. Nothing of the archive stays open or in memory: threads and copies in other processes need not agree."""

    def __init__(self, options: ZipOptions) -> None:
        self.location = str(options.path)

    def refs(self) -> Iterator[SourceRef]:
        """A file's version is its checksum: an archive that is packed again has new versions of what changed alone."""
        try:
            with ZipFile(self.location) as archive:
                found = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        except (OSError, BadZipFile) as error:
            remedy = "Correct [[data]] path: it names a zip archive."
            raise DataError(Problem(self.location, f"cannot be read: {error}.", remedy)) from error
        for name, info in sorted(found.items()):
            if name.startswith("/") or ".." in name.split("/"):
                raise DataError(Problem(self.location, f'"{name}" leads out of the archive.', "Pack it again."))
            yield SourceRef(name, info.file_size, version(info))

    def open(self, ref: SourceRef) -> BinaryIO:
        """Each file has a handle of its own, which outlives the archive's. Raises OSError."""
        try:
            with ZipFile(self.location) as archive:
                info = archive.getinfo(ref.id)
                if version(info) != ref.version:
                    raise OSError("it has changed since it was listed")
                return cast(BinaryIO, archive.open(info))
        except KeyError as error:
            raise FileNotFoundError(2, "it is not in the archive any more", ref.id) from error
        except (BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged, of an odd method, with a password
            raise OSError(str(error)) from error


def version(info: ZipInfo) -> str:
    return f"{info.CRC:08x}"


@hookimpl
def vtrain_data_backends() -> tuple[DataBackendSpec, ...]:
    return (DataBackendSpec("zip", "clips in a zip archive", ZipOptions, ZipPlace),)
