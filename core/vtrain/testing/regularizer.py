"""Rules of a regularizer, and of its features where it asks for some."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from vtrain.contract import (
    ClipShape,
    Condition,
    Device,
    LatentShape,
    LossTerm,
    NoiseLevel,
    Regularizer,
    RunLength,
    StepView,
    SupportsFeatureMemory,
    SupportsFeatures,
    Text,
    TokenGrid,
)
from vtrain.contract.run_rules import loss_fault, metric_fault
from vtrain.testing.memory import encoder_memory, survivors
from vtrain.testing.sampler import check_expected, check_names, digest, gap, level_of, moving_picture, noise, required


def encoding(regularizer: Regularizer) -> SupportsFeatures:
    """The regularizer, if it has an encoder; skips otherwise."""
    if regularizer.needs().features is None:
        pytest.skip("this regularizer asks for no features")
    assert isinstance(regularizer, SupportsFeatures), "features are asked for and SupportsFeatures is missing"
    return regularizer


class FeatureTests:
    """A frozen encoder of pictures, on small clips. Skipped by a regularizer that asks for no features.

    feature_tolerance: largest difference, relative to the largest value, between a frame encoded alone and among others.
    """

    patch: int
    pixels: int
    feature_tolerance: float = 1e-4

    if TYPE_CHECKING:

        def loaded(self, regularizer: Regularizer) -> nn.Module: ...

    def clips(self) -> Iterator[tuple[ClipShape, TokenGrid]]:
        """Small clips, wide and high, with their tokens, as a family of this patch and pixels has them."""
        edge = self.pixels * self.patch
        for frames, height, width in ((2, 2, 3), (1, 3, 2)):
            yield ClipShape(4 * frames - 3, height * edge, width * edge), TokenGrid(frames, height, width)

    def test_feature_arithmetic_equals_what_the_encoder_gives(self, regularizer: Regularizer) -> None:
        """feature_shape is the shape of what encode returns; features are finite and carry no gradient."""
        part = encoding(regularizer)
        with part.open_feature_encoder("cpu") as encoder:
            for clip, grid in self.clips():
                found = encoder.encode(moving_picture(clip._replace(frames=grid.frames), batch=2), grid)
                assert tuple(found.shape) == (2, *part.feature_shape(clip, grid)), f"{clip}: encode gave {found.shape}"
                assert found.isfinite().all()
                assert not found.requires_grad

    def test_features_are_of_the_frames_one_for_one(self, regularizer: Regularizer) -> None:
        """A clip's features are the same each time, alone and in a batch; another clip's are others."""
        part = encoding(regularizer)
        clip, grid = next(self.clips())
        frames = moving_picture(clip._replace(frames=grid.frames), batch=2)
        with part.open_feature_encoder("cpu") as encoder:
            together = encoder.encode(frames, grid)
            assert gap(encoder.encode(frames[:1], grid), together[:1]) <= self.feature_tolerance
            assert gap(encoder.encode(frames[1:], grid), together[1:]) <= self.feature_tolerance
            first = encoder.encode(frames[:, :, :1], grid._replace(frames=1))
            assert gap(first, together[:, :1]) <= self.feature_tolerance, "a frame's features depend on other frames"
            assert not torch.equal(together[0], together[1])

    def test_the_fingerprint_of_features_stays(self, regularizer: Regularizer) -> None:
        """feature_fingerprint gives the same text each time, and the storage type is fp32 or bf16."""
        part = encoding(regularizer)
        first, second = (part.feature_fingerprint(digest) for _ in range(2))
        assert first == second, "the fingerprint of features is another one the second time"
        assert first, "the fingerprint of features is empty"
        assert part.feature_dtype in ("fp32", "bf16")

    def test_the_encoder_takes_the_memory_that_it_says(self, regularizer: Regularizer) -> None:
        """feature_memory gives the bytes of the weights that opening it makes, and its work within 15% of what is counted."""
        part = encoding(regularizer)
        if not isinstance(part, SupportsFeatureMemory):
            pytest.skip("this regularizer does not say what its encoder takes (SupportsFeatureMemory)")
        edge, grid = self.pixels * self.patch, TokenGrid(3, 12, 16)
        clip = ClipShape(4 * grid.frames - 3, grid.height * edge, grid.width * edge)
        said = part.feature_memory(2, clip, grid)
        if said is None or said.encode is None:
            pytest.skip("this encoder was never measured, or its weights are not there")
        frames = moving_picture(clip._replace(frames=grid.frames), batch=2)
        weights, work = encoder_memory(
            lambda: part.open_feature_encoder("cpu"), frames, lambda encoder: encoder.encode(frames, grid)
        )
        assert said.weights == pytest.approx(weights, rel=0.01), f"its weights are {weights:,} bytes"
        found = f"its work takes {work:,} bytes, and feature_memory says {said.encode.of(clip):,.0f}"
        assert said.encode.of(clip) == pytest.approx(work, rel=0.15), found

    def test_the_encoder_is_no_part_of_the_module_and_is_released(self, regularizer: Regularizer) -> None:
        """Nothing of the encoder is in memory after its with block, a module loaded before and after included."""
        part = encoding(regularizer)
        clip, grid = next(self.clips())
        frames = moving_picture(clip._replace(frames=grid.frames))
        module = self.loaded(regularizer)
        with part.open_feature_encoder("cpu") as encoder:
            if isinstance(encoder, nn.Module):
                own = {id(weight) for weight in module.parameters()}
                assert own.isdisjoint(map(id, encoder.parameters())), "the module shares the encoder's weights"
            del encoder
        left = survivors(lambda: part.open_feature_encoder("cpu"), lambda encoder: encoder.encode(frames, grid))
        assert not left, f"still in memory: {', '.join(left)}"


class RegularizerTests(FeatureTests):
    """A loss term, on views of random numbers that no family made.

    latents: of a clip. patch: latents of a token, each way; pixels: of a latent, each way. tap_width: D of every tap.
    step: optimizer steps done, at which the term is at work. stopped: taps that it reads and sends no gradient to.
    expects: names of the optional protocols (SupportsFeatures, SupportsFeedback ...) that it and its module are meant to have.
    """

    latents: LatentShape = LatentShape(4, 3, 4, 6)
    patch: int = 2
    pixels: int = 8
    tap_width: int = 24
    step: int = 0
    stopped: tuple[int, ...] = ()
    expects: frozenset[str] = frozenset()

    @pytest.fixture(scope="class")
    @classmethod
    def regularizer(cls) -> Regularizer:
        """The regularizer, built from its options. Override it."""
        required("regularizer", "the Regularizer under test, built from its options, scope class")

    @pytest.fixture
    def module(self, regularizer: Regularizer) -> nn.Module:
        return self.loaded(regularizer)

    def loaded(self, regularizer: Regularizer) -> nn.Module:
        return regularizer.load(dict.fromkeys(regularizer.needs().taps, self.tap_width))

    def view(
        self, regularizer: Regularizer, seed: int = 0, frames: int = 3, dtype: torch.dtype = torch.float32
    ) -> StepView:
        """A step on random numbers, with the taps that the regularizer needs."""
        shape = (2, *self.latents._replace(frames=frames))
        clean, drawn = noise(shape, seed), noise(shape, seed + 1)
        level: NoiseLevel = level_of((0.3, 0.8))
        sigma = level.sigma.view(2, 1, 1, 1, 1)
        grid = TokenGrid(frames, self.latents.height // self.patch, self.latents.width // self.patch)
        return StepView(
            clean=clean,
            noise=drawn,
            noisy=(1 - sigma) * clean + sigma * drawn,
            target=drawn - clean,
            prediction=noise(shape, seed + 2).requires_grad_(),
            level=level,
            condition=Condition(Text.of(noise((2, 5, 8), seed + 3), torch.ones(2, 5, dtype=torch.bool))),
            taps={
                tap: noise((2, *grid, self.tap_width), seed + 4 + tap).to(dtype).requires_grad_()
                for tap in regularizer.needs().taps
            },
            step=self.step,
            run=RunLength(1000, 10.0),
            features=self.features(regularizer, grid, seed + 90),
        )

    def features(self, regularizer: Regularizer, grid: TokenGrid, seed: int) -> Tensor | None:
        """Random features of the shape that the regularizer's encoder would give."""
        if regularizer.needs().features is None:
            return None
        assert isinstance(regularizer, SupportsFeatures), "features are asked for and SupportsFeatures is missing"
        pixels = self.pixels * self.patch
        clip = ClipShape(max(1, grid.frames * 4 - 3), grid.height * pixels, grid.width * pixels)
        return noise((2, *regularizer.feature_shape(clip, grid)), seed)

    @staticmethod
    def loss(module: nn.Module, view: StepView) -> LossTerm:
        """The module's term; what it draws from torch's global generator is the same each time."""
        with torch.random.fork_rng(devices=[]):
            Device().seed(0)
            term: LossTerm = module(view)
        return term

    def test_needs_are_pure(self, regularizer: Regularizer) -> None:
        """needs() gives the same each time: block numbers from 0, none twice."""
        taps = regularizer.needs().taps
        assert taps == regularizer.needs().taps, "needs() gives other taps the second time"
        assert all(isinstance(tap, int) and tap >= 0 for tap in taps)
        assert len(set(taps)) == len(taps)

    def test_abilities_of_the_term_are_spelt_right(self, regularizer: Regularizer, module: nn.Module) -> None:
        """No public name of the regularizer, or of its module, is almost that of an ability which it lacks."""
        check_names("regularizer", regularizer)
        check_names("loss module", module)

    def test_it_has_the_abilities_that_its_author_expects(self, regularizer: Regularizer, module: nn.Module) -> None:
        """Each name in `expects` is a protocol that the regularizer or its module has."""
        check_expected(self.expects, {"regularizer": regularizer, "loss module": module})

    def test_the_loss_is_a_finite_scalar(self, regularizer: Regularizer, module: nn.Module) -> None:
        """The term's value is a finite scalar tensor in the graph, in fp32, bf16 or fp16: a run ends at others."""
        term = self.loss(module, self.view(regularizer))
        fault = loss_fault(term)
        assert not fault, fault
        assert term.value.isfinite(), f"the value is {term.value.item()}"

    def test_the_loss_reaches_every_tap(self, regularizer: Regularizer, module: nn.Module) -> None:
        """The value has a gradient, not all zero, in each tap but those it stops at; without taps, in the prediction."""
        view = self.view(regularizer)
        torch.autograd.backward(self.loss(module, view).value)
        assert all(view.taps[tap].grad is None for tap in self.stopped), "a tap that it stops at gets a gradient"
        read: dict[str, Tensor] = {f"tap {tap}": value for tap, value in view.taps.items() if tap not in self.stopped}
        for name, tensor in (read or {"the prediction": view.prediction}).items():
            assert tensor.grad is not None, f"{name} gets no gradient"
            assert tensor.grad.any(), f"{name} gets a gradient of zeros"
            assert tensor.grad.isfinite().all(), f"{name} gets a gradient that is not finite"

    def test_its_own_parameters_are_trained(self, regularizer: Regularizer, module: nn.Module) -> None:
        """Every parameter of the module that asks for a gradient gets one that is not all zero."""
        torch.autograd.backward(self.loss(module, self.view(regularizer)).value)
        dry = [
            name
            for name, weight in module.named_parameters()
            if weight.requires_grad and (weight.grad is None or not weight.grad.any())
        ]
        assert not dry, f"without a gradient: {', '.join(dry)}"

    def test_clean_clips_noise_and_targets_get_no_gradient(self, regularizer: Regularizer, module: nn.Module) -> None:
        """The view is read, not written: its tensors are unchanged and its inputs stay out of the graph."""
        view = self.view(regularizer)
        read = (view.clean, view.noise, view.noisy, view.target, *view.taps.values())
        kept = [tensor.detach().clone() for tensor in read]
        torch.autograd.backward(self.loss(module, view).value)
        same = all(torch.equal(tensor.detach(), copy) for tensor, copy in zip(read, kept, strict=True))
        assert same, "it writes to what it is given"
        assert not any(tensor.requires_grad for tensor in (view.clean, view.noise, view.noisy, view.target))

    def test_features_are_read_and_get_no_gradient(self, regularizer: Regularizer, module: nn.Module) -> None:
        """Other features of the clean frames give another loss, unless the regularizer asks for none."""
        if regularizer.needs().features is None:
            pytest.skip("this regularizer asks for no features")
        view = self.view(regularizer)
        assert view.features is not None
        other = replace(view, features=view.features.flip(-1))
        assert self.loss(module, view).value != self.loss(module, other).value, "other features change nothing"

    def test_metrics_are_detached_scalars(self, regularizer: Regularizer, module: nn.Module) -> None:
        """Each metric is a scalar tensor outside the graph, so that logging it costs nothing until it is read."""
        for name, metric in self.loss(module, self.view(regularizer)).metrics.items():
            fault = metric_fault(name, metric)
            assert not fault, fault

    def test_one_latent_frame_is_enough(self, regularizer: Regularizer, module: nn.Module) -> None:
        """A clip of one latent frame (a picture) gives a finite value that can be trained on."""
        value = self.loss(module, self.view(regularizer, frames=1)).value
        assert value.isfinite(), f"of a picture the value is {value.item()}"
        torch.autograd.backward(value)

    def test_a_step_without_a_difference_is_finite(self, regularizer: Regularizer, module: nn.Module) -> None:
        """With taps of zeros and a prediction that is the target, value and gradients are finite: no root or norm divides by 0."""
        view = self.view(regularizer)
        with torch.no_grad():
            view.prediction.copy_(view.target)
            for tap in view.taps.values():
                tap.zero_()
        value = self.loss(module, view).value
        assert value.isfinite(), f"the value is {value.item()}"
        torch.autograd.backward(value)
        read = {f"tap {number}": tap for number, tap in view.taps.items()} | {"the prediction": view.prediction}
        odd = [name for name, tensor in read.items() if tensor.grad is not None and not tensor.grad.isfinite().all()]
        assert not odd, f"the gradient in {', '.join(odd)} is not finite"

    def test_bf16_taps_are_taken(self, regularizer: Regularizer, module: nn.Module) -> None:
        """Taps in bf16, as under autocast, give a finite value that a run takes."""
        with Device().autocast("bf16"):
            term = self.loss(module, self.view(regularizer, dtype=torch.bfloat16))
        fault = loss_fault(term)
        assert not fault, f"of bf16 taps {fault}"
        assert term.value.isfinite(), f"of bf16 taps the value is {term.value.item()}"

    def test_its_state_comes_back(self, regularizer: Regularizer, module: nn.Module) -> None:
        """A second module with the first one's state gives the same loss, bit for bit."""
        with torch.no_grad():
            for seed, weight in enumerate(module.parameters()):
                weight.add_(0.1 * noise(weight.shape, seed).to(weight))
        other = self.loaded(regularizer)
        other.load_state_dict(module.state_dict())
        view = self.view(regularizer)
        one, two = self.loss(module, view).value, self.loss(other, view).value
        assert torch.equal(one, two), (
            f"with its state in another module the value is {two.item():g}, not {one.item():g}"
        )

    def test_descriptions_are_pairs_of_texts(self, regularizer: Regularizer) -> None:
        """describe() gives (label, text) rows."""
        rows = list(regularizer.describe())
        assert all(isinstance(label, str) and isinstance(text, str) for label, text in rows), f"describe() gives {rows}"
