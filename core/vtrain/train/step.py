"""One training step as one module: corrupt, predict with taps, flow loss, regularizers with their teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vtrain.contract import (
    Condition,
    Denoiser,
    Device,
    Family,
    FeatureEncoder,
    LatentShape,
    LossTerm,
    NoiseLevel,
    Regularizer,
    RunLength,
    Sampler,
    StepMetrics,
    StepView,
    SupportsDecoderOnly,
    SupportsFeatures,
    SupportsFeedback,
    SupportsPauses,
    SupportsTokenGrid,
    TokenGrid,
    VideoCodec,
)
from vtrain.contract.run_rules import corrupt_fault, prediction_fault, term_fault
from vtrain.data.decoding.decode import unit_range
from vtrain.plan.datasets import token_frames
from vtrain.plan.records import Plan
from vtrain.registry.blame import PartFault
from vtrain.train.rollout import Rollout, rolled_out


@contextmanager
def tapped(denoiser: Denoiser, blocks: Iterable[int], latents: LatentShape) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of `blocks`, folded to (B, f, h, w, D) and in the graph, while the with block runs.

    The hooks sit on whole blocks, outside of what non-reentrant checkpointing wraps, so that what they collect is in the
    graph. They are gone before a backward pass recomputes anything.
    """
    taps: dict[int, Tensor] = {}

    def keep(number: int) -> object:
        def hook(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            taps[number] = denoiser.fold(output[0] if isinstance(output, tuple) else output, latents)

        return denoiser.blocks[number].register_forward_hook(hook)

    handles = [keep(number) for number in blocks]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Teacher:
    """Features of a micro-batch, from the source's frames, or from those that `codec` decodes if there is one."""

    family: Family
    encoder: FeatureEncoder
    codec: VideoCodec | None

    def __call__(self, given: StepInput) -> Tensor:
        assert isinstance(self.family, SupportsTokenGrid)  # the plan refuses others
        latents = LatentShape(*given.clean.shape[1:])
        grid = self.family.token_grid(latents)
        # Cached features are made outside autocast, in the encoder's own type: these are the same numbers.
        with torch.no_grad(), Device.of(given.clean).autocast(None):
            if self.codec is None:
                assert given.frames is not None
                return self.encoder.encode(unit_range(given.frames), grid)
            chosen = token_frames(self.family, latents.frames, grid)
            # One clip after the other: a decoded clip is hundreds of times its latents.
            return torch.cat([self._decoded(self.codec, clip[None], chosen, grid) for clip in given.clean.unbind()])

    def _decoded(self, codec: VideoCodec, clip: Tensor, chosen: Sequence[int], grid: TokenGrid) -> Tensor:
        pixels = codec.decode(clip)
        # Not by a list of numbers as the index: it would be copied to the device, which waits for it.
        return self.encoder.encode(torch.stack([pixels[:, :, number] for number in chosen], 2), grid)


def open_teachers(plan: Plan, device: str, stack: ExitStack) -> Mapping[str, Teach]:
    """By regularizer, those that run at each step, in memory until `stack` closes. One codec serves them all.

    Raises ModelError.
    """
    online = [(name, part) for name, part in plan.regularizers if part.needs().features in ("decoded", "source")]
    decoding = [part for _, part in online if part.needs().features == "decoded"]
    codec = _codec(plan.family, decoding, device, stack) if decoding else None
    found: dict[str, Teach] = {}
    for name, part in online:
        assert isinstance(part, SupportsFeatures)
        encoder = stack.enter_context(part.open_feature_encoder(device))
        found[name] = Teacher(plan.family, encoder, codec if part in decoding else None)
    return found


def _codec(family: Family, decoding: list[Regularizer], device: str, stack: ExitStack) -> VideoCodec:
    codec = stack.enter_context(family.open_video_codec(device))
    # Only where all allow it: they share the codec.
    if all(part.needs().decoder_only for part in decoding) and isinstance(codec, SupportsDecoderOnly):
        codec.drop_encoder()
    return codec


@dataclass(frozen=True)
class StepInput:
    """A micro-batch with its draws, on the training device; features and frames wait for their step on the host.

    clean, noise: (B, C, f, h, w) fp32. step: steps done so far. mask: (B, f, h, w) fp32 in [0, 1], how much each latent counts
    in the flow loss, somewhere above 0 in every clip; None: all count alike. features: regularizer -> (B, f', h', w', D') of
    the clean frames, from the cache, in the type in which they are stored. frames: uint8 (B, 3, f, H, W), the source's frame
    for each frame of tokens, for teachers that run at each step. Several inputs wait for their step, so both are kept small:
    in fp32 they would be twice and four times that. rollout: of the clips whose input the denoiser makes; None: of none.
    """

    clean: Tensor
    noise: Tensor
    level: NoiseLevel
    condition: Condition
    step: int
    mask: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    frames: Tensor | None = None
    rollout: Rollout | None = None


@dataclass(frozen=True)
class StepOutput:
    """loss: scalar in the graph, the flow loss plus every term. flow (B,): per clip, detached. metrics: detached scalars."""

    loss: Tensor
    flow: Tensor
    metrics: Mapping[str, Tensor]


Teach = Callable[[StepInput], Tensor]
"""Features (B, f', h', w', D') of a micro-batch's clean frames, made now, outside the graph."""


@dataclass(frozen=True)
class Term:
    """A regularizer in a step. taps: the blocks it reads. teach: of one whose teacher runs at each step, else None."""

    module: nn.Module
    taps: tuple[int, ...]
    teach: Teach | None = None


class Step(nn.Module):
    """The denoiser and the regularizers' own modules, and what is computed with them."""

    def __init__(self, denoiser: Denoiser, sampler: Sampler, terms: Mapping[str, Term], run: RunLength) -> None:
        """terms: name -> regularizer."""
        super().__init__()
        # A Denoiser is no nn.Module: this is what DDP, the optimizer and train() find.
        self.denoiser_module = denoiser.module
        self.regularizers = nn.ModuleDict({name: term.module for name, term in terms.items()})
        self.denoiser = denoiser
        self.sampler = sampler
        self.terms = dict(terms)
        self.run = run

    def forward(self, given: StepInput) -> StepOutput:
        noisy, target = corrupted(self.sampler, given)
        if given.rollout is not None:
            inputs = (given.clean, given.noise, given.condition, noisy, target)
            noisy, target = rolled_out(self.denoiser, self.sampler, given.rollout, *inputs)
        active = {name: term for name, term in self.terms.items() if self.is_active(term.module, given.step)}
        blocks = sorted({tap for term in active.values() for tap in term.taps})
        with tapped(self.denoiser, blocks, LatentShape(*noisy.shape[1:])) as taps:
            prediction = self.denoiser.predict(noisy, given.level, given.condition)
        check_prediction(prediction, noisy, blocks, taps)
        flow = flow_loss(prediction, target, given.mask)
        loss = flow.mean()
        metrics: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if name not in active:
                loss = loss + untouched(term.module)
                continue
            view = StepView(
                clean=given.clean,
                noise=given.noise,
                noisy=noisy,
                target=target,
                prediction=prediction,
                level=given.level,
                condition=given.condition,
                taps={tap: taps[tap] for tap in term.taps},
                step=given.step,
                run=self.run,
                mask=given.mask,
                features=given.features.get(name) if term.teach is None else term.teach(given),
            )
            found: LossTerm = term.module(view)
            if fault := term_fault(found):
                raise PartFault("regularizer", name, fault)
            loss = loss + found.value
            metrics[f"{name}/loss"] = found.value.detach()
            metrics |= {f"{name}/{key}": value for key, value in found.metrics.items()}
        return StepOutput(loss, flow.detach(), metrics)

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        """The denoiser's, for who needs no more of a step: what wraps the step has gathered its weights."""
        return self.denoiser.predict(noisy, level, condition)

    def observe(self, row: StepMetrics, decide: bool) -> None:
        """Tell each regularizer that goes by its own numbers what they were."""
        for name, term in self.terms.items():
            if isinstance(term.module, SupportsFeedback):
                start = f"{name}/"
                own = {key.removeprefix(start): value for key, value in row.terms.items() if key.startswith(start)}
                term.module.observe(row.step, own, decide=decide)

    def needed(self, step: int) -> list[str]:
        """The regularizers for which something is to be prepared at this step: all that are not over by then."""
        return [
            name
            for name, term in self.terms.items()
            if not isinstance(term.module, SupportsPauses) or not term.module.over(step, self.run)
        ]

    def is_active(self, module: nn.Module, step: int) -> bool:
        """Whether a regularizer does anything at this step."""
        return not isinstance(module, SupportsPauses) or module.active(step, self.run)


def corrupted(sampler: Sampler, given: StepInput) -> tuple[Tensor, Tensor]:
    """(noisy, target). Raises PartFault if the sampler gives something else."""
    found = sampler.corrupt(given.clean, given.noise, given.level)
    if fault := corrupt_fault(found, given.clean):
        raise PartFault("sampler", "", fault)
    return found


def check_prediction(prediction: object, noisy: Tensor, blocks: Iterable[int], taps: Mapping[int, Tensor]) -> None:
    """Raises PartFault for a prediction that is none, and for blocks that did not run. Nothing is read from the device."""
    fault = prediction_fault(prediction, noisy)
    if not fault and (cold := [block for block in blocks if block not in taps]):
        fault = f"its predict did not run block {', '.join(map(str, cold))}, which a regularizer reads"
    if fault:
        raise PartFault("family", "", fault)


def flow_loss(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error, (B,) fp32: the mean over a clip; with a mask (B, f, h, w), weighted by it and divided by its area."""
    # In fp32 before the difference: what autocast predicts is bf16, with 8 bits of precision.
    error = (prediction.float() - target.float()).square()
    if mask is None:
        return error.flatten(1).mean(1)
    # By each clip's own area: one with a small mask counts as much as any other.
    return (error.mean(1) * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)  # never 0: StepInput.mask


def untouched(module: nn.Module) -> Tensor | float:
    """0, with a gradient of 0 for each trained parameter: processes that train together wait for every gradient."""
    return sum(0.0 * parameter.sum() for parameter in module.parameters() if parameter.requires_grad)


def clip_gradients(parameters: list[Tensor], method: str, limit: float, norm: Tensor | None) -> None:
    """Clip in place, by "norm" or "value". norm: of all gradients together, for the first. Never reads the device."""
    if method == "value":
        nn.utils.clip_grad_value_(parameters, limit)
    else:
        assert norm is not None
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def gradient_norm(parameters: list[Tensor]) -> Tensor:
    """2-norm of all gradients together, a scalar on their device; fp32 also of bf16 gradients, whose own norm has three digits."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
