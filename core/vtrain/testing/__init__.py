"""The conformance kit: abstract test classes for a plugin author's own tests. It needs pytest.

Subclass one for each part, give its fixtures, and every rule of the contract runs as a test of its own::

    class TestMyFamily(FamilyTests):
        @pytest.fixture(scope="class")
        @classmethod
        def family(cls):
            return MY_FAMILY.build(MY_FAMILY.options(path="..."))
"""

import pytest

for _module in (
    "data_backend",
    "family",
    "family_blocks",
    "family_captions",
    "family_conditions",
    "family_denoiser",
    "family_encoders",
    "family_files",
    "optimizer",
    "plugin",
    "references",
    "regularizer",
    "sampler",
    "tracker",
):
    pytest.register_assert_rewrite(f"vtrain.testing.{_module}")

from vtrain.testing.data_backend import DataBackendTests  # noqa: E402  # after the assertions' rewriting is asked for
from vtrain.testing.family import FamilyTests  # noqa: E402
from vtrain.testing.optimizer import OptimizerTests  # noqa: E402
from vtrain.testing.plugin import PluginTests, SpecTests  # noqa: E402
from vtrain.testing.regularizer import RegularizerTests  # noqa: E402
from vtrain.testing.sampler import SamplerTests  # noqa: E402
from vtrain.testing.tracker import TrackerTests  # noqa: E402

__all__ = [
    "DataBackendTests",
    "FamilyTests",
    "OptimizerTests",
    "PluginTests",
    "RegularizerTests",
    "SamplerTests",
    "SpecTests",
    "TrackerTests",
]
