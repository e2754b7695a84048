"""Rules of a sampler: its draws, its noise, its solver."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vtrain.contract import (
    ClipShape,
    Device,
    LatentShape,
    NoiseLevel,
    Problem,
    Sampler,
    SupportsRollout,
    SupportsStepCheck,
    SupportsStepwise,
    Text,
    TextEncoderSpec,
    TextPart,
    TextPartSpec,
)
from vtrain.contract.abilities import ABILITIES, members, misspelt, names_of
from vtrain.contract.run_rules import corrupt_fault
from vtrain.contract.specs import did_you_mean


def required(fixture: str, meaning: str) -> NoReturn:
    """Fail with what the author still has to give."""
    pytest.fail(f"Give a fixture `{fixture}`: {meaning}.", pytrace=False)


def unproved(what: str, fixture: str, meaning: str) -> NoReturn:
    """Skip, and say what nothing proves because the author did not give a fixture. what: "that predict is right"."""
    pytest.skip(f"NOT PROVED: {what}. There is no {fixture}: give {meaning}")


def noise(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Standard normal, fp32, on the CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def moving_picture(clip: ClipShape, batch: int = 1, seed: int = 0) -> Tensor:
    """(B, 3, F, H, W) fp32 in [-0.9, 0.9]: random colours on a coarse grid that change over time, smooth in between."""
    coarse = noise((batch, 3, min(3, clip.frames), 3, 4), seed).tanh() * 0.9
    return F.interpolate(coarse, size=tuple(clip), mode="trilinear", align_corners=False)


def level_of(sigmas: Sequence[float]) -> NoiseLevel:
    """One level for each clip, without timesteps."""
    return NoiseLevel(torch.tensor(sigmas, dtype=torch.float32))


def padded(text: Text, encoder: TextEncoderSpec) -> Text:
    """The parts of one encoder as denoisers get them, but for "longest" padded to all their tokens too."""
    return Text({name: _padded(part, encoder.parts[name]) for name, part in text.parts.items()})


def _padded(part: TextPart, spec: TextPartSpec) -> TextPart:
    if spec.tokens is None:
        return part
    embeds, mask = part.masked
    missing = spec.tokens - mask.shape[1]
    # Whatever an encoder makes of its own padding is replaced: entries of the cache hold real tokens alone.
    zeros = F.pad(embeds * mask[..., None], (0, 0, 0, missing))
    return TextPart(zeros, None if spec.padding == "full" else F.pad(mask, (0, missing), value=False))


def gap(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value of `wanted`. Infinite where either is not finite."""
    if found.shape != wanted.shape or not (found.isfinite().all() and wanted.isfinite().all()):
        return float("inf")
    difference = (found.double() - wanted.double()).abs().max()
    return float(difference / wanted.double().abs().max().clamp(min=1e-12))


def digest(file: Path) -> str:
    """A HashFile: of the file's bytes."""
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


def check_names(sort: str, part: object) -> None:
    """Fail for a public name that is a misspelt ability of such a part. sort: as vtrain.contract.abilities has it."""
    found = [f"{each.name} (for {each.meant} of {each.ability}?)" for each in misspelt(sort, names_of(part))]
    assert not found, f"nothing asks the {sort} for {', '.join(found)}; a name of its own may start with _"


def check_expected(expects: Collection[str], parts: Mapping[str, object]) -> None:
    """Fail for an ability that is expected and that no part has. parts: by what they are, as vtrain.contract.abilities has it."""
    known = {ability.__name__: (sort, ability) for sort in parts for ability in ABILITIES[sort].can}
    for name in sorted(expects):
        assert name in known, f"`expects` names {name}, which is no ability here. {did_you_mean(name, known)}".rstrip()
        sort, ability = known[name]
        lacking = sorted(member for member in members(ability) if getattr(parts[sort], member, None) is None)
        assert isinstance(parts[sort], ability), f"the {sort} has lost {name}: it has no {', '.join(lacking)}"


