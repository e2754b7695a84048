"""An entry of encoded text: the parts that one encoder gives of one caption, its real tokens alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from vtrain.contract import Text, TextEncoderSpec, TextPart
from vtrain.registry.blame import PartFault

ONLY = "embeds"
"""The tensor of an encoder with one part, whatever that is called; of several, each has its part's name."""


def tensors_of(name: str, spec: TextEncoderSpec, text: Text, captions: int) -> Iterator[dict[str, Tensor]]:
    """What is stored of each caption: (L, D), pooled (D,). name: the encoder's.

    Raises PartFault, which names encoder and part, for text of other parts, shapes or types than the encoder promises.
    """
    if not isinstance(text, Text):
        refuse(name, f"encode gave a {type(text).__name__}, not a Text")
    for fault in spec.faults(text, captions):
        refuse(name, fault)
    lengths = {part: _lengths(name, part, each.mask) for part, each in text.parts.items()}
    for row in range(captions):
        yield {
            _stored(spec, part): each.embeds[row]
            if (counts := lengths[part]) is None
            else each.embeds[row, : counts[row]]
            for part, each in text.parts.items()
        }


def _lengths(name: str, part: str, mask: Tensor | None) -> Sequence[int] | None:
    """The number of real tokens of each caption; None of a pooled part. Raises PartFault."""
    if mask is None:
        return None
    mask = mask.cpu()
    counts = mask.sum(dim=1)
    if not torch.equal(mask, torch.arange(mask.shape[1]) < counts[:, None]):
        refuse(name, f'the real tokens of the part "{part}" do not come first')
    if not counts.all():
        refuse(name, f'a caption has no real token of the part "{part}"')
    found: list[int] = counts.tolist()
    return found


def parts_of(name: str, spec: TextEncoderSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An entry's tensors by their parts: (L, D) and pooled (D,). name: the encoder's.

    Raises PartFault if they are not what the encoder promises, which then changed without its fingerprint.
    """
    found = {}
    for part, each in spec.parts.items():
        stored = tensors.get(_stored(spec, part))
        if stored is None:
            refuse(name, f'the part "{part}" is missing in its cache entry, and its fingerprint is that of before')
        if not each.holds(stored):
            refuse(name, f'the part "{part}" {each.fault(TextPart(stored[None]), 1)}')
        found[part] = stored
    return found


def _stored(spec: TextEncoderSpec, part: str) -> str:
    return ONLY if len(spec.parts) == 1 else part


def refuse(encoder: str, fault: str) -> NoReturn:
    raise PartFault("family", "", f'the text encoder "{encoder}": {fault}')
