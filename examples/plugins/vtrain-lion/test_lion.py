from collections.abc import Mapping

import pytest
import torch
from vtrain_lion import LION

from vtrain.contract import ParameterGroup
from vtrain.testing import OptimizerTests, PluginTests, SpecTests


class TestLionPlugin(PluginTests):
    entry_module = "vtrain_lion"


class TestLion(SpecTests, OptimizerTests):
    table: Mapping[str, object] = {"lr": 1e-3}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls):
        return LION

    def test_a_step_is_the_sign_of_the_momentum(self):
        weight = torch.nn.Parameter(torch.zeros(3))
        lion = LION.build(LION.options(lr=0.01), [ParameterGroup((("weight", weight),), decay=False)])
        for gradient in ([1.0, -1.0, 0.0], [-8.0, 0.5, 0.0]):
            weight.grad = torch.tensor(gradient)
            lion.step()
        assert weight.tolist() == pytest.approx([0.0, 0.0, 0.0])  # -0.01 + 0.01, and 0.01 - 0.01
