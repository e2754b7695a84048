"""What a family says of its text before any of it is encoded: its encoders, and the named parts that each gives. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vtrain.contract.protocols import DType, HashFile, TextEncoder
from vtrain.contract.records import Text, TextPart
from vtrain.contract.weights import torch_type

if TYPE_CHECKING:
    from torch import Tensor

Padding = Literal["longest", "full"]


@dataclass(frozen=True)
class TextPartSpec:
    """A part of encoded text.

    width: D of its embeddings. tokens: the most that a caption has, which the encoder cuts to; None: a pooled vector.
    dtype: the storage type in which the encoder gives it.
    padding: "longest": to the longest of the batch, with a mask, and what is masked changes no prediction. "full": always
    to `tokens`, with zeros, and without a mask: what is behind the text is a part of it.
    """

    width: int
    tokens: int | None
    padding: Padding = "longest"
    dtype: DType = "fp32"

    @property
    def shape(self) -> tuple[int, ...]:
        """The largest that it is for one caption: (tokens, width), pooled (width,)."""
        return (self.width,) if self.tokens is None else (self.tokens, self.width)

    def fault(self, part: TextPart, captions: int) -> str:
        """Why a part of so many captions, as an encoder gives it, is none that is promised here; "" if it is one."""
        import torch

        found, mask = part.embeds.shape, part.mask
        if found[:1] != (captions,) or not self._fits(found[1:]):
            within = "" if self.tokens is None else f"1 to {self.tokens}, "
            return f"is {tuple(found)} where ({captions}, {within}{self.width}) is promised"
        if part.embeds.dtype is not torch_type(self.dtype):
            return f"is {str(part.embeds.dtype).removeprefix('torch.')} where {self.dtype} is promised"
        if self.tokens is None:
            return "" if mask is None else "is a pooled vector and has a mask"
        if mask is None or mask.dtype is not torch.bool or mask.shape != found[:2]:
            return f"has no mask of bool {tuple(found[:2])}"
        return ""

    def holds(self, embeds: Tensor) -> bool:
        """Whether these can be the embeddings of one caption: its real tokens (L, D), pooled (D,)."""
        return self._fits(embeds.shape) and embeds.dtype is torch_type(self.dtype)

    def _fits(self, found: Sequence[int]) -> bool:
        """Whether embeddings of one caption have a shape that is promised."""
        if self.tokens is None:
            return found == (self.width,)
        return len(found) == 2 and 1 <= found[0] <= self.tokens and found[1] == self.width


@dataclass(frozen=True)
class TextEncoderSpec:
    """One of a family's text encoders.

    parts: what it gives, by names that no other encoder of the family uses. fingerprint: of HashFile; changes when, and only
    when, what it gives would: weights, config, tokenizer, instruction, storage type. open: *torch*, of a device; loads the
    encoder for the length of a with block, and its memory is free afterwards. A run never has two open together.
    """

    parts: Mapping[str, TextPartSpec]
    fingerprint: Callable[[HashFile], str]
    open: Callable[[str], AbstractContextManager[TextEncoder]]

    def faults(self, text: Text, captions: int) -> Iterator[str]:
        """What of the encoded text of so many captions is not as promised: 'the part "text" is ...'."""
        for name in sorted(self.parts.keys() ^ text.parts.keys()):
            yield f'the part "{name}" is {"missing" if name in self.parts else "not declared"}'
        for name, spec in self.parts.items():
            if name in text.parts and (fault := spec.fault(text.parts[name], captions)):
                yield f'the part "{name}" {fault}'
