"""A catalog of small parts, and files written to be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from vtrain.config import Config, load
from vtrain.contract import (
    Catalog,
    ConfigError,
    DataBackendSpec,
    Duration,
    FamilySpec,
    LocalPath,
    ModelSource,
    OptimizerSpec,
    Options,
    Problem,
    Registered,
    RegularizerSpec,
    SamplerSpec,
    Spec,
    TrackerSpec,
    fixed,
)


class FamilyOptions(Options):
    """Options of a family."""

    path: ModelSource = fixed(description="where the model is")
    motion_score: int | None = Field(None, ge=0, le=100, description="a number added to captions")


class FlowOptions(Options):
    """Options of a sampler."""

    shift: float = Field(3.0, gt=0, description="shift of the levels")
    kind: Literal["logit-normal", "uniform"] = Field("uniform", description="distribution of the levels")


class BentOptions(FlowOptions):
    """Options of a sampler of which one is required."""

    power: int = Field(description="power of the levels")


class FolderOptions(Options):
    """Options of a data backend."""

    path: LocalPath = fixed(description="folder of the clips")


class AdamOptions(Options):
    """Options of an optimizer."""

    lr: float = Field(gt=0, description="learning rate")
    betas: Annotated[tuple[float, float], Field(strict=False)] = Field((0.9, 0.999), description="decay of the moments")


class Stage(Options):
    """One stage of a schedule."""

    until: Duration = Field(description="end of the stage")
    weight: float = Field(1.0, ge=0, description="weight in the stage")


class PullOptions(Options):
    """Options of a regularizer, with tables within."""

    weight: float = Field(0.5, ge=0, description="factor of the loss")
    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = Field((), description="weights over time")


class NoOptions(Options):
    """No options."""


def built(*_: object) -> None:
    raise AssertionError("reading a configuration builds nothing")


SPECS: tuple[Spec, ...] = (
    FamilySpec("tiny", "a tiny family", FamilyOptions, built, sampler="flow"),  # type: ignore[arg-type]
    FamilySpec("strict", "a family with a fixed schedule", FamilyOptions, built, sampler="own", fixed_sampler=True),  # type: ignore[arg-type]
    FamilySpec(
        "shifted",
        "a family with a recipe",
        FamilyOptions,
        built,  # type: ignore[arg-type]
        sampler="bent",
        sampler_options={"shift": 5.0, "power": 2},
    ),
    SamplerSpec("bent", "a flow that needs a power", BentOptions, built),  # type: ignore[arg-type]
    SamplerSpec("flow", "a flow", FlowOptions, built),  # type: ignore[arg-type]
    SamplerSpec("own", "the schedule of strict", NoOptions, built),  # type: ignore[arg-type]
    DataBackendSpec("folder", "a folder", FolderOptions, built),  # type: ignore[arg-type]
    OptimizerSpec("adamw", "AdamW", AdamOptions, built),  # type: ignore[arg-type]
    RegularizerSpec("pull", "a pull", PullOptions, built),  # type: ignore[arg-type]
    TrackerSpec("tensorboard", "events", NoOptions, built),  # type: ignore[arg-type]
    TrackerSpec("paper", "a notebook", NoOptions, built),  # type: ignore[arg-type]
)


@pytest.fixture
def catalog() -> Catalog:
    parts = {(spec.kind, spec.name): Registered(spec, "small", "vtrain-small", "1.0") for spec in SPECS}
    return Catalog(parts, ())


@pytest.fixture
def good() -> dict[str, str]:
    """The least a file needs, table by table, to be changed by a test."""
    return {
        "run": '[run]\noutput_dir = "out"\n',
        "model": '[model]\nuse = "tiny"\npath = "model"\ntrain = "lora"\n',
        "data": '[[data]]\nuse = "folder"\npath = "clips"\n',
        "train": "[train]\nsteps = 10\n",
        "optimizer": "[optimizer]\nlr = 1e-4\n",
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | Mapping[str, str]], Path]:
    def write(text: str | Mapping[str, str]) -> Path:
        path = tmp_path / "config.toml"
        path.write_bytes((text if isinstance(text, str) else "\n".join(text.values())).encode())
        return path

    return write


@pytest.fixture
def read(write: Callable[..., Path], catalog: Catalog) -> Callable[..., Config]:
    """read(text or tables) -> Config."""
    return lambda text: load(write(text), catalog)


@pytest.fixture
def problems(write: Callable[..., Path], catalog: Catalog) -> Callable[..., list[Problem]]:
    """problems(text or tables) -> what is wrong, places without the folder."""

    def problems(text: str | Mapping[str, str]) -> list[Problem]:
        path = write(text)
        with pytest.raises(ConfigError) as caught:
            load(path, catalog)
        return [
            Problem(each.where.replace(str(path), path.name), each.what, each.remedy) for each in caught.value.problems
        ]

    return problems
