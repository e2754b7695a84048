"""Where DINOv2's weights are, and what they are: a folder, the hub's cache, or torch hub's own file (.pth). No torch.

A .pth file is a zip with a pickle. A plan reads the pickle's operations as data, and executes none; training reads it
through torch.load(weights_only=True), under transformers' names. torch hub's code is never run.
"""

from __future__ import annotations

import math
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from vtrain.contract import (
    TRANSFORMERS_STEM,
    CheckpointSource,
    Component,
    HashFile,
    ModelError,
    PartConfig,
    Problem,
    Shape,
    meaning,
    misfit_problem,
    misfit_problems,
    misfits,
    read_config,
    read_json,
    stored_shapes,
    weight_hashes,
    weight_problems,
)
from vtrain_sanavideo.crepa_options import HUB_IDS, WEIGHT_FILES

if TYPE_CHECKING:
    from torch import Tensor


HEAD = 64
"""Width of an attention head, in all DINOv2 models."""
LARGEST = 64 * 2**20
"""Bytes of a pickle beyond which it is not that of a few hundred names."""
HARMLESS = re.compile(r"torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage|collections OrderedDict")
"""What the pickle of a dictionary of tensors names."""

NAMES: Mapping[str, str] = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
IN_BLOCK: Mapping[str, str] = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
"""torch hub's names -> transformers' published ones, ".weight" and ".bias" left out."""


