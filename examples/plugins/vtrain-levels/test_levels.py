import math

import pytest
import torch
from vtrain_levels import Levels, LevelsOptions, vtrain_samplers

from vtrain.testing import PluginTests, SamplerTests, SpecTests


class TestLevelsPlugin(PluginTests):
    entry_module = "vtrain_levels"


class TestLevelsSpec(SpecTests):
    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls):
        return vtrain_samplers()[0]


class TestMode(SamplerTests):
    expects = frozenset({"SupportsStepwise"})
    options = LevelsOptions()

    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls):
        return Levels(cls.options, {})

    @pytest.fixture(scope="class")
    @classmethod
    def reference_target(cls):
        return lambda clean, noise, sigma: noise - clean  # d/ds of x_s = (1 - s) x0 + s e

    def share_below(self, level):
        """Of levels below `level`: equation 20 falls as u rises, so that u is found by halving."""
        low, high = 0.0, 1.0
        for _ in range(40):
            u = (low + high) / 2
            above = 1 - u - self.options.scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u) > level
            low, high = (u, high) if above else (low, u)
        return 1 - low

    def test_levels_are_drawn_as_the_paper_says(self, sampler):
        sigma = sampler.draw(20_000, torch.Generator().manual_seed(0)).sigma
        for level in (0.1, 0.3, 0.5, 0.8):
            assert float((sigma < level).float().mean()) == pytest.approx(self.share_below(level), abs=0.02)


class TestCosmap(TestMode):
    options = LevelsOptions(distribution="cosmap")

    def share_below(self, level):
        """The integral of the density 2 / (pi - 2 pi s + 2 pi s^2), below equation 21."""
        return 2 / math.pi * math.atan(level / (1 - level))
