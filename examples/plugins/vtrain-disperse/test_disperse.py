from collections.abc import Mapping
from dataclasses import replace

import pytest
from vtrain_disperse import Disperse, DisperseOptions, vtrain_regularizers

from vtrain.testing import PluginTests, RegularizerTests, SpecTests


class TestDispersePlugin(PluginTests):
    entry_module = "vtrain_disperse"
    tables: Mapping[tuple[str, str], Mapping[str, object]] = {("regularizer", "disperse"): {"block": 1}}


class TestDisperseSpec(SpecTests):
    table: Mapping[str, object] = {"block": 1}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls):
        return vtrain_regularizers()[0]


class TestDisperse(RegularizerTests):
    @pytest.fixture(scope="class")
    @classmethod
    def regularizer(cls):
        return Disperse(DisperseOptions(block=1))

    def test_clips_that_differ_cost_less_and_one_clip_costs_nothing(self, regularizer, module):
        view = self.view(regularizer)
        alike = replace(view, taps={1: view.taps[1][:1].expand_as(view.taps[1])})
        alone = replace(view, taps={1: view.taps[1][:1]})
        assert module(view).value < 0
        assert float(module(alike).value.detach()) == pytest.approx(0, abs=1e-6)
        assert float(module(alone).value.detach()) == pytest.approx(0, abs=1e-6)
