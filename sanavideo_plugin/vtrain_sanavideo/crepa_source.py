"""Where DINOv2's weights are, and what its config says: a folder, the hub's cache, or torch hub's own file. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vtrain.contract import HashFile, ModelError, Problem
from vtrain_sanavideo import crepa_hub_weights
from vtrain_sanavideo.check import meaning, read_json
from vtrain_sanavideo.crepa_hub_weights import HubModel
from vtrain_sanavideo.crepa_options import HUB_IDS, WEIGHT_FILES
from vtrain_sanavideo.geometry import misfits
from vtrain_sanavideo.source import Source
from vtrain_sanavideo.weights import file_problems, misfit_problem, stored_shapes, weight_hashes

STEM = "model"
"""Of the weight files of a folder in transformers' layout."""

CLASSES: Mapping[str, str] = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
"""model_type -> transformers' class."""


class DinoConfig(BaseModel):
    """What of a config.json shapes features. Other keys are the class's business."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: str
    hidden_size: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    num_channels: int = 3
    num_register_tokens: int = Field(0, ge=0)


class DinoSource(Source):
    """DINOv2 as one of torch hub's names, a hub id, a folder in transformers' layout, or torch hub's .pth file."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        super().__init__(HUB_IDS.get(name, name), revision)
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
        return crepa_hub_weights.read_model(self.file)

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
        registers = {"num_register_tokens": 4} if content["model_type"] != "dinov2" else {}
        try:
            config = DinoConfig.model_validate({**registers, **content})
        except ValidationError as error:
            raise ModelError(
                Problem(str(path), f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}.", "Download it again.")
                for fault in error.errors(include_url=False)
            ) from error
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
        problems = file_problems(self.folder, STEM, may_be_fetched=self.may_fetch())
        if problems and self.on_hub:
            return [self._unreachable("its weights are missing in the cache")]
        if problems or self.incomplete(self.folder, STEM):
            return problems
        return self._misfits()

    def _misfits(self) -> list[Problem]:
        """Whether the config is of other weights than those beside it: by those that bear the numbers of DinoConfig."""
        width, patch, registers = self.config.hidden_size, self.config.patch_size, self.config.num_register_tokens
        expected = {
            "embeddings.cls_token": (1, 1, width),
            "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
            **({"embeddings.register_tokens": (1, registers, width)} if registers else {}),
        }
        # A model with a head has all names after "dinov2.".
        stored = {name[name.find("embeddings.") :]: shape for name, shape in stored_shapes(self.folder, STEM).items()}
        lines = misfits(expected, {name: stored[name] for name in expected if name in stored})
        return [misfit_problem(self.folder, lines)] if lines else []

    def weights(self) -> Path:
        """The folder with its weights, fetched from the hub if the cache lacks some. Raises ModelError."""
        if self.on_hub and self.incomplete(self.folder, STEM):
            # The commit of the config, so that a branch that has moved on since does not mix two models.
            self._download(("*.json", "*.safetensors"), self.folder.name)
            if self.incomplete(self.folder, STEM):
                raise ModelError(self._unreachable("its weights are missing in the cache"))
        return self.folder

    def marks(self, hash_file: HashFile) -> dict[str, object]:
        """What tells this model from all others: its config's meaning and its weights' content. Raises ModelError."""
        if self.file is not None:
            return {"torch hub": hash_file(self.file)}
        folder = self.weights()
        return {
            "config": meaning(read_json(folder / "config.json")),
            "weights": weight_hashes(folder, STEM, hash_file),
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
