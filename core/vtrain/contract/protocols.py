"""What a part must be. Parts subclass nothing: whatever has these members is one.

Objects are built before anything heavy is loaded: building one, and all members not marked *torch*, import no torch.
A new ability is a new `Supports...` protocol found by isinstance; a protocol here is never widened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from vtrain.contract.errors import Problem
from vtrain.contract.events import Event
from vtrain.contract.geometry import ClipShape, FrameRule, LatentShape, Size, TokenGrid
from vtrain.contract.records import (
    BlockMemory,
    Caption,
    Condition,
    EncoderMemory,
    Latents,
    NoiseLevel,
    Role,
    RunInfo,
    Text,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vtrain.contract.text import TextEncoderSpec

HashFile = Callable[[Path], str]
"""Content hash of a file, remembered by path, size and time of change."""

DType = Literal["fp32", "bf16"]
"""Names of storage types in configs and plans."""

Predict = Callable[["Tensor", NoiseLevel], "Tensor"]
"""(noisy (B, C, f, h, w), level) -> prediction of the same shape, guidance included."""


class TextEncoder(Protocol):
    """Captions to embeddings. *torch*"""

    def encode(self, captions: Sequence[Caption], role: Role) -> Text:
        """The parts that its TextEncoderSpec promises, on the CPU.

        What a role adds to the text (an instruction, nothing) is the family's business.

        "prompt": a clip's caption or a validation prompt; "negative": guidance's other side; "dropped": a dropped caption.
        """
        ...


class VideoCodec(Protocol):
    """Pixels to latents and back. *torch* One thread at a time."""

    def encode(self, pixels: Tensor, *, std: bool = False) -> Latents:
        """pixels (B, 3, F, H, W) float in [-1, 1], F as the frame rule wants -> normalised latents on the same device, fp32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, f, h, w), normalised -> pixels (B, 3, F, H, W) fp32 in [-1, 1]."""
        ...


class Denoiser(Protocol):
    """The model being trained. *torch*"""

    @property
    def module(self) -> nn.Module:
        """What the optimizer, accelerate and checkpoints see."""
        ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated blocks in order: tap points, and units of offload and wrapping."""
        ...

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        """noisy (B, C, f, h, w) -> prediction of the sampler's target, same shape. level: it has timesteps (`timed`)."""
        ...

    def fold(self, tap: Tensor, latents: LatentShape) -> Tensor:
        """A block's raw output -> (B, f, h, w, D) in the token grid of clips with these latents."""
        ...

    def gradient_checkpointing(self, on: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations (non-reentrant)."""
        ...

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write `state` below `folder` in the family's published format; `Family.load_denoiser(weights=folder)` reads it.

        state: the weights by the names of `module.state_dict()`, contiguous, on the CPU; not always those of `module`, whose
        own may be averaged, or lie in parts with several processes. Files alone are written: nothing of `module` is read but
        its configuration, and nothing changed.
        """
        ...


@runtime_checkable
class SupportsLora(Protocol):
    """A denoiser whose adapters other tools can load. *torch*"""

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the modules that get an adapter by default (suffixes, as peft matches them)."""
        ...

    def save_lora(self, folder: Path, state: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
        """Write peft's `state` (its own key names) and settings (rank, alpha, targets) as the field's tools load them."""
        ...

    def load_lora(self, folder: Path) -> dict[str, Tensor]:
        """Read back what `save_lora` wrote, under peft's own key names."""
        ...


@runtime_checkable
class SupportsOriginalNames(Protocol):
    """A denoiser whose modules its authors name otherwise: ComfyUI finds an adapter's weights by their names (`comfyui_names`)."""

    @property
    def original_names(self) -> Mapping[str, str]:
        """Whole parts of a dotted name in `module` -> what stands for them there, such as {"attn1": "self_attn", "to_q": "q"}."""
        ...


@runtime_checkable
class SupportsDecayRule(Protocol):
    """A denoiser with parameters for which weight decay does not follow from their shape. *torch*"""

    def decays(self, name: str, shape: tuple[int, ...]) -> bool | None:
        """Whether weight decay applies to a parameter, by its name in `module`; None: to matrices and kernels, not to vectors."""
        ...


@runtime_checkable
class SupportsFeedForward(Protocol):
    """A denoiser that says which part of each block is its feed-forward layer: most of a block's activations. *torch*"""

    @property
    def feed_forwards(self) -> Sequence[nn.Module]:
        """One submodule of each block, in their order; each runs once in a block's forward pass."""
        ...


class Family(Protocol):
    """A model family on a model folder: its geometry, its text, its codec, its denoiser."""

    @property
    def default_fps(self) -> float: ...

    @property
    def default_frames(self) -> int: ...

    @property
    def default_size(self) -> Size: ...

    @property
    def frame_rule(self) -> FrameRule: ...

    @property
    def pixel_stride(self) -> int:
        """Heights and widths are multiples of this."""
        ...

    @property
    def block_count(self) -> int: ...

    @property
    def block_width(self) -> int:
        """D of a block's output."""
        ...

    @property
    def parameters(self) -> int:
        """Number of the denoiser's parameters, from the model folder, without loading them."""
        ...

    def text_encoders(self) -> Mapping[str, TextEncoderSpec]:
        """One to three, by name, in the order in which captions are encoded: all parts of the text, and nothing loaded."""
        ...

    def resolutions(self) -> Mapping[str, tuple[Size, ...]]:
        """The official bucket sets by name ("480p"), the default one first."""
        ...

    def latent_shape(self, clip: ClipShape) -> LatentShape:
        """Arithmetic only; equals what the codec gives. Raises ValueError or ModelError for a clip that it does not take."""
        ...

    def pixel_frames(self, latent_frame: int) -> range:
        """The pixel frames for which a latent frame stands."""
        ...

    def check(self) -> Sequence[Problem]:
        """What is wrong with the model folder: files missing, other classes, another codec. Nothing is loaded."""
        ...

    def describe(self) -> Sequence[tuple[str, str]]:
        """(label, text) rows about the model for the plan."""
        ...

    def timestep(self, sigma: Tensor) -> Tensor:
        """*torch* The number that the denoiser is given for a noise level; float32 of any shape -> the same shape.

        Its unit is the family's: sigma x 1000 for one, sigma itself for another.
        """
        ...

    def scheduler_config(self) -> Mapping[str, object]:
        """The model folder's own scheduler config, for its sampler."""
        ...

    def video_fingerprint(self, hash_file: HashFile) -> str:
        """Changes when, and only when, encoded video would: weights, config, storage type, tiling."""
        ...

    def open_video_codec(self, device: str) -> AbstractContextManager[VideoCodec]:
        """*torch* Load the codec for the length of a with block; its memory is free afterwards."""
        ...

    def load_denoiser(self, device: str, dtype: DType, weights: Path | None = None) -> Denoiser:
        """*torch* Load the denoiser in storage type `dtype`, from the model folder or from what `Denoiser.save` wrote.

        Raises ModelError for missing, unexpected or misshapen weights.
        """
        ...


class Sampler(Protocol):
    """A noise schedule: trained with and sampled with the same object."""

    def describe(self) -> Sequence[tuple[str, str]]:
        """(label, text) rows about the schedule for the plan."""
        ...

    def warnings(self) -> Sequence[str]:
        """What of the options has no effect, and why."""
        ...

    def draw(self, n: int, generator: torch.Generator) -> NoiseLevel:
        """*torch* Levels for n clips, on the CPU, from `generator` alone; with timesteps where the spec names their family."""
        ...

    def corrupt(self, clean: Tensor, noise: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """*torch* (noisy, target), both shaped like clean (B, C, f, h, w)."""
        ...

    def solve(
        self, predict: Predict, noise: Tensor, steps: int, on_step: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """*torch* From noise (B, C, f, h, w) fp32 to clean in `steps` calls of `predict`.

        on_step(number of steps done, current latents) after each.
        """
        ...


@runtime_checkable
class SupportsStepwise(Protocol):
    """A sampler that gives each solver step on its own, so that a run can tell how far a video is, and stop in between."""

    def solving(self, predict: Predict, noise: Tensor, steps: int) -> Iterator[Tensor]:
        """*torch* What `solve` computes, bit for bit: the latents after each step, the last of which are clean."""
        ...


@runtime_checkable
class SupportsRollout(Protocol):
    """A sampler for whose levels a denoiser can make its own inputs in training: scheduled sampling, [train.rollout]. *torch*

    Levels are as `corrupt` takes them: one for a clip, or one for each latent frame, 0 of those that are given clean.
    """

    def advance(self, noisy: Tensor, prediction: Tensor, level: NoiseLevel, to: NoiseLevel) -> Tensor:
        """Latents at `level` and what the denoiser predicts for them -> latents at `to`, by one Euler step in the level, in fp32.

        With the prediction that is `corrupt`'s target it gives what `corrupt` gives at `to`. Frames whose level stays, stay.
        """
        ...

    def target_at(self, noisy: Tensor, clean: Tensor, level: NoiseLevel) -> Tensor:
        """What to predict for latents at a level that need not be `corrupt`'s, so that its solver would end at `clean`: in fp32.

        For `corrupt`'s own it is its target. Where the level is 0 it is finite.
        """
        ...


@runtime_checkable
class SupportsStepCheck(Protocol):
    """A sampler that cannot solve in every number of steps from 1 to 1000. One without it can, which the kit tries."""

    def check_steps(self, steps: int) -> Sequence[Problem]:
        """Why `solve` cannot take so many steps; nothing where it can. Problems need no `where`."""
        ...


@runtime_checkable
class SupportsTokenGrid(Protocol):
    """A family that knows the grid of its tokens before its denoiser is loaded."""

    def token_grid(self, latents: LatentShape) -> TokenGrid:
        """Arithmetic only; equals what `Denoiser.fold` gives. Its frames divide the latents' frames."""
        ...


@runtime_checkable
class SupportsFrameLevels(Protocol):
    """A family whose denoiser takes a level for each latent frame: its conditions may give frames clean (ConditionSpec)."""

    @property
    def frame_levels(self) -> bool:
        """Whether the denoiser of this model folder does."""
        ...


@runtime_checkable
class SupportsBlockMemory(Protocol):
    """A family that knows what its denoiser keeps in memory in training (with SupportsTokenGrid): measured, not reckoned."""

    def block_memory(self, *, weights: DType, compute: DType, frame_levels: bool) -> BlockMemory | None:
        """As `vtrain.testing.memory.block_memory` gives it for the denoiser of this model folder; None if it was not measured.

        weights: storage type of the denoiser; compute: the type in which its layers compute; frame_levels: with a level for
        each latent frame.
        """
        ...


@runtime_checkable
class SupportsBlockWeights(Protocol):
    """A family that knows the weights of its denoiser's blocks before it is loaded: a plan then says what is quantised."""

    def block_weights(self) -> Mapping[str, tuple[int, ...]]:
        """Name in `Denoiser.module` -> shape, of every weight of `Denoiser.blocks`, from the model folder's config."""
        ...


@runtime_checkable
class SupportsEncoderMemory(Protocol):
    """A family that knows what its text encoder and its video codec take in memory."""

    def encoder_memory(self) -> Mapping[str, EncoderMemory]:
        """Of the "text encoder" (of several that are never there together, the largest) and of the "video codec".

        weights: from the headers of the model folder. encode, decode: measured, as `vtrain.testing.memory.codec_memory` gives them.
        """
        ...


@runtime_checkable
class SupportsDecoderOnly(Protocol):
    """A video codec that can let go of what encodes. *torch*"""

    def drop_encoder(self) -> None:
        """Free it. `encode` may not be called afterwards."""
        ...


class Tracker(Protocol):
    """Where numbers and videos go. All its methods are called from one thread of its own; whatever it does, training continues.

    events: the kinds that it asks for (`Logged`, `Validated`, `Warned`, `Failed` ...), of all that a run yields.
    """

    @property
    def events(self) -> tuple[type[Event], ...]: ...

    def start(self, run: RunInfo, saved: Mapping[str, Any]) -> None:
        """saved: what `state` gave when the checkpoint was written that the run is resumed from; {} for a new run."""
        ...

    def show(self, event: Event) -> None:
        """An event of one of the kinds it asks for, in their order; after `start`."""
        ...

    def state(self) -> Mapping[str, Any]:
        """JSON that a checkpoint is to carry, such as the name of a run on a server; {} for nothing. Asked for after each event."""
        ...

    def finish(self) -> None:
        """The last event has been shown."""
        ...


@runtime_checkable
class SupportsWarnings(Protocol):
    """Of a Tracker: it tells what went wrong with it and it survived."""

    def warnings(self) -> Sequence[str]:
        """Such as earlier numbers that are gone; each once. Asked for after `start` and after each event."""
        ...
