"""The conformance kit on both families, one of them for either task, and the plugin as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from vtrain.contract import Family, Spec
from vtrain.testing import FamilyTests, PluginTests, SpecTests
from vtrain_wan.plugin import WAN21, WAN22_TI2V


@pytest.mark.slow
class TestWan21(FamilyTests):
    """Slow (10 s): image-to-video is the same family, and asks for all of it."""

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, wan21: Path) -> Family:
        return WAN21.build(WAN21.options.model_validate({"path": str(wan21)}))


class TestImageToVideo(FamilyTests):
    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, i2v: Path) -> Family:
        return WAN21.build(WAN21.options.model_validate({"path": str(i2v)}))


@pytest.mark.slow
class TestTI2V(FamilyTests):
    """Slow (10 s): what it has of its own is in test_parity and test_run too."""

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, ti2v: Path) -> Family:
        return WAN22_TI2V.build(WAN22_TI2V.options.model_validate({"path": str(ti2v)}))


class TestWan21Spec(SpecTests):
    table: Mapping[str, object] = {"path": "owner/name"}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return WAN21


class TestTI2VSpec(SpecTests):
    table: Mapping[str, object] = {"path": "owner/name"}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return WAN22_TI2V


class TestPlugin(PluginTests):
    entry_module = "vtrain_wan.plugin"
    tables: Mapping[tuple[str, str], Mapping[str, object]] = {
        ("family", "wan21"): {"path": "owner/name"},
        ("family", "wan22-ti2v"): {"path": "owner/name"},
    }
