"""The built-in plugin and its parts but data backends on the conformance kit, like anyone's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from torch import Tensor

from vtrain.contract import OptimizerSpec, Regularizer, Sampler, Spec, Tracker
from vtrain.testing import OptimizerTests, PluginTests, RegularizerTests, SamplerTests, SpecTests, TrackerTests
from vtrain_builtin.plugin import ADAMW, FLOW, FOLDER, FRAMES, LAYERSYNC, MANIFEST, TAR, TENSORBOARD


class TestPlugin(PluginTests):
    entry_module = "vtrain_builtin.plugin"
    tables: Mapping[tuple[str, str], Mapping[str, object]] = {
        ("data_backend", "folder"): {"path": "clips"},
        ("data_backend", "frames"): {"path": "shots", "fps": 24.0},
        ("data_backend", "manifest"): {"path": "clips.csv"},
        ("data_backend", "tar"): {"path": "shards/clips-{000..011}.tar"},
    }


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


class TestAdamW(OptimizerTests):
    table: Mapping[str, object] = {"lr": 1e-4}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> OptimizerSpec:
        return ADAMW


class TestTensorBoardSpec(SpecTests):
    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return TENSORBOARD


class TestTensorBoard(TrackerTests):
    expects = frozenset({"SupportsWarnings"})

    @pytest.fixture
    def tracker(self) -> Tracker:
        return TENSORBOARD.build(TENSORBOARD.options())

    @pytest.fixture
    def received(self, tmp_path: Path) -> Callable[[], bytes]:
        return lambda: b"".join(file.read_bytes() for file in sorted(tmp_path.rglob("*.tfevents.*")))


class TestFolderSpec(SpecTests):
    table: Mapping[str, object] = {"path": "clips"}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return FOLDER


class TestFramesSpec(SpecTests):
    table: Mapping[str, object] = {"path": "shots", "fps": 24.0}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return FRAMES


class TestTarSpec(SpecTests):
    table: Mapping[str, object] = {"path": "shards"}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return TAR


class TestManifestSpec(SpecTests):
    table: Mapping[str, object] = {"path": "clips.parquet", "columns": {"bytes": "video.bytes"}}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return MANIFEST


class TestFlow(SamplerTests):
    tolerance = 1e-5
    expects = frozenset({"SupportsStepwise"})

    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls) -> Sampler:
        return FLOW.build(FLOW.options(), {})

    @pytest.fixture(scope="class")
    @classmethod
    def reference_target(cls) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """v = e - x0, the time derivative of x_s = (1 - s) x0 + s e (Liu et al., arXiv 2209.03003)."""
        return lambda clean, noise, sigma: noise - clean


class TestUniformShiftedFlow(TestFlow):
    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls) -> Sampler:
        return FLOW.build(FLOW.options(distribution="uniform", shift=3.0, sampling_shift=8.0), {})


class TestLayerSyncSpec(SpecTests):
    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return LAYERSYNC


class TestLayerSync(RegularizerTests):
    stopped = (15,)
    expects = frozenset({"SupportsCheck", "SupportsPauses"})

    @pytest.fixture(scope="class")
    @classmethod
    def regularizer(cls) -> Regularizer:
        return LAYERSYNC.build(LAYERSYNC.options())
