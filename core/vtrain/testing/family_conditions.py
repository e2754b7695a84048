"""The rules of what a family takes beside text: its encoders, how it reaches the denoiser, and the frames that are given clean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vtrain.contract import (
    ClipShape,
    ConditionEncoder,
    ConditionEncoderSpec,
    ConditionSpec,
    Denoiser,
    Device,
    Family,
    HashFile,
    conditions_of,
    takes_frame_levels,
    tensors_of,
    torch_type,
    with_clean,
)
from vtrain.testing.memory import survivors
from vtrain.testing.sampler import digest, gap, moving_picture, noise
from vtrain.testing.subject import Example, FamilySubject


def encoders(family: Family) -> dict[str, tuple[ConditionSpec, ConditionEncoderSpec]]:
    """By name, the conditions that are encoded. Skips where none is."""
    found = {each.name: (each, each.encoder) for each in conditions_of(family) if each.encoder is not None}
    if not found:
        pytest.skip("no condition of this family has an encoder (SupportsConditions)")
    return found


def source_of(condition: ConditionSpec, clip: ClipShape, batch: int = 1, seed: int = 0) -> Tensor:
    """Pixels as its encoder gets them."""
    pixels = moving_picture(clip, batch, seed)
    return pixels[:, :, :1] if condition.source == "first_frame" else pixels


@contextmanager
def opened(encoder: ConditionEncoderSpec) -> Iterator[ConditionEncoder]:
    with encoder.open("cpu") as made, torch.no_grad():
        yield made


class ConditionTests(FamilySubject):
    """What a family takes beside text. Skipped by one that takes nothing.

    condition_tolerance: largest difference, relative to the largest value, between a clip encoded alone and in a batch.
    """

    condition_tolerance: float = 1e-4

    def test_conditions_are_declared_without_contradiction(self, family: Family, clip: ClipShape) -> None:
        """Names of conditions and of tensors are unique, each condition gives something, clean frames need levels by frame."""
        conditions = conditions_of(family)
        if not conditions:
            pytest.skip("this family takes text alone (it is no SupportsConditions)")
        names = [each.name for each in conditions]
        assert len(set(names)) == len(names), f"two conditions are called alike: {names}"
        tensors = [name for each in conditions if each.encoder is not None for name in each.encoder.tensors(clip)]
        assert len(set(tensors)) == len(tensors), f"two tensors are called alike: {tensors}"
        for each in conditions:
            assert each.clean_frames > 0 or each.encoder is not None, f"{each.name} gives the denoiser nothing"
            assert each.clean_frames == 0 or takes_frame_levels(family), f"{each.name}: SupportsFrameLevels"
            assert 0 <= each.clean_frames <= (1 if each.source == "first_frame" else each.clean_frames), each.name
            assert each.summary, f"{each.name} has no summary"
            assert each.encoder is None or not list(each.encoder.check()), f"check() of {each.name} finds something"

    def test_encoded_conditions_are_what_was_declared(self, family: Family, clip: ClipShape) -> None:
        """encode gives the declared names, shapes and types, finite, outside any graph, for wide and high clips."""
        for name, (condition, encoder) in encoders(family).items():
            with encoder.open("cpu") as made:
                for shape in (clip, clip._replace(height=clip.width, width=clip.height)):
                    found = made.encode(source_of(condition, shape, batch=2), shape)
                    declared = encoder.tensors(shape)
                    assert found.keys() == declared.keys(), f"{name}: {sorted(found)} instead of {sorted(declared)}"
                    for tensor, (size, dtype) in declared.items():
                        assert tuple(found[tensor].shape) == (2, *size), f"{tensor}: {tuple(found[tensor].shape)}"
                        assert found[tensor].dtype is torch_type(dtype), f"{tensor} is {found[tensor].dtype}"
                        assert found[tensor].isfinite().all(), f"{tensor} is not finite"
                        assert not found[tensor].requires_grad, f"{tensor} is in a graph"
                        assert Device.of(found[tensor]) == Device()

    def test_encoding_a_condition_is_deterministic(self, family: Family, clip: ClipShape) -> None:
        """The same pixels give the same tensors, bit for bit, with other pixels in between."""
        for condition, encoder in encoders(family).values():
            with opened(encoder) as made:
                first = dict(made.encode(source_of(condition, clip), clip))
                made.encode(source_of(condition, clip, seed=1), clip)
                again = made.encode(source_of(condition, clip), clip)
                odd = [name for name in first if not torch.equal(first[name], again[name])]
                assert not odd, f"differ: {', '.join(odd)}"

    def test_encoding_a_condition_sees_the_pixels(self, family: Family, clip: ClipShape) -> None:
        """Each condition of other pixels is another."""
        for name, (condition, encoder) in encoders(family).items():
            with opened(encoder) as made:
                one, other = (made.encode(source_of(condition, clip, seed=seed), clip) for seed in (0, 1))
                assert any(not torch.equal(one[tensor], other[tensor]) for tensor in one), f"{name} ignores the pixels"

    def test_conditions_in_a_batch_do_not_see_each_other(self, family: Family, clip: ClipShape) -> None:
        """A clip's tensors in a batch are those that it has alone (within condition_tolerance)."""
        for condition, encoder in encoders(family).values():
            pixels = source_of(condition, clip, batch=2)
            with opened(encoder) as made:
                together = made.encode(pixels, clip)
                for row in range(2):
                    alone = made.encode(pixels[row : row + 1], clip)
                    for name in alone:
                        off = gap(together[name][row : row + 1], alone[name])
                        assert off <= self.condition_tolerance, f"{name} differs by {off:.1e}"

    def test_the_encoders_of_conditions_are_released(self, family: Family, clip: ClipShape) -> None:
        """Nothing of an encoder is in memory after its with block."""
        for name, (condition, encoder) in encoders(family).items():
            use = partial(_encode, source_of(condition, clip), clip)
            left = survivors(partial(encoder.open, "cpu"), use)
            assert not left, f"{name}: still in memory: {', '.join(left)}"

    def test_fingerprints_of_conditions_follow_their_files_alone(self, family: Family) -> None:
        """Asked twice they are the same, no two encoders share one, and another hash of a file gives another."""
        marks: Mapping[str, str] = {name: each.fingerprint(digest) for name, (_, each) in encoders(family).items()}
        texts = [each.fingerprint(digest) for each in family.text_encoders().values()]
        everything = [*marks.values(), family.video_fingerprint(digest), *texts]
        assert len(set(everything)) == len(everything), "two encoders have the same fingerprint"
        for name, (_, encoder) in encoders(family).items():
            assert encoder.fingerprint(digest) == marks[name], f"{name} has another fingerprint the second time"
            asked: list[Path] = []
            if encoder.fingerprint(_changed(asked)) == marks[name]:
                assert not asked, f"{name} ignores the contents of {asked[0].name}"

    def test_conditions_reach_the_denoiser(self, family: Family, denoiser: Denoiser, example: Example) -> None:
        """Another value of each tensor gives another prediction, and so do zeros where a draw may lack the condition."""
        given = example.condition.extras
        for name in tensors_of([condition for condition, _ in encoders(family).values()], example.clip):
            for what, other in (("its value", given[name].flip(0)), ("zeros", torch.zeros_like(given[name]))):
                changed = replace(example, condition=replace(example.condition, extras={**given, name: other}))
                with torch.no_grad():
                    found, wanted = changed.run(denoiser), example.run(denoiser)
                assert found.isfinite().all(), f"with {what} of {name} the prediction is not finite"
                assert gap(found, wanted) > 1e-6, f"{what} of {name} changes nothing: the denoiser ignores it"

    def test_clean_frames_reach_the_others(self, family: Family, denoiser: Denoiser, example: Example) -> None:
        """With the given frames at level 0, another content of these gives another prediction of the frames after them."""
        clean = max((each.clean_frames for each in conditions_of(family)), default=0)
        if not clean:
            pytest.skip("no condition of this family gives clean frames")
        stay = (torch.arange(example.latents.frames) < clean).expand(len(example.noisy), -1)
        given = replace(example, level=with_clean(family, example.level, stay))
        noisy = given.noisy.clone()
        noisy[:, :, :clean] = noise(noisy[:, :, :clean].shape, seed=8)
        with torch.no_grad():
            off = gap(replace(given, noisy=noisy).run(denoiser)[:, :, clean:], given.run(denoiser)[:, :, clean:])
        assert off > 1e-6, "the frames that are given change nothing in the others"


def _encode(pixels: Tensor, clip: ClipShape, encoder: ConditionEncoder) -> object:
    return encoder.encode(pixels, clip)


def _changed(asked: list[Path]) -> HashFile:
    """Other hashes than the files'; takes down which were asked for."""

    def changed(file: Path) -> str:
        asked.append(file)
        return "changed " + digest(file)

    return changed
