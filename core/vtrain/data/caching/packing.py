"""Lossless compression of tensors: zstd, on bytes as they are or sorted by their place in the number, whichever is smaller.

The compressor is the zstandard package. safetensors has no compressed tensors, and Blosc, which sorts bytes too, has a container
of its own instead of a safetensors file that any reader opens. numcodecs' Shuffle sorts to the same bytes, tried; it is 36 MB in
place of one expression of numpy. So the sorting is here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_LEVEL = 3
_MOST = 4 << 30
"""Bytes of the largest tensor that is believed: latents of minutes of video are far below."""

_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1}
"""safetensors' name of a type -> bytes a number."""
_PACKED = re.compile(r"(\w+)=(\w+):((?:\d+,)*\d+):([01])")


@dataclass(frozen=True, slots=True)
class Packed:
    """What a compressed tensor was. dtype: as safetensors names it. shuffled: whether its bytes were sorted by place."""

    dtype: str
    shape: tuple[int, ...]
    shuffled: bool

    @property
    def nbytes(self) -> int:
        """Raises ValueError for a type that is never cached."""
        if self.dtype not in _WIDTHS:
            raise ValueError(f"{self.dtype} is no type of a cached tensor")
        return math.prod(self.shape) * _WIDTHS[self.dtype]


@cache
def dtype_names() -> Mapping[str, Any]:
    """safetensors' names of the types that are cached -> torch's types. Imports torch."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip


def bytes_of(tensor: Tensor) -> Bytes:
    """The bytes of a contiguous tensor on the CPU; they share its memory."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)


def from_bytes(data: Bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that lies in these bytes; it shares their memory."""
    import torch

    of = dtype_names()[dtype]
    return torch.from_numpy(data).view(of).view(shape) if len(data) else torch.empty(shape, dtype=of)


def pack(tensor: Tensor) -> tuple[Packed, Tensor]:
    """A contiguous tensor on the CPU -> what it was, and uint8 (n,)."""
    import torch
    from zstandard import ZstdCompressor

    names = {dtype: name for name, dtype in dtype_names().items()}
    data = bytes_of(tensor)
    compress = ZstdCompressor(_LEVEL).compress
    plain = compress(data.tobytes())
    # All first bytes of the numbers, then all second ones ...: the last ones are noise, which then lies apart.
    shuffled = compress(data.reshape(-1, tensor.element_size()).T.tobytes())
    smaller = min(plain, shuffled, key=len)
    packed = Packed(names[tensor.dtype], tuple(tensor.shape), smaller is shuffled)
    return packed, torch.frombuffer(bytearray(smaller), dtype=torch.uint8)  # torch wants memory that may be written to


def unpack(packed: Packed, data: Bytes) -> Tensor:
    """The tensor again, bit for bit. Raises ValueError if the bytes are not what `packed` says."""
    from zstandard import ZstdDecompressor, ZstdError, frame_content_size

    try:
        if frame_content_size(data.data) != packed.nbytes:  # before anything of that size is allocated
            raise ValueError("it does not unpack to the size that it names")
        raw = ZstdDecompressor().decompress(data.data)
    except ZstdError as error:
        raise ValueError(f"it does not unpack: {error}") from error
    # Read-only, as bytes are; the copy below is not.
    numbers: Bytes = np.frombuffer(raw, dtype=np.uint8)
    width = _WIDTHS[packed.dtype]
    restored = numbers.reshape(width, -1).T.copy() if packed.shuffled else numbers.copy()
    return from_bytes(restored.reshape(-1), packed.dtype, packed.shape)


def words(packed: Mapping[str, Packed]) -> str:
    """One word a tensor, for an entry's stamp: "mean=F32:16,5,8,8:1"."""
    return " ".join(
        f"{name}={each.dtype}:{','.join(map(str, each.shape))}:{int(each.shuffled)}"
        for name, each in sorted(packed.items())
    )


def from_words(text: str) -> dict[str, Packed]:
    """What `words` wrote. Raises ValueError."""
    found = {}
    for word in text.split():
        match = _PACKED.fullmatch(word)
        if match is None:
            raise ValueError("its stamp cannot be read")
        name, dtype, shape, shuffled = match.groups()
        found[name] = Packed(dtype, tuple(map(int, shape.split(","))), shuffled == "1")
        if found[name].nbytes > _MOST:
            raise ValueError("it claims to be larger than any entry is")
    return found
