"""What was written is what was trained: sums of the tensors that were gathered, compared with those of the bytes on the disk.

A new checkpoint is read once for the hashes of its manifest; the sums are taken from the same bytes. They go by content, for a
family stores weights under names of its own.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vtrain.contract.weights import StoredTensor, stored_tensors

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 22

Sum = tuple[int, int]
"""Of a tensor: its bytes, how many and their CRC-32."""

Sums = Counter[Sum]
"""Of many tensors -> how many have it."""


@runtime_checkable
class ReadBack(Protocol):
    """A piece of what is trained, whose tensors lie on the disk as they were gathered. What differs makes no checkpoint."""

    def remarks(self, folder: Path) -> Iterable[str]:
        """What is to be said of what was written there, such as an adapter that changes nothing."""
        ...


def sums_of(tensors: Mapping[str, Tensor]) -> Sums:
    """Of what was gathered."""
    import torch

    found: Sums = Counter()
    for value in tensors.values():
        data = memoryview(value.reshape(-1).view(torch.uint8).numpy().data)
        found[data.nbytes, zlib.crc32(data)] += 1
    return found


def read_through(path: Path, *, sums: bool = False) -> tuple[str, Sums]:
    """sha256 of a file, and with `sums` those of its tensors if it is one of safetensors. It is read once."""
    digest, found = hashlib.sha256(), Counter[Sum]()
    waiting = iter(_spans(path) if sums and path.suffix == ".safetensors" else ())
    span, crc, at = next(waiting, None), 0, 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
            start, view = at, memoryview(block)
            at += len(block)
            while span is not None and span[0] <= at:
                crc = zlib.crc32(view[max(span[0] - start, 0) : span[1] - start], crc)
                if span[1] > at:
                    break
                found[span[1] - span[0], crc] += 1
                span, crc = next(waiting, None), 0
    return digest.hexdigest(), found


def _spans(path: Path) -> list[tuple[int, int]]:
    """Where each tensor lies in the file, in order; [] for what is no file of safetensors."""
    try:
        tensors: Iterable[StoredTensor] = stored_tensors(path).values()
    except ValueError:
        return []
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
    return [(begin + tensor.begin, begin + tensor.end) for tensor in tensors]


def difference(gathered: Sums, files: Iterable[Sums]) -> int:
    """How many tensors are in the files with other content. 0 for a family that stores them in another form, which says nothing."""
    written: Sums = sum(files, Counter())
    sizes: Counter[int] = Counter()
    for (size, _), count in gathered.items():
        sizes[size] += count
    for (size, _), count in written.items():
        sizes[size] -= count
    return (gathered - written).total() if all(left <= 0 for left in sizes.values()) else 0


def remarks(folder: Path, pieces: Iterable[object]) -> list[str]:
    """What pieces have to say of what was written."""
    return [text for piece in pieces if isinstance(piece, ReadBack) for text in piece.remarks(folder)]
