"""All rules of a family in one class."""

from vtrain.testing.family_codec import VideoCodecTests
from vtrain.testing.family_denoiser import DenoiserTests, LoraTests
from vtrain.testing.family_geometry import GeometryTests
from vtrain.testing.family_taps import TapTests
from vtrain.testing.family_text import TextEncoderTests


class FamilyTests(GeometryTests, TextEncoderTests, VideoCodecTests, DenoiserTests, TapTests, LoraTests):
    """Subclass it and give the fixture `family`: built from its options on a small model folder, scope class."""
