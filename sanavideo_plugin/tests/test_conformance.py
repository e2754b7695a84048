"""The conformance kit on the family, its sampler and the plugin as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from vtrain.contract import Family, Sampler, Spec
from vtrain.testing import FamilyTests, PluginTests, SamplerTests, SpecTests
from vtrain_sanavideo.plugin import FLOW, SANAVIDEO


class TestFamily(FamilyTests):
    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, checkpoint: Path) -> Family:
        return SANAVIDEO.build(SANAVIDEO.options.model_validate({"path": str(checkpoint)}))


@pytest.mark.slow
class TestFamily720p(FamilyTests):
    """Slow (the whole kit again): what differs of this checkpoint has its own tests."""

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, checkpoint_720p: Path) -> Family:
        return SANAVIDEO.build(SANAVIDEO.options.model_validate({"path": str(checkpoint_720p)}))


class TestSampler(SamplerTests):
    # diffusers' schedulers start pure noise at their first level, 0.99987 with shift 8, and not at 1.
    tolerance = 5e-4
    timesteps_of = FLOW.timesteps_of

    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls, checkpoint: Path) -> Sampler:
        family = SANAVIDEO.build(SANAVIDEO.options.model_validate({"path": str(checkpoint)}))
        return FLOW.build(FLOW.options(), family.scheduler_config())


def sampled_by(name: str, **settings: object) -> Sampler:
    """With another scheduler that a checkpoint may carry."""
    return FLOW.build(FLOW.options(), {"_class_name": name, **settings})


class TestEulerSampler(SamplerTests):
    timesteps_of = FLOW.timesteps_of

    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls) -> Sampler:
        return sampled_by("FlowMatchEulerDiscreteScheduler", shift=8.0)


class TestUniPCSampler(SamplerTests):
    timesteps_of = FLOW.timesteps_of

    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls) -> Sampler:
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0}
        return sampled_by("UniPCMultistepScheduler", **flow)


class TestFamilySpec(SpecTests):
    table: Mapping[str, object] = {"path": "owner/name"}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return SANAVIDEO


class TestSamplerSpec(SpecTests):
    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return FLOW


class TestPlugin(PluginTests):
    entry_module = "vtrain_sanavideo.plugin"
    tables: Mapping[tuple[str, str], Mapping[str, object]] = {("family", "sanavideo"): {"path": "owner/name"}}
