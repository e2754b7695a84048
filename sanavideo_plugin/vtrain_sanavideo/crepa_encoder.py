"""The frozen encoder that hidden states are aligned with: the seam for others, and DINOv2."""

# mypy: allow-untyped-calls
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vtrain.contract import ClipShape, DType, HashFile, Problem, TokenGrid, load_pretrained, opened
from vtrain.contract.measured import Measured, dtype_bytes, measured_bytes
from vtrain_sanavideo import crepa_source
from vtrain_sanavideo.crepa_options import CrepaOptions
from vtrain_sanavideo.crepa_source import CLASSES, DinoSource

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Dinov2Model

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's, of red, green and blue in [0, 1]."""

MEASURED: Measured = json.loads(Path(__file__).with_name("memory.json").read_bytes())
"""Under "<width> dinov2 <patch> x<MLP>", by storage type, bytes that the model takes for each of its tokens; under "dinov2
pictures" what `imagenet` takes for each pixel that it is given and resizes, and for each that it gives."""

EncodePictures = Callable[["Tensor", TokenGrid], "Tensor"]
"""(pictures (N, 3, H, W) fp32 in [-1, 1], grid of the clip's tokens) -> features (N, h', w', D') of `Encoder.grid`."""


class Encoder(Protocol):
    """A frozen encoder of pictures. Whatever has these members can take DINOv2's place: Crepa(options, encoder)."""

    @property
    def width(self) -> int:
        """D' of its features. Without torch."""
        ...

    def grid(self, tokens: TokenGrid) -> tuple[int, int]:
        """(h', w') of its features for a clip with these tokens. Without torch."""
        ...

    def fingerprint(self, hash_file: HashFile) -> str:
        """Changes when, and only when, its features would."""
        ...

    def check(self) -> Sequence[Problem]:
        """What is wrong with it. Nothing is loaded."""
        ...

    def describe(self) -> str:
        """Its name and what it sees, for the plan."""
        ...

    def open(self, device: str) -> AbstractContextManager[EncodePictures]:
        """*torch* Load it for the length of a with block; its memory is free afterwards. Raises ModelError."""
        ...


@runtime_checkable
class KnowsMemory(Protocol):
    """An Encoder that knows what it takes."""

    def memory(self, pictures: int, clip: ClipShape, tokens: TokenGrid) -> tuple[int, float] | None:
        """Bytes of (its weights, what it makes of so many frames of such clips at once); None: not known. Without torch."""
        ...


