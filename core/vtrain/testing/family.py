"""The rules of a family: its arithmetic, its descriptions, and all its rules in one class."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch

from vtrain.contract import (
    BlockMemory,
    ClipShape,
    Denoiser,
    DType,
    Family,
    SupportsBlockMemory,
    SupportsCaptionExtras,
    SupportsTokenGrid,
    VideoCodec,
    VtrainError,
    conditions_of,
    takes_frame_levels,
)
from vtrain.testing.family_blocks import BlockTests, TapTests
from vtrain.testing.family_captions import CaptionTests
from vtrain.testing.family_conditions import ConditionTests
from vtrain.testing.family_denoiser import DenoiserTests, LoraTests
from vtrain.testing.family_encoders import TextEncoderTests, VideoCodecTests
from vtrain.testing.family_files import FileTests
from vtrain.testing.memory import block_memory
from vtrain.testing.references import ReferenceTests
from vtrain.testing.sampler import check_expected, check_names
from vtrain.testing.subject import Example, FamilySubject


class GeometryTests(FamilySubject):
    """What a plan asks of a family."""

    def test_the_default_frames_obey_the_frame_rule(self, family: Family) -> None:
        """default_frames is a number of frames that the codec takes."""
        assert family.frame_rule.accepts(family.default_frames), (
            f"default_frames = {family.default_frames} is not {family.frame_rule}"
        )

    def test_the_default_speed_is_a_number_of_frames_per_second(self, family: Family) -> None:
        """default_fps is above 0 and finite."""
        assert 0 < family.default_fps < math.inf, f"default_fps = {family.default_fps}"

    def test_every_bucket_is_a_multiple_of_the_pixel_stride(self, family: Family) -> None:
        """Widths and heights of the official sizes, and of the default one, are multiples of pixel_stride."""
        stride = family.pixel_stride
        sizes = {size for sizes in family.resolutions().values() for size in sizes} | {family.default_size}
        odd = sorted(str(size) for size in sizes if size.width % stride or size.height % stride)
        assert not odd, f"not multiples of {stride}: {', '.join(odd)}"

    def test_bucket_sets_have_sizes_and_no_size_twice(self, family: Family) -> None:
        """There is a default bucket set; no set is empty or lists a size twice."""
        sets = family.resolutions()
        assert sets, "resolutions() is empty"
        for name, sizes in sets.items():
            assert sizes, f"{name} has no size"
            assert len(set(sizes)) == len(sizes), f"{name} lists a size twice"

    def test_tokens_divide_the_latents(self, family: Family) -> None:
        """token_grid, where the family has it, divides the latents of every official size in time, height and width."""
        if not isinstance(family, SupportsTokenGrid):
            pytest.skip("this family does not say its grid of tokens")
        for size in {size for sizes in family.resolutions().values() for size in sizes}:
            latents = family.latent_shape(ClipShape(family.default_frames, size.height, size.width))
            grid = family.token_grid(latents)
            assert min(grid) > 0
            assert not any(have % tokens for have, tokens in zip(latents[1:], grid, strict=True)), f"{latents}: {grid}"

    def test_abilities_of_the_family_are_spelt_right(self, family: Family) -> None:
        """No public name of the family is almost that of an ability which it lacks."""
        check_names("family", family)

    def test_timesteps_follow_the_level(self, family: Family) -> None:
        """timestep keeps the shape of sigma, (B,) and (B, f); it is finite, of level 0 and 1 too, and goes one way with sigma."""
        sigma = torch.linspace(0, 1, 1001)
        times = family.timestep(sigma)
        assert times.shape == sigma.shape
        assert times.isfinite().all()
        assert times[0] != times[-1], "the timestep is the same for a clean clip and for noise"
        steps = times.diff()
        assert not (steps.min() < 0 < steps.max()), "it rises with sigma and falls again"
        assert torch.equal(family.timestep(sigma[:1000].reshape(8, 125)), times[:1000].reshape(8, 125))
        assert torch.equal(family.timestep(torch.zeros(1)), times[:1]), "level 0 alone has another timestep"

    def test_every_bucket_has_a_latent_shape(self, family: Family) -> None:
        """latent_shape takes every official size at the default number of frames."""
        for sizes in family.resolutions().values():
            for size in sizes:
                latents = family.latent_shape(ClipShape(family.default_frames, size.height, size.width))
                assert min(latents) > 0, f"{size}: {latents}"

    def test_latent_shape_refuses_what_the_codec_does_not_take(self, family: Family, clip: ClipShape) -> None:
        """A size off the stride or frames off the rule raises, so that nothing is cropped in silence."""
        off_stride = max(1, family.pixel_stride // 2)
        wrong = {clip._replace(height=clip.height + off_stride), clip._replace(width=clip.width + off_stride)}
        if family.frame_rule.stride > 1:
            wrong.add(clip._replace(frames=clip.frames + 1))
        for shape in sorted(wrong):
            with pytest.raises((ValueError, VtrainError)):
                pytest.fail(f"{shape} gave {family.latent_shape(shape)}; it must raise ValueError")

    def test_latent_frames_stand_for_every_pixel_frame_once(self, family: Family, clip: ClipShape) -> None:
        """The ranges of pixel_frames follow each other, without gap or overlap, over the whole clip."""
        latents = family.latent_shape(clip)
        covered = [frame for number in range(latents.frames) for frame in family.pixel_frames(number)]
        assert covered == list(range(clip.frames)), f"latent frames stand for the frames {covered} of {clip.frames}"

    def test_counts_agree_with_the_denoiser(self, family: Family, denoiser: Denoiser) -> None:
        """parameters and block_count, known without loading, are those of the loaded denoiser."""
        found = sum(weight.numel() for weight in denoiser.module.parameters())
        assert family.parameters == found, f"parameters is {family.parameters}, and the denoiser has {found}"
        blocks = len(denoiser.blocks)
        assert family.block_count == blocks, f"block_count is {family.block_count}, and the denoiser has {blocks}"

    def test_a_sound_model_folder_has_no_problem(self, family: Family) -> None:
        """check() finds nothing wrong with the folder that the tests use."""
        found = [problem.what for problem in family.check()]
        assert not found, f"check() finds: {'; '.join(found)}"

    def test_descriptions_are_pairs_of_texts(self, family: Family) -> None:
        """describe() gives (label, text) rows; scheduler_config() is plain JSON."""
        rows = list(family.describe())
        assert all(isinstance(label, str) and isinstance(text, str) for label, text in rows), f"describe() gives {rows}"
        json.dumps(dict(family.scheduler_config()))

    def test_text_is_declared_in_parts(self, family: Family) -> None:
        """One to three text encoders, each with a part; no two parts have one name, and each is of some width and length."""
        encoders = family.text_encoders()
        assert 1 <= len(encoders) <= 3, f"{len(encoders)} text encoders"
        names = [name for encoder in encoders.values() for name in encoder.parts]
        assert len(set(names)) == len(names), f"a part's name is used twice: {', '.join(sorted(names))}"
        for name, encoder in encoders.items():
            assert encoder.parts, f"{name} has no part"
            for part, spec in encoder.parts.items():
                assert min(spec.shape) > 0, f"{part} is {spec.shape}"
                assert spec.padding in ("longest", "full"), f"{part} is padded {spec.padding}"
                assert spec.padding != "full" or spec.tokens is not None, f"{part} is pooled and padded in full"
                assert spec.dtype in ("fp32", "bf16"), f"{part} is {spec.dtype}"


class AbilityTests(FamilySubject):
    """What the author means the family to be able to do.

    expects: names of the optional protocols (SupportsLora ...) that the family, its video codec and its denoiser are meant to have.
    """

    expects: frozenset[str] = frozenset()

    def test_it_has_the_abilities_that_its_author_expects(
        self, family: Family, codec: VideoCodec, denoiser: Denoiser
    ) -> None:
        """Each name in `expects` is a protocol that the family, its codec or its denoiser has and makes use of."""
        check_expected(self.expects, {"family": family, "video codec": codec, "denoiser": denoiser})
        idle = {
            "SupportsFrameLevels": not takes_frame_levels(family),
            "SupportsConditions": not conditions_of(family),
            "SupportsCaptionExtras": isinstance(family, SupportsCaptionExtras) and not family.caption_extras,
        }
        unused = sorted(name for name in self.expects if idle.get(name))
        assert not unused, f"the family has the members of {', '.join(unused)}, and they say that it has nothing"


class MemoryTests(FamilySubject):
    """What the denoiser keeps in memory in training, where the family knows it (SupportsBlockMemory).

    memory_tolerance: largest difference of a stored figure from the measured one, relative to it; versions of torch differ.
    """

    memory_tolerance: float = 0.05

    @pytest.mark.parametrize("frame_levels", [False, True], ids=["clip", "frames"])
    @pytest.mark.parametrize(("weights", "compute"), [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
    def test_the_stored_memory_of_blocks_is_what_is_measured(
        self, family: Family, weights: DType, compute: DType, frame_levels: bool
    ) -> None:
        """block_memory is what `vtrain.testing.memory.block_memory` gives (memory_tolerance), the figures that are to be stored.

        None of them is negative.
        """
        if not isinstance(family, SupportsBlockMemory) or (frame_levels and not takes_frame_levels(family)):
            pytest.skip("this family does not say what it keeps so (SupportsBlockMemory)")
        stored = family.block_memory(weights=weights, compute=compute, frame_levels=frame_levels)
        if stored is None:
            pytest.skip("this family does not know it for this model folder")
        parts = (stored.plain, stored.checkpointed)
        assert min(min(each.block, each.outside) for each in parts) >= 0, (
            f"bytes that are kept are not negative: {stored}"
        )
        found = self.measured(family, weights, compute, frame_levels)
        for on in (False, True):
            expected, real = (each.kept(1000, family.block_count, checkpointing=on) for each in (stored, found))
            assert abs(expected - real) <= self.memory_tolerance * real, f"stored is {stored}, measured {found}"

    @classmethod
    def measured(cls, family: Family, weights: DType, compute: DType, frame_levels: bool) -> BlockMemory:
        """Of the family's own denoiser, on clips of two lengths."""
        return measured(family, family.load_denoiser("cpu", weights), cls.examples(family, frame_levels), compute)

    @classmethod
    def examples(cls, family: Family, frame_levels: bool) -> list[Example]:
        stride, rule = family.pixel_stride, family.frame_rule
        # So large that text, of which there is as much with any clip, decides over no peak.
        clips = (ClipShape(rule.offset + steps * rule.stride, 16 * stride, 24 * stride) for steps in (1, 3))
        found = [cls.example_of(family, clip) for clip in clips]
        return [cls.by_frame(family, each) for each in found] if frame_levels else found


def measured(family: Family, denoiser: Denoiser, examples: Sequence[Example], compute: DType) -> BlockMemory:
    """`block_memory` of a denoiser on two examples of different length."""
    assert isinstance(family, SupportsTokenGrid), "bytes for each token, and no token_grid (SupportsTokenGrid)"
    calls = [
        (partial(each.run, denoiser), len(each.noisy) * math.prod(family.token_grid(each.latents))) for each in examples
    ]
    return block_memory(denoiser, calls, compute)


class FamilyTests(
    GeometryTests,
    AbilityTests,
    CaptionTests,
    TextEncoderTests,
    VideoCodecTests,
    ConditionTests,
    DenoiserTests,
    BlockTests,
    TapTests,
    LoraTests,
    FileTests,
    MemoryTests,
    ReferenceTests,
):
    """Subclass it and give the fixture `family`: built from its options on a small model folder, scope class.

    That proves that the family agrees with itself. That it agrees with the original model is proved by what more you give: the
    fixtures of ReferenceTests, `model_folder`, and the class attribute `least_psnr`. A rule that lacks one is skipped, and
    `pytest -rs` says what is not proved.
    """
