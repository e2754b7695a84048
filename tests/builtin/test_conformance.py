"""The built-in parts on the conformance kit, like anyone's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from vtrain.contract import DataBackend, Sampler, Spec
from vtrain.testing import DataBackendTests, PluginTests, SamplerTests, SpecTests
from vtrain_builtin.plugin import ADAMW, FLOW, FOLDER, TENSORBOARD


class TestPlugin(PluginTests):
    entry_module = "vtrain_builtin.plugin"
    tables: Mapping[tuple[str, str], Mapping[str, object]] = {("data_backend", "folder"): {"path": "clips"}}


class TestFlowSpec(SpecTests):
    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return FLOW


class TestAdamWSpec(SpecTests):
    table: Mapping[str, object] = {"lr": 1e-4}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return ADAMW


class TestTensorBoardSpec(SpecTests):
    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return TENSORBOARD


class TestFolderSpec(SpecTests):
    table: Mapping[str, object] = {"path": "clips"}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return FOLDER


class TestFlow(SamplerTests):
    tolerance = 1e-5

    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls) -> Sampler:
        return FLOW.build(FLOW.options(), {})


class TestUniformShiftedFlow(SamplerTests):
    tolerance = 1e-5

    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls) -> Sampler:
        return FLOW.build(FLOW.options(distribution="uniform", shift=3.0, sampling_shift=8.0), {})


class TestFolder(DataBackendTests):
    @pytest.fixture
    def place(self, tmp_path: Path, files: Mapping[str, bytes]) -> Path:
        for name, data in files.items():
            (tmp_path / "place" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "place" / name).write_bytes(data)
        return tmp_path / "place"

    @pytest.fixture
    def backend(self, place: Path) -> DataBackend:
        return FOLDER.build(FOLDER.options(path=str(place)))

    @pytest.fixture
    def rewrite(self, place: Path) -> Callable[[str, bytes], None]:
        def replace(name: str, data: bytes) -> None:
            (place / name).write_bytes(data)

        return replace

    @pytest.fixture
    def missing(self, tmp_path: Path) -> DataBackend:
        return FOLDER.build(FOLDER.options(path=str(tmp_path / "nowhere")))