def imagenet(pictures: Tensor, height: int, width: int) -> Tensor:
    """(N, 3, H, W) in [-1, 1] -> (N, 3, height, width), resized and normalised as encoders trained on ImageNet expect.

    Bicubic with antialiasing, as DINOv2's own preprocessing, then cut to the range of a picture, as its 8 bits would be.
    """
    import torch
    from torch.nn import functional as F

    seen = (pictures.float() + 1) / 2
    if seen.shape[2:] != (height, width):
        seen = F.interpolate(seen, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    # Filled there, not copied there: a copy from the host would wait for the device.
    mean, std = (torch.stack([seen.new_full((1, 1), number) for number in numbers]) for numbers in (MEAN, STD))
    return (seen.clamp(0, 1) - mean) / std  # bicubic resampling overshoots at edges


class Dinov2:
    """DINOv2 through transformers: an Encoder, KnowsMemory. Features are patch tokens; the CLS token and registers are skipped."""

    def __init__(self, options: CrepaOptions) -> None:
        self._size = options.size
        self._precision: DType = options.precision
        self._source = DinoSource(options.encoder, options.encoder_revision)

    @property
    def width(self) -> int:
        return self._source.config.hidden_size

    @property
    def patch(self) -> int:
        """Edge of a patch in pixels."""
        return self._source.config.patch_size

    @cached_property
    def _skipped(self) -> int:
        """Tokens before those of patches: CLS, and registers if there are."""
        return 1 + self._source.config.num_register_tokens

    def grid(self, tokens: TokenGrid) -> tuple[int, int]:
        if self._size == "match":
            return tokens.height, tokens.width
        return self._size // self.patch, self._size // self.patch

    def memory(self, pictures: int, clip: ClipShape, tokens: TokenGrid) -> tuple[int, float] | None:
        """Made ready, or in the model: whichever takes more."""
        key, weights = f"{self.width} dinov2 {self.patch} x{self._source.config.mlp_ratio:g}", self._source.numbers
        token = measured_bytes(MEASURED, key, self._precision)
        ready = measured_bytes(MEASURED, "dinov2 pictures", "fp32")
        if not weights or token is None or ready is None:
            return None
        high, wide = self.grid(tokens)
        seen, given = high * wide * self.patch**2, clip.height * clip.width
        resized = 0 if (high * self.patch, wide * self.patch) == clip[1:] else ready[0] * given
        work = max(resized, ready[1] * seen, token[0] * (high * wide + self._skipped))
        return weights * dtype_bytes(self._precision), pictures * work

    def fingerprint(self, hash_file: HashFile) -> str:
        """Names the patch grid's rule, the storage type and the weights. Raises ModelError."""
        return repr(["dinov2 1", self._size, self._precision, self._source.marks(hash_file)])

    def check(self) -> Sequence[Problem]:
        problems = [Problem("", f"encoder: {f'{found.where}: ' if found.where else ''}{found.what}", found.remedy)
                    for found in self._source.check()]  # fmt: skip
        if problems or self._size == "match" or self._size % self.patch == 0:
            return problems
        near = max(1, round(self._size / self.patch)) * self.patch
        what = f"size {self._size} cannot be cut into patches of {self.patch}."
        return [Problem("", what, f'Write {near}, or "match".')]

    def describe(self) -> str:
        return f"{self._source.describe()} in {self._precision}, width {self.width}, {self._seen()}"

    def _seen(self) -> str:
        if self._size == "match":
            return f"a {self.patch}x{self.patch} patch for each token"
        number = self._size // self.patch
        return f"frames squeezed to {self._size}x{self._size}, {number}x{number} patches resampled to the tokens"

    def open(self, device: str) -> AbstractContextManager[_AtWork]:
        """Raises ModelError."""
        return opened(lambda: _AtWork(self._load(device), self._skipped, self.patch, self.grid), device)

    def _load(self, device: str) -> Dinov2Model:
        import transformers

        source = self._source
        kind: type[Dinov2Model] = getattr(transformers, CLASSES[source.config.model_type])
        if source.file is None:
            return load_pretrained(kind, source.weights(), self._precision, device, "encoder")
        own = {"config": _config(source), "state_dict": crepa_source.load(source.file, source.hub_model)}
        return load_pretrained(kind, source.file, self._precision, device, "encoder", **own)


class _AtWork:
    """DINOv2 in memory."""

    def __init__(
        self, model: Dinov2Model, skipped: int, patch: int, grid: Callable[[TokenGrid], tuple[int, int]]
    ) -> None:
        self._model: Dinov2Model | None = model
        self._skipped, self._patch, self._grid = skipped, patch, grid

    def __call__(self, pictures: Tensor, tokens: TokenGrid) -> Tensor:
        if self._model is None:
            raise RuntimeError("this encoder is closed")
        high, wide = self._grid(tokens)
        seen = imagenet(pictures, high * self._patch, wide * self._patch)
        states: Tensor = self._model(seen.to(self._model.dtype)).last_hidden_state
        patches: Tensor = states[:, self._skipped :].unflatten(1, (high, wide))
        return patches

    def close(self) -> None:
        """Let go of the weights."""
        self._model = None


def _config(source: DinoSource) -> Any:
    """transformers' config of a .pth file's model."""
    import transformers

    model = source.hub_model
    settings: dict[str, Any] = {
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.width // crepa_source.HEAD,
        "mlp_ratio": 4,
        "image_size": model.image,
        "patch_size": model.patch,
        "use_swiglu_ffn": model.swiglu,
    }
    if model.registers:
        return transformers.Dinov2WithRegistersConfig(**settings, num_register_tokens=model.registers)
    return transformers.Dinov2Config(**settings)
