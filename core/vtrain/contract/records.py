"""What flows between core and parts: frozen records, tensor shapes in their docstrings. Nothing here imports torch.

B clips in a batch, C latent channels, f h w latent frames, height and width, L text tokens, D a width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from vtrain.contract.geometry import ClipShape
    from vtrain.contract.protocols import Family

Role = Literal["prompt", "negative", "dropped"]

FeatureSource = Literal["cached", "decoded", "source"]


@dataclass(frozen=True)
class Caption:
    """A caption as the user wrote it. extras: of the clip, by name, as the family declares them (CaptionExtra)."""

    text: str
    extras: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class TextPart:
    """One part of encoded captions (TextPartSpec says which).

    Tokens: embeds (B, L, D) floating, mask (B, L) bool, True for real tokens, which come first. Padded in full, as the
    denoiser gets it: embeds (B, tokens, D), zero behind the real ones, mask None. Pooled: embeds (B, D), mask None.
    """

    embeds: Tensor
    mask: Tensor | None = None

    @property
    def masked(self) -> tuple[Tensor, Tensor]:
        """(embeds, mask) of tokens. Raises ValueError for a part without a mask."""
        if self.mask is None:
            raise ValueError("this part of the text has no mask: it is pooled, or padded in full")
        return self.embeds, self.mask


@dataclass(frozen=True)
class Text:
    """Encoded captions, in named parts: those of one encoder as it gives them, of all encoders as a denoiser gets them."""

    parts: Mapping[str, TextPart]

    @classmethod
    def of(cls, embeds: Tensor, mask: Tensor | None, name: str = "text") -> Text:
        """Of one part."""
        return cls({name: TextPart(embeds, mask)})

    @property
    def only(self) -> TextPart:
        """The only part. Raises ValueError if there are several."""
        if len(self.parts) != 1:
            raise ValueError(f"the text has {len(self.parts)} parts ({', '.join(self.parts)}), not one")
        return next(iter(self.parts.values()))

    def map(self, change: Callable[[Tensor], Tensor]) -> Text:
        """The same parts, each of their tensors changed."""
        return Text(
            {
                name: TextPart(change(part.embeds), None if part.mask is None else change(part.mask))
                for name, part in self.parts.items()
            }
        )


@dataclass(frozen=True)
class Latents:
    """Encoded clips, normalised as the denoiser takes them.

    mean (B, C, f, h, w): the posterior mode. std, same shape: given when asked, for a fresh draw each use.
    """

    mean: Tensor
    std: Tensor | None = None


@dataclass(frozen=True)
class NoiseLevel:
    """How noisy each clip is.

    sigma: (B,) or, per latent frame, (B, f); float32 in [0, 1], 0 is clean and 1 is noise.
    timestep: same shape; the number that the denoiser is given for it, in the family's own unit. None: not known yet, as
    samplers give it whose spec names no family (SamplerSpec.timesteps_of); `timed` fills it in.
    """

    sigma: Tensor
    timestep: Tensor | None = None


@dataclass(frozen=True)
class TokenBytes:
    """Bytes kept for the backward pass, for each token of a clip. block: by each block; outside: beside the blocks."""

    block: float
    outside: float


@dataclass(frozen=True)
class BlockMemory:
    """What full training of a denoiser keeps for the backward pass; an adapter's keeps a little less.

    plain: as it is. checkpointed: with gradient checkpointing, where one block at a time keeps `plain.block` besides.
    working: bytes for each token of a forward pass without gradients, at its peak; 0: not measured. feed_forward: with the
    feed-forward layer of each block checkpointed alone; None: not measured.
    """

    plain: TokenBytes
    checkpointed: TokenBytes
    working: float = 0.0
    feed_forward: TokenBytes | None = None

    def kept(self, tokens: int, blocks: int, *, checkpointing: bool) -> float:
        """Bytes for a clip of so many tokens."""
        if checkpointing:
            return tokens * (self.checkpointed.outside + blocks * self.checkpointed.block + self.plain.block)
        return tokens * (self.plain.outside + blocks * self.plain.block)


@dataclass(frozen=True)
class ClipBytes:
    """Bytes for a clip: for each pixel of a picture's area, and for each pixel of all its frames."""

    area: float
    pixel: float

    def of(self, clip: ClipShape) -> float:
        return clip.height * clip.width * (self.area + self.pixel * clip.frames)


@dataclass(frozen=True)
class EncoderMemory:
    """What a model beside the denoiser takes. weights: bytes. encode, decode: what it computes, at its peak; None: not measured."""

    weights: int
    encode: ClipBytes | None = None
    decode: ClipBytes | None = None