Target = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(clean (B, C, f, h, w), noise, sigma (B,)) -> what the denoiser is to predict there."""

STEPS = (1, 2, 140, 150, 200, 300, 999, 1000)
"""Numbers of solver steps that every sampler is tried with: the ends of what a configuration may ask for, and numbers at which
the timesteps of 1000 levels are no whole ones, or two are the same one when they are rounded."""


class SamplerTests:
    """A noise schedule, for training and sampling.

    tolerance: largest error of a solved clip and of levels, relative to the largest value. steps: of the solver.
    timesteps_of: as the sampler's spec says it. expects: names of the optional protocols (SupportsStepwise ...) that it is
    meant to have.
    """

    tolerance: float = 1e-4
    expects: frozenset[str] = frozenset()
    steps: int = 10
    latents: LatentShape = LatentShape(4, 3, 6, 8)
    timesteps_of: str = ""

    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls) -> Sampler:
        """The sampler, built from its options. Override it."""
        required("sampler", "the Sampler under test, built from its options and a scheduler config, scope class")

    @pytest.fixture(scope="class")
    @classmethod
    def reference_target(cls) -> Target:
        """(clean, noise, sigma (B,)) -> the target (B, C, f, h, w), by the paper's equation. Override it."""
        unproved(
            "that the denoiser is trained on the right target", "reference_target", "the target by the paper's equation"
        )

    @pytest.fixture
    def clean(self) -> Tensor:
        return noise((2, *self.latents), seed=1)

    @pytest.fixture
    def start(self) -> Tensor:
        return noise((2, *self.latents), seed=2)

    def test_drawn_levels_are_fp32_in_the_unit_range(self, sampler: Sampler) -> None:
        """draw gives n levels in [0, 1], (n,) or (n, f), fp32 on the CPU."""
        for count in (1, 64):
            level = sampler.draw(count, torch.Generator().manual_seed(0))
            assert level.sigma.shape[0] == count
            assert level.sigma.ndim in (1, 2)
            assert level.sigma.dtype is torch.float32
            assert Device.of(level.sigma) == Device()
            low, high = float(level.sigma.min()), float(level.sigma.max())
            assert 0 <= low <= high <= 1, f"levels lie from {low:g} to {high:g}"

    def test_timesteps_are_given_only_in_the_unit_of_a_named_family(self, sampler: Sampler, start: Tensor) -> None:
        """Levels have timesteps, one for each sigma, if timesteps_of names their family; else none: the family fills them in."""
        levels = [sampler.draw(4, torch.Generator().manual_seed(0))]

        def predict(noisy: Tensor, level: NoiseLevel) -> Tensor:
            levels.append(level)
            return noisy * 0.1

        sampler.solve(predict, start, 2)
        for level in levels:
            if not self.timesteps_of:
                assert level.timestep is None, (
                    "timesteps in a unit that no family was asked for: timesteps_of is not set"
                )
            else:
                assert level.timestep is not None, f"no timesteps, though timesteps_of is {self.timesteps_of}"
                assert level.timestep.shape == level.sigma.shape
                assert level.timestep.isfinite().all()

    def test_abilities_of_the_sampler_are_spelt_right(self, sampler: Sampler) -> None:
        """No public name of the sampler is almost that of an ability which it lacks."""
        check_names("sampler", sampler)

    def test_it_has_the_abilities_that_its_author_expects(self, sampler: Sampler) -> None:
        """Each name in `expects` is a protocol that the sampler has."""
        check_expected(self.expects, {"sampler": sampler})

    def test_draws_come_from_the_generator_alone(self, sampler: Sampler) -> None:
        """The same generator state gives the same levels; torch's global generator is neither used nor moved."""
        before = torch.get_rng_state()
        first = sampler.draw(8, torch.Generator().manual_seed(3))
        assert torch.equal(before, torch.get_rng_state()), "the global generator was moved"
        torch.rand(1)
        again = sampler.draw(8, torch.Generator().manual_seed(3))
        assert torch.equal(first.sigma, again.sigma)
        if first.timestep is not None and again.timestep is not None:
            assert torch.equal(first.timestep, again.timestep)
        torch.set_rng_state(before)

    def test_draws_differ(self, sampler: Sampler) -> None:
        """Levels spread: 256 draws, each from a generator of its own, have many values and one shape."""
        levels = [sampler.draw(1, torch.Generator().manual_seed(seed)).sigma for seed in range(256)]
        assert len({level.shape for level in levels}) == 1
        values = len(set(torch.cat(levels).flatten().tolist()))
        assert values > 64, f"256 draws have {values} values"

    def test_level_zero_is_clean_and_level_one_is_noise(self, sampler: Sampler, clean: Tensor, start: Tensor) -> None:
        """corrupt at sigma 0 gives the clean clip, at sigma 1 the noise."""
        for sigma, wanted in ((0.0, clean), (1.0, start)):
            noisy, _ = sampler.corrupt(clean, start, level_of((sigma, sigma)))
            assert gap(noisy, wanted) <= 1e-6, f"at sigma {sigma:g} it is off by {gap(noisy, wanted):.1e}"

    def test_corrupt_keeps_the_shape_and_its_inputs(self, sampler: Sampler, clean: Tensor, start: Tensor) -> None:
        """Of clips in fp32 and bf16, corrupt gives a tuple (noisy, target), both finite, shaped like `clean`, in fp32, bf16 or
        fp16: a run ends at others. The inputs are not written to."""
        for dtype in (torch.float32, torch.bfloat16):
            first, last = clean.to(dtype), start.to(dtype)
            kept = first.clone(), last.clone()
            found = sampler.corrupt(first, last, level_of((0.2, 0.7)))
            fault = corrupt_fault(found, first)
            assert not fault, fault
            for name, result in zip(("noisy", "target"), found, strict=True):
                assert result.isfinite().all(), f"{name} is not finite"
            assert torch.equal(first, kept[0]), "corrupt writes to the clean clip"
            assert torch.equal(last, kept[1]), "corrupt writes to the noise"

    def test_targets_are_those_of_the_paper(
        self, sampler: Sampler, clean: Tensor, start: Tensor, reference_target: Target
    ) -> None:
        """corrupt's target is what reference_target gives, with its sign and its scale: a solver that undoes a wrong one
        proves nothing of models that others have trained."""
        sigma = torch.tensor([0.2, 0.7])
        found, wanted = sampler.corrupt(clean, start, NoiseLevel(sigma))[1], reference_target(clean, start, sigma)
        factor = float((found * wanted).sum() / wanted.square().sum().clamp(min=1e-12))
        off = gap(found, wanted)
        as_it_is = (
            f"off by {off:.1e}" if gap(found, factor * wanted) > self.tolerance else f"the paper's times {factor:.3g}"
        )
        assert off <= self.tolerance, f"the target is {as_it_is}"

    def test_each_clip_has_its_own_level(self, sampler: Sampler, clean: Tensor, start: Tensor) -> None:
        """Corrupted in a batch, a clip is what it is alone."""
        together = sampler.corrupt(clean, start, level_of((0.2, 0.7)))
        for row, sigma in enumerate((0.2, 0.7)):
            alone = sampler.corrupt(clean[row : row + 1], start[row : row + 1], level_of((sigma,)))
            for found, wanted in zip(together, alone, strict=True):
                off = gap(found[row : row + 1], wanted)
                assert off <= 1e-6, f"a clip corrupted in a batch differs by {off:.1e}"

    def test_levels_may_differ_by_latent_frame(self, sampler: Sampler, clean: Tensor, start: Tensor) -> None:
        """corrupt takes sigma (B, f): a frame at level 0 is clean, one at level 1 noise."""
        sigma = torch.zeros(2, self.latents.frames)
        sigma[:, 1:] = 1.0
        noisy, _ = sampler.corrupt(clean, start, NoiseLevel(sigma))
        assert gap(noisy[:, :, :1], clean[:, :, :1]) <= 1e-6, "a frame at level 0 is not clean"
        assert gap(noisy[:, :, 1:], start[:, :, 1:]) <= 1e-6, "a frame at level 1 is not noise"

    def test_a_perfect_denoiser_is_solved(self, sampler: Sampler, clean: Tensor, start: Tensor) -> None:
        """Given the true target at each level, solve ends at the clean clip (within tolerance)."""
        solved = sampler.solve(lambda noisy, level: sampler.corrupt(clean, start, level)[1], start, self.steps)
        assert solved.shape == clean.shape
        assert gap(solved, clean) <= self.tolerance, f"off by {gap(solved, clean):.1e}"

    def test_predict_gets_the_level_of_its_input(self, sampler: Sampler, clean: Tensor, start: Tensor) -> None:
        """On a perfect path, what predict gets is corrupt's own noisy clip at the level that comes with it (tolerance)."""
        gaps: list[float] = []

        def perfect(noisy: Tensor, level: NoiseLevel) -> Tensor:
            wanted, target = sampler.corrupt(clean, start, level)
            gaps.append(gap(noisy, wanted))
            return target

        sampler.solve(perfect, start, self.steps)
        assert max(gaps) <= self.tolerance, f"off by {max(gaps):.1e} at call {gaps.index(max(gaps))}"

    def test_solving_goes_from_noise_to_clean_in_so_many_calls(self, sampler: Sampler, start: Tensor) -> None:
        """predict is called `steps` times, with fp32 clips, levels for each clip that fall from near 1."""
        sigmas: list[float] = []

        def predict(noisy: Tensor, level: NoiseLevel) -> Tensor:
            assert noisy.dtype is torch.float32
            assert level.sigma.shape[0] == len(noisy)
            sigmas.append(float(level.sigma.max()))
            return torch.zeros_like(noisy)

        sampler.solve(predict, start, self.steps)
        assert len(sigmas) == self.steps, f"{self.steps} steps took {len(sigmas)} predictions"
        assert sigmas[0] > 0.9, f"the first level is {sigmas[0]:g}"
        assert sigmas == sorted(sigmas, reverse=True), f"levels rise: {sigmas}"
        assert len(set(sigmas)) == self.steps, f"a level is used twice: {sigmas}"

    @pytest.mark.parametrize("number", STEPS)
    def test_any_number_of_steps_is_solved_or_refused_before(self, sampler: Sampler, number: int) -> None:
        """Each of 1 to 1000 steps ends at the clean clip; those that `check_steps` (SupportsStepCheck) refuses are not tried."""
        if isinstance(sampler, SupportsStepCheck) and sampler.check_steps(number):
            return
        shape = (1, self.latents.channels, 1, 2, 2)
        clean, start, sigmas = noise(shape, 1), noise(shape, 2), list[float]()

        def perfect(noisy: Tensor, level: NoiseLevel) -> Tensor:
            sigmas.append(float(level.sigma.max()))
            return sampler.corrupt(clean, start, level)[1]

        solved = sampler.solve(perfect, start, number)
        assert len(sigmas) == number, f"{number} steps took {len(sigmas)} predictions"
        assert sigmas == sorted(sigmas, reverse=True), f"with {number} steps, levels rise"
        # Each step rounds once.
        limit = max(self.tolerance, 1e-3)
        assert gap(solved, clean) <= limit, f"with {number} steps it is off by {gap(solved, clean):.1e}"

    def test_numbers_of_steps_are_refused_in_words(self, sampler: Sampler) -> None:
        """check_steps (SupportsStepCheck) gives problems, none for the number of steps that this kit solves with."""
        if isinstance(sampler, SupportsStepCheck):
            assert not sampler.check_steps(self.steps), f"it refuses {self.steps} steps: set `steps` of the kit"
            found = [problem for number in STEPS for problem in sampler.check_steps(number)]
            assert all(isinstance(problem, Problem) and problem.what for problem in found)

    def test_steps_one_by_one_are_what_solve_computes(self, sampler: Sampler, start: Tensor) -> None:
        """solving (SupportsStepwise) gives the latents after each step, the same bits as solve, and predicts only when asked."""
        if not isinstance(sampler, SupportsStepwise):
            return
        calls = list[int]()

        def predict(noisy: Tensor, level: NoiseLevel) -> Tensor:
            calls.append(1)
            return noisy * 0.1

        whole = sampler.solve(lambda noisy, level: noisy * 0.1, start, self.steps)
        seen = [(len(calls), state) for state in sampler.solving(predict, start, self.steps)]
        done = [number for number, _ in seen]
        assert done == list(range(1, self.steps + 1)), f"after each step it had predicted {done} times"
        assert torch.equal(seen[-1][1], whole)

    def test_a_rolled_out_input_of_a_perfect_denoiser_is_the_corrupted_one(
        self, sampler: Sampler, clean: Tensor, start: Tensor
    ) -> None:
        """advance and target_at (SupportsRollout) with the target as the prediction: what corrupt gives; clean frames stay so."""
        if not isinstance(sampler, SupportsRollout):
            return
        by_clip, by_frame = torch.full((len(clean),), 0.4), torch.full((len(clean), clean.shape[2]), 0.4)
        by_frame[:, 0] = 0
        for low in (by_clip, by_frame):
            here, above = NoiseLevel(low), NoiseLevel(torch.where(low > 0, 0.7, low))
            wanted, target = sampler.corrupt(clean, start, here)
            found = sampler.advance(sampler.corrupt(clean, start, above)[0], target, above, here)
            assert gap(found, wanted) <= self.tolerance, f"advance is off by {gap(found, wanted):.1e}"
            goal = sampler.target_at(wanted, clean, here)
            assert bool(goal.isfinite().all()), "target_at is not finite in frames that are clean"
            counted = slice(low.ndim - 1, None)
            off = gap(goal[:, :, counted], target[:, :, counted])
            # The difference is divided by the level, and so is its rounding.
            assert off <= 10 * self.tolerance, f"target_at is off by {off:.1e}"

    def test_on_step_counts_the_steps_done(self, sampler: Sampler, start: Tensor) -> None:
        """on_step is called after each step with 1, 2 ... steps and the latents; the last are the result."""
        done: list[tuple[int, Tensor]] = []
        result = sampler.solve(
            lambda noisy, level: noisy * 0.1, start, self.steps, lambda number, state: done.append((number, state))
        )
        counted = [number for number, _ in done]
        assert counted == list(range(1, self.steps + 1)), f"on_step counted {counted}"
        assert torch.equal(done[-1][1], result), "the last latents that on_step got are not the result"

    def test_solving_is_repeatable_and_keeps_its_noise(self, sampler: Sampler, start: Tensor) -> None:
        """Solved twice with one sampler: the same clip, bit for bit; the noise is not written to, no random number drawn."""
        kept, before = start.clone(), torch.get_rng_state()
        first, again = (sampler.solve(lambda noisy, level: noisy * 0.5, start, self.steps) for _ in range(2))
        assert torch.equal(start, kept), "solve writes to the noise"
        assert torch.equal(first, again), "solved again it is another clip"
        assert torch.equal(before, torch.get_rng_state()), "solve draws random numbers"

    def test_descriptions_are_texts(self, sampler: Sampler) -> None:
        """describe() gives (label, text) rows, warnings() texts."""
        assert sampler.describe()
        rows = list(sampler.describe())
        assert all(isinstance(label, str) and isinstance(text, str) for label, text in rows), f"describe() gives {rows}"
        assert all(isinstance(text, str) for text in sampler.warnings())
