"""What was written is what was trained: sums of the tensors that were gathered, compared with those of the bytes on the disk.

A new checkpoint is read once for the hashes of its manifest; the sums are taken from the same bytes. They go by content, for a
family stores weights under names of its own. Where it stores them in another form, too, what it reads of them is compared.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vtrain.contract import VtrainError
from vtrain.contract.weights import StoredTensor, stored_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 1 << 22

Sum = tuple[int, int]
"""Of a tensor: its bytes, how many and their CRC-32."""

Sums = Counter[Sum]
"""Of many tensors -> how many have it."""

Marks = Mapping[str, "tuple[Sum, torch.dtype]"]
"""Of what was gathered: name of a tensor -> its sum, and its type."""


@runtime_checkable
class ReadBack(Protocol):
    """A piece of what is trained. What of it is not on the disk as it was gathered makes no checkpoint."""

    @property
    def name(self) -> str:
        """As `Piece.name`."""
        ...

    @property
    def cheap(self) -> bool:
        """Whether its files are read again by name each time, as an adapter's; a whole model's are where contents differ."""
        ...

    def reread(self, folder: Path) -> Mapping[str, Tensor]:
        """What it wrote there, as a resumed run reads it, under the names of what it gathers. Raises what its `load` does."""
        ...

    def remarks(self, folder: Path) -> Iterable[str]:
        """What is to be said of what was written there, such as an adapter that changes nothing."""
        ...


def marks_of(tensors: Mapping[str, Tensor]) -> Marks:
    """Of what was gathered."""
    return {name: (_sum_of(value), value.dtype) for name, value in tensors.items()}


def _sum_of(value: Tensor) -> Sum:
    """Of a tensor on the CPU."""
    import torch

    data = memoryview(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return data.nbytes, zlib.crc32(data)


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


class ReloadNeeded(Exception):
    """A whole model has to be loaded to compare it with what was gathered."""


def fault_of(folder: Path, piece: ReadBack, gathered: Marks, files: Iterable[Sums], *, reload: bool = True) -> str:
    """What of a piece is not in `folder` as it was gathered: absent, rounded, or with other content; "" if all of it is.

    files: sums of those that it wrote. A type that holds the same numbers is no difference: bf16 may be read as fp32. reload:
    whether a model may be loaded; raises ReloadNeeded where it may not and has to be.
    """
    wanted = Counter(mark for mark, _ in gathered.values())
    if not piece.cheap and not wanted - sum(files, Counter()):
        return ""
    if not piece.cheap and not reload:
        raise ReloadNeeded
    try:
        found = piece.reread(folder)
    except VtrainError as error:
        return f"what was written of {piece.name} cannot be read back: {error.problems[0].what.rstrip('.')}"
    odd = [
        name for name, (mark, dtype) in gathered.items() if name not in found or _sum_of(found[name].to(dtype)) != mark
    ]
    if not odd:
        return ""
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    return f"{', '.join(odd[:3])}{more} of {piece.name} cannot be read back as trained"


def remarks(folder: Path, pieces: Iterable[object]) -> list[str]:
    """What pieces have to say of what was written."""
    return [text for piece in pieces if isinstance(piece, ReadBack) for text in piece.remarks(folder)]