def timed(family: Family, level: NoiseLevel) -> NoiseLevel:
    """The same level with its timestep: the sampler's own where it gave one, else the family's. *torch*"""
    return replace(level, timestep=family.timestep(level.sigma)) if level.timestep is None else level


def timesteps(level: NoiseLevel) -> Tensor:
    """The timesteps of a level that has them, as each has that a denoiser is given. Raises ValueError for one without."""
    if level.timestep is None:
        raise ValueError("a level without timesteps: `timed` gives it the family's own")
    return level.timestep


def with_clean(family: Family, level: NoiseLevel, clean: Tensor) -> NoiseLevel:
    """A level for each latent frame: 0, with the family's timestep for it, where clean (B, f) bool says so. *torch*

    level: (B,), (B, f), or (B, g) of the last g frames alone where those before them are clean.
    """
    zero = level.sigma.new_zeros(1)
    times = timesteps(timed(family, level))
    return NoiseLevel(_by_frame(level.sigma, clean, zero), _by_frame(times, clean, family.timestep(zero)))


def _by_frame(values: Tensor, clean: Tensor, of_clean: Tensor) -> Tensor:
    """Levels or timesteps as `with_clean` takes them -> (B, f), `of_clean` (1,) where clean."""
    frames = clean.shape[1]
    each = values[:, None].expand(-1, frames) if values.ndim == 1 else values
    whole = of_clean.expand(len(each), frames).clone()
    whole[:, frames - each.shape[1] :] = each
    return whole.where(~clean, of_clean)


@dataclass(frozen=True)
class Condition:
    """All that a denoiser is conditioned on. extras: every tensor of the family's conditions (ConditionSpec) by name, B first."""

    text: Text
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RunLength:
    """How long a run is. steps: optimizer steps in all. per_epoch: optimizer steps in an epoch, not whole in general."""

    steps: int
    per_epoch: float


@dataclass(frozen=True)
class StepView:
    """What a regularizer sees of one training step.

    clean, noise, noisy, target, prediction: (B, C, f, h, w). level: the step's noise. Of clips that were rolled out (train.rollout)
    noisy is not made of noise alone: the denoiser made it.
    taps: block number -> that block's output folded to (B, f, h, w, D), in the graph. step: optimizer steps done so far;
    run: how long the run is. mask: (B, f, h, w) fp32 in [0, 1], how much each latent counts in the flow loss; None: all
    count alike. features: what the regularizer asked for (Needs.features): (B, f', h', w', D') of its own encoder, one
    frame for each frame of tokens, in the encoder's own grid and outside the graph; None if it asked for none.
    """

    clean: Tensor
    noise: Tensor
    noisy: Tensor
    target: Tensor
    prediction: Tensor
    level: NoiseLevel
    condition: Condition
    taps: Mapping[int, Tensor]
    step: int
    run: RunLength
    mask: Tensor | None = None
    features: Tensor | None = None


@dataclass(frozen=True)
class LossTerm:
    """A regularizer's share of the loss. value: scalar tensor, weight already applied, added to the flow loss.

    metrics: detached scalar tensors to log, by short name.
    """

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What a regularizer asks of a step.

    taps: zero-based numbers of the blocks whose output it reads. features: where the features of the clean frames come
    from, which its own encoder makes (SupportsFeatures), one frame for each frame of tokens: "cached": once for each clip
    and window, kept on the disk; "decoded": at each step, from the clean latents as the codec decodes them; "source": at
    each step, from the source's own frames; None: there are none. decoder_only: of the codec that "decoded" keeps in
    memory, only what decodes.
    """

    taps: tuple[int, ...] = ()
    features: FeatureSource | None = None
    decoder_only: bool = False


@dataclass(frozen=True)
class SourceRef:
    """One file of a dataset. id: stable, relative, "/"-separated. size: bytes. version: changes when the file
    does (mtime, etag); it may hold what the backend needs to find the bytes (a tar member's offset)."""

    id: str
    size: int
    version: str


@dataclass(frozen=True)
class Words:
    """What a place says of a clip. texts: its captions, of which each use takes one.

    extras: by name, as they stand there: whether they are what the family declares, core says. where: their place, for
    messages ("clips.csv:12").
    """

    texts: tuple[str, ...]
    extras: Mapping[str, object] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with settings of their own. parameters: (name, parameter) pairs. decay: whether weight decay applies.

    lr_factor: multiplies the optimizer's learning rate.
    """

    parameters: tuple[tuple[str, Tensor], ...]
    decay: bool
    lr_factor: float = 1.0


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of a run at its start. output_dir: an absolute path; step: 0, or where it resumes."""

    name: str
    output_dir: str
    config: Mapping[str, object]
    step: int
