"""What families have measured of models in memory, and what follows for a model between two of them. No torch.

A family's file (memory.json) has, under a model's `memory_key` and then "<weights> <compute> clip", or "frames" with a level for
each latent frame, bytes for a token as `vtrain.testing.memory.block_memory` gave them: of a plain block and outside of blocks, of
a checkpointed block and outside, of a forward pass without gradients, and with feed-forward layers checkpointed of a block and
outside. The last three may be missing. Under a codec's key, by its precision, stands what `codec_memory` gave: encode area and
pixel, decode area and pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vtrain.contract.protocols import DType
from vtrain.contract.records import BlockMemory, ClipBytes, TokenBytes

Measured = Mapping[str, Mapping[str, Sequence[float]]]


def measured_bytes(measured: Measured, key: str, how: str) -> tuple[float, ...] | None:
    """What was measured of a model; of one of another width, on the line through the two that were measured and differ in width
    alone. None where there are no two. key: its width, then all else.

    All that a block keeps is vectors of its width or of a multiple, numbers for each head, and constants: a line fits (a test
    measures widths between).
    """
    width, _, rest = key.partition(" ")
    if key in measured:
        return tuple(measured[key].get(how, ())) or None
    others = sorted((int(name.partition(" ")[0]), found[how]) for name, found in measured.items()
                    if name.partition(" ")[2] == rest and name[0].isdigit() and how in found)  # fmt: skip
    if len(others) < 2 or not width.isdecimal():
        return None
    (low, first), (high, last) = others[0], others[-1]
    share = (int(width) - low) / (high - low)
    return tuple(a + share * (b - a) for a, b in zip(first, last, strict=True))


def measured_blocks(measured: Measured, key: str, how: str) -> BlockMemory | None:
    """Of a denoiser's blocks; None where nobody measured it."""
    found = measured_bytes(measured, key, how)
    if not found:
        return None
    plain, checkpointed, (working, *layers) = found[:2], found[2:4], found[4:] or (0.0,)
    feed_forward = TokenBytes(*layers) if layers else None
    return BlockMemory(TokenBytes(*plain), TokenBytes(*checkpointed), working, feed_forward)


def measured_work(measured: Measured, key: str, precision: DType) -> tuple[ClipBytes, ...]:
    """(encode, decode) of a video codec; () where nobody measured it."""
    work = measured.get(key, {}).get(precision)
    return (ClipBytes(*work[:2]), ClipBytes(*work[2:])) if work else ()


def dtype_bytes(dtype: DType) -> int:
    return 4 if dtype == "fp32" else 2