@dataclass(frozen=True)
class HubModel:
    """What shape of model a file's weights are of. image: the width of the pictures it was trained on, in pixels."""

    width: int
    layers: int
    mlp: int
    swiglu: bool
    registers: int
    patch: int
    image: int

    def shapes(self) -> dict[str, Shape]:
        """Name and shape of each weight, as torch hub calls them."""
        wide = self.width
        found: dict[str, Shape] = {
            "cls_token": (1, 1, wide),
            "pos_embed": (1, (self.image // self.patch) ** 2 + 1, wide),
            "mask_token": (1, wide),
            "patch_embed.proj.weight": (wide, 3, self.patch, self.patch),
            "patch_embed.proj.bias": (wide,),
            **_pair("norm", (wide,)),
        }
        if self.registers:
            found["register_tokens"] = (1, self.registers, wide)
        for number in range(self.layers):
            found |= {f"blocks.{number}.{name}": shape for name, shape in self._block().items()}
        return found

    def _block(self) -> dict[str, Shape]:
        wide, inner = self.width, self.mlp
        first, last, widening = ("mlp.w12", "mlp.w3", 2) if self.swiglu else ("mlp.fc1", "mlp.fc2", 1)
        return {
            **_pair("norm1", (wide,)),
            **_pair("norm2", (wide,)),
            **_pair("attn.qkv", (3 * wide, wide)),
            **_pair("attn.proj", (wide, wide)),
            "ls1.gamma": (wide,),
            "ls2.gamma": (wide,),
            **_pair(first, (widening * inner, wide)),
            **_pair(last, (wide, inner)),
        }


def _pair(name: str, weight: Shape) -> dict[str, Shape]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def read_model(path: Path) -> HubModel:
    """The model whose weights a file holds. No torch. Raises ModelError if they are not torch hub's DINOv2."""
    try:
        shapes = _shapes(path)
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        what = f"this file is no dictionary of tensors as torch.save writes it: {error}."
        raise ModelError(Problem(str(path), what, "Name the .pth file that torch hub downloads.")) from error
    try:
        width = shapes["cls_token"][2]
        patch = shapes["patch_embed.proj.weight"][2]
        swiglu = "blocks.0.mlp.w3.weight" in shapes
        model = HubModel(
            width=width,
            layers=1 + max(int(name.split(".")[1]) for name in shapes if re.match(r"blocks\.\d+\.", name)),
            mlp=shapes["blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"][1],
            swiglu=swiglu,
            registers=shapes["register_tokens"][1] if "register_tokens" in shapes else 0,
            patch=patch,
            image=patch * round((shapes["pos_embed"][1] - 1) ** 0.5),
        )
    except (KeyError, IndexError, ValueError) as error:
        what = f"these are not torch hub's weights of DINOv2: there is no {error}."
        raise ModelError(Problem(str(path), what, "Name the .pth file that torch hub downloads.")) from error
    if lines := misfits(model.shapes(), shapes):
        raise ModelError(misfit_problem(path, lines))
    if width % HEAD:
        raise ModelError(Problem(str(path), f"its width {width} is not a multiple of {HEAD}, that of a head."))
    return model


def _shapes(path: Path) -> dict[str, Shape]:
    """Name and shape of each tensor. Raises ValueError for a pickle that names anything but tensors."""
    with zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if name is None:
            raise ValueError("there is no data.pkl in it")
        if archive.getinfo(name).file_size > LARGEST:
            raise ValueError(f"its data.pkl is larger than {LARGEST} bytes")
        return dict(_tensors(archive.read(name)))


def _tensors(pickle: bytes) -> Iterator[tuple[str, Shape]]:
    """(name, shape) in order. A tensor is written as its name, its storage, an offset, then its shape as a tuple."""
    name, numbers = "", list[int]()
    inside = False
    for operation, argument, _ in pickletools.genops(pickle):
        code = operation.name
        if code in ("GLOBAL", "INST", "STACK_GLOBAL") and not HARMLESS.fullmatch(str(argument)):
            raise ValueError(f"it names {argument}, which is no tensor")
        if isinstance(argument, str) and "UNICODE" in code:
            name = name or argument
        elif code == "BINPERSID":
            inside, numbers = True, []
        elif inside and isinstance(argument, int) and code.startswith("BININT"):
            numbers.append(argument)
        elif inside and "TUPLE" in code:
            yield name, tuple(numbers[1:])  # the first number is the offset
            name, inside = "", False


def load(path: Path, model: HubModel) -> dict[str, Tensor]:
    """The weights under transformers' published names, on the CPU. Raises ModelError."""
    from pickle import UnpicklingError

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
        what = f"these weights cannot be loaded: {str(error).splitlines()[0]}"
        raise ModelError(Problem(str(path), what, "Name the .pth file that torch hub downloads.")) from error
    if lines := misfits(model.shapes(), {name: tuple(value.shape) for name, value in state.items()}):
        raise ModelError(misfit_problem(path, lines))
    return dict(renamed(state))


def renamed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """torch hub's weights as transformers publishes them: queries, keys and values apart, other names."""
    for name, value in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        start, inner = (f"encoder.layer.{block[1]}.", block[2]) if block else ("", name)
        if inner.startswith("attn.qkv."):
            kind = inner.removeprefix("attn.qkv.")
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                yield f"{start}attention.attention.{part}.{kind}", rows
            continue
        stem, dot, kind = inner.rpartition(".")
        known = IN_BLOCK if block else NAMES
        yield start + (known[inner] if inner in known else f"{known[stem]}{dot}{kind}"), value


CLASSES: Mapping[str, str] = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
"""model_type -> transformers' class."""


class DinoConfig(PartConfig):
    """What of a config.json shapes features, and decides over memory."""

    model_type: str
    hidden_size: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    num_channels: int = 3
    num_register_tokens: int = Field(0, ge=0)
    mlp_ratio: float = 4


class DinoSource(CheckpointSource):
    """DINOv2 as one of torch hub's names, a hub id, a folder in transformers' layout, or torch hub's .pth file."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        super().__init__(HUB_IDS.get(name, name), revision, {"": Component(stem=TRANSFORMERS_STEM)})
        self._called = name

    @property
    def file(self) -> Path | None:
        """The .pth file, if it is one."""
        path = Path(self.name)
        return path if not self.on_hub and path.suffix in WEIGHT_FILES and not path.is_dir() else None

    @cached_property
    def hub_model(self) -> HubModel:
        """What the .pth file holds. Raises ModelError."""
        assert self.file is not None
        if not self.file.exists():
            raise ModelError(Problem(self.name, "there is no such file.", f"{_ways()}."))
        return read_model(self.file)

    @cached_property
    def folder(self) -> Path:
        """The folder with config.json, from the hub if its cache lacks it. Raises ModelError."""
        if not self.on_hub and not Path(self.name).is_dir():
            raise ModelError(Problem(self.name, "there is no such encoder.", f"{_ways()}."))
        return super().folder

    @cached_property
    def config(self) -> DinoConfig:
        """Raises ModelError."""
        if self.file is not None:
            model = self.hub_model
            kind = "dinov2_with_registers" if model.registers else "dinov2"
            return DinoConfig(
                model_type=kind, hidden_size=model.width, patch_size=model.patch, num_register_tokens=model.registers
            )
        path = self.folder / "config.json"
        if not path.exists():
            raise ModelError(
                Problem(str(path), "this file is missing, so this is no folder of an encoder.", f"{_ways()}.")
            )
        content = read_json(path)
        if content.get("model_type") not in CLASSES:
            what = f"this is no DINOv2 but a {content.get('model_type', 'model of no known type')}."
            raise ModelError(Problem(str(path), what, f"{_ways()}."))
        # transformers' own default, which a config.json may leave out.
        registers = {"num_register_tokens": 4} if content["model_type"] != "dinov2" else {}
        config = read_config(DinoConfig, path, registers, "Download it again.")
        if config.num_channels != 3:
            raise ModelError(Problem(str(path), f"this model takes {config.num_channels} channels, and frames have 3."))
        return config

    def check(self) -> list[Problem]:
        """What is wrong, from the config and the headers of weights. May fetch the config from the hub."""
        try:
            _ = self.config
        except ModelError as error:
            return list(error.problems)
        if self.file is not None:
            return []
        problems = weight_problems(self.folder, TRANSFORMERS_STEM, may_be_fetched=self.may_fetch())
        if problems and self.on_hub:
            return [self._unreachable("its weights are missing in the cache")]
        return problems or self._misfits()

    def _misfits(self) -> list[Problem]:
        """Whether the config is of other weights than those beside it: by those that bear the numbers of DinoConfig."""
        width, patch, registers = self.config.hidden_size, self.config.patch_size, self.config.num_register_tokens
        expected = {
            "embeddings.cls_token": (1, 1, width),
            "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
            **({"embeddings.register_tokens": (1, registers, width)} if registers else {}),
        }
        return misfit_problems(self.folder, TRANSFORMERS_STEM, expected, some=True)

    @property
    def numbers(self) -> int:
        """How many its weights are, by what the files say; 0 where they are not there yet."""
        try:
            shapes = self.hub_model.shapes() if self.file is not None else stored_shapes(self.folder, TRANSFORMERS_STEM)
        except ModelError:
            return 0
        return sum(map(math.prod, shapes.values()))

    def weights(self) -> Path:
        """The folder with its weights, fetched from the hub if the cache lacks some. Raises ModelError."""
        return self.part("")

    def marks(self, hash_file: HashFile) -> dict[str, object]:
        """What tells this model from all others: its config's meaning and its weights' content. Raises ModelError."""
        if self.file is not None:
            return {"torch hub": hash_file(self.file)}
        folder = self.weights()
        return {
            "config": meaning(read_json(folder / "config.json")),
            "weights": weight_hashes(folder, TRANSFORMERS_STEM, hash_file),
        }

    def describe(self) -> str:
        return self._called if self._called == self.name else f"{self._called} = {self.name}"

    def _unreachable(self, why: str) -> Problem:
        fault = super()._unreachable(why)
        revision = f" --revision {self.revision}" if self.revision else ""
        what = f"this encoder is no folder here, and it cannot be had from the hub: {why.strip().splitlines()[0].rstrip('.')}."
        remedy = f"Where there is a connection: hf download {self.name}{revision}. Or name a local copy in encoder."
        return Problem(fault.where, what, remedy)


def _ways() -> str:
    return (
        f"encoder is {', '.join(HUB_IDS)}, a hub id such as facebook/dinov2-small, a folder with such a model, or a .pth "
        "file of torch hub's weights"
    )
