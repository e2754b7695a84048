"""What encoders of regularizers' features take in memory, in training and while they fill the cache: arithmetic. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vtrain.contract import ClipShape, EncoderMemory, FeatureSource

FLOAT_FRAME, BYTE_FRAME = 12, 3
"""Bytes of a pixel of a frame, in fp32 and as it was decoded."""


@dataclass(frozen=True)
class Teacher:
    """The encoder of a regularizer. features: where they come from (Needs.features). clips: how many it takes at once.

    memory: of that many; None: not known. frames: for each of a clip's, those that stand for tokens. features_bytes: of a clip.
    """

    name: str
    features: FeatureSource
    clips: int
    memory: EncoderMemory | None
    frames: float
    features_bytes: int

    @property
    def online(self) -> bool:
        """Whether it runs at each step."""
        return self.features != "cached"

    @property
    def why_not(self) -> str:
        """What of it is not known; "" for nothing."""
        known = self.memory is not None and self.memory.encode is not None
        return "" if known else f"the encoder of features of {self.name}"

    def work(self, clip: ClipShape) -> int:
        """Bytes of features being made from the source's frames: these, on the device, and what the encoder computes."""
        frames = self.clips * self.frames * clip.frames * clip.height * clip.width
        return int((FLOAT_FRAME + BYTE_FRAME) * frames + self.encoding(clip))

    def encoding(self, clip: ClipShape) -> float:
        return self.memory.encode.of(clip) if self.memory is not None and self.memory.encode is not None else 0.0

    def decoded_work(self, clip: ClipShape, codec: EncoderMemory | None) -> int:
        """The same from latents: a clip is decoded, those of its frames that are seen are taken out of it and encoded."""
        decoding = codec.decode.of(clip) if codec is not None and codec.decode is not None else 0.0
        pixels = clip.frames * clip.height * clip.width
        return int(max(decoding, FLOAT_FRAME * (1 + self.frames) * pixels + self.encoding(clip)))


def resident(teachers: Sequence[Teacher], codec: EncoderMemory | None) -> int:
    """Bytes of weights that are there from the first step to the last. One codec, all of it, serves all that decode."""
    weights = sum(each.memory.weights for each in teachers if each.online and each.memory is not None)
    decoding = any(each.features == "decoded" for each in teachers)
    return weights + (codec.weights if decoding and codec is not None else 0)


def at_work(teachers: Sequence[Teacher], clip: ClipShape | None, codec: EncoderMemory | None) -> int:
    """Bytes of work at the end of the forward pass, where teachers run one after the other."""
    if clip is None:
        return 0
    return max(
        (each.decoded_work(clip, codec) if each.features == "decoded" else each.work(clip)
         for each in teachers if each.online), default=0,
    )  # fmt: skip


def given(teachers: Sequence[Teacher], clip: ClipShape | None) -> int:
    """Bytes of a clip beside its latents that wait for their step on the host: cached features, or frames as they were decoded."""
    cached = sum(each.features_bytes for each in teachers if not each.online)
    frames = max((each.frames for each in teachers if each.features == "source"), default=0.0)
    area = clip.frames * clip.height * clip.width if clip is not None else 0
    return cached + int(BYTE_FRAME * frames * area)


def unknown(teachers: Sequence[Teacher], codec: EncoderMemory | None) -> Iterator[str]:
    """What of those that run at each step is not in these numbers."""
    for each in teachers:
        if each.online and each.why_not:
            yield each.why_not
        if each.features == "decoded" and (codec is None or codec.decode is None):
            yield f"the video codec that decodes for {each.name}"
