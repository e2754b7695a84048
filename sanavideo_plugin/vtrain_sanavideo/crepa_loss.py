"""CREPA's loss (Cross-frame Representation Alignment, arXiv 2506.09229): projector, alignment, weight."""

# mypy: allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vtrain.contract import Device, LossTerm, RunLength, StepView
from vtrain_sanavideo.crepa_options import CrepaOptions, ProjectorOptions, Schedule, SimilarityGate

SHORTEST = 1e-8
"""A vector shorter than this has a cosine of 0 with all others."""

WIDEST = 1024
"""Of the projector, unless the options say more: matrices in fp32 are slow, and a step has tens of thousands of tokens."""

AT_ONCE = 4096
"""Tokens that are aligned together, but at least a frame of every clip: enough for a GPU's matrix products to be fast."""


def projector(options: ProjectorOptions, width: int, features: int) -> nn.Sequential:
    """Linear layers with SiLU between them, `width` to `features`, fp32."""
    hidden = [options.hidden or min(width, WIDEST)] * (options.layers - 1)
    layers: list[nn.Module] = []
    for inner, outer in pairwise([width, *hidden, features]):
        layers += [nn.Linear(inner, outer), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def on_tokens(features: Tensor, height: int, width: int) -> Tensor:
    """(B, f, h', w', D) -> (B, f, height, width, D), at least fp32, resampled in both directions of space at once.

    Bilinear, corners not aligned: positions are shares of the frame, whatever its shape. Averaged where it shrinks.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if features.shape[2:4] == (height, width):
        return features
    batch = features.shape[0]
    # As pictures: resampled along the flattened tokens, features of a grid that is not square would change their place.
    planes = features.flatten(0, 1).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    resampled: Tensor = planes.permute(0, 2, 3, 1).unflatten(0, (batch, -1))
    return resampled


@dataclass(frozen=True)
class Alignment:
    """Scalars. loss: L_align. similarity: mean cosine of a frame with itself; neighbours: with those beside it.

    neighbours is weighted as in the loss, divided by the sum of weights; 0 where no frame has one.
    """

    loss: Tensor
    similarity: Tensor
    neighbours: Tensor


def mean_of(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of tokens (B, f, h, w); with a mask (B, f', h', w') of latents weighted by it, each clip's by its own area."""
    if mask is None:
        return values.mean()
    _, frames, height, width = values.shape
    weights = F.adaptive_avg_pool3d(mask[:, None], (frames, height, width))[:, 0]
    return ((values * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)).mean()


def align(
    features: Tensor,
    hidden: Tensor,
    distances: Sequence[int],
    decay: float,
    mask: Tensor | None = None,
    project: nn.Module | None = None,
) -> Alignment:
    """L_align = -mean over clips, frames and tokens of sim(y_f, h_f) + sum over k of exp(-|k - f| / decay) sim(y_k, h_f).

    k: f - d and f + d for each d of `distances`, where there is such a frame. features y: (B, f, h', w', D), no part of a
    graph, resampled to the tokens. hidden: (B, f, h, w, D'), of which `project` makes h, in its weights' type; without it
    they are h. mask: how much each latent counts, ours: the tokens h_f of a clip are weighted by it. The gradient can be taken
    once, and not be differentiated again.
    """
    reached = [distance for distance in distances if distance < hidden.shape[1]]
    nearest = math.exp(-min(reached) / decay) if reached else 0.0
    # Relative to the nearest ones, so that a small decay leaves no zeros.
    reach = {distance: math.exp((min(reached) - distance) / decay) for distance in reached}

    def loss_of(cosines: Tensor) -> Tensor:
        return -(mean_of(cosines[0], mask) + nearest * mean_of(cosines[1], mask))

    part = partial(cosines_of, features, reach, project)
    trained = [weight for weight in project.parameters() if weight.requires_grad] if project else []
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        loss, found = InParts.apply(part, loss_of, hidden, *trained)
    else:
        found = torch.cat([part(hidden[:, frames], frames) for frames in parts(hidden)], 2)
        loss = loss_of(found)
    counted = found.new_zeros((hidden.shape[1], 1, 1))
    for distance, weight in reach.items():
        counted[:-distance] += weight
        counted[distance:] += weight
    of = mean_of(counted.expand(found.shape[1:]), mask)
    return Alignment(loss, mean_of(found[0], mask), mean_of(found[1], mask) / of.clamp_min(SHORTEST))


def cosines_of(
    features: Tensor, reach: Mapping[int, float], project: nn.Module | None, hidden: Tensor, frames: slice
) -> Tensor:
    """(2, B, n, h, w): of the tokens of n frames with their own features, and with those beside, weighted and summed.

    reach: distance -> weight of the frames that far away. hidden: (B, n, h, w, D') of these frames, features of all.
    """
    own, beside = targets(features, reach, frames, *hidden.shape[2:4])
    if project is not None:
        hidden = project(hidden.to(next(project.parameters()).dtype))
    length = torch.linalg.vector_norm(hidden, dim=-1).clamp_min(SHORTEST)
    return torch.stack([(own * hidden).sum(-1) / length, (beside * hidden).sum(-1) / length])


def targets(
    features: Tensor, reach: Mapping[int, float], frames: slice, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """The directions of some frames' features, and the weighted sum of the directions beside them, (B, n, height, width, D)."""
    far = max(reach, default=0)
    first, last = max(frames.start - far, 0), min(frames.stop + far, features.shape[1])
    around = F.normalize(on_tokens(features[:, first:last], height, width), dim=-1, eps=SHORTEST)
    own = around[:, frames.start - first : frames.stop - first]
    beside = torch.zeros_like(own)
    for distance, weight in reach.items():
        for shift in (distance, -distance):
            start, stop = max(frames.start, -shift), min(frames.stop, features.shape[1] - shift)
            if start < stop:
                neighbours = around[:, start + shift - first : stop + shift - first]
                beside[:, start - frames.start : stop - frames.start] += weight * neighbours
    return own, beside


def parts(hidden: Tensor) -> list[slice]:
    """The frames of (B, f, h, w, D), some at a time."""
    frames = hidden.shape[1]
    some = max(1, AT_ONCE * frames // hidden[..., 0].numel())
    return [slice(start, min(start + some, frames)) for start in range(0, frames, some)]


class InParts(torch.autograd.Function):
    """A loss linear in cosines, whose gradients are made in the forward pass, by autograd, some frames at a time.

    How such a loss weighs a cosine is known before the cosine is, so a part's gradients follow right after the part, and what
    they were made of is gone before the next. Only the gradients of `hidden`, in its type, and of the projector's weights wait for
    the backward pass, which scales them. Nothing is computed twice, as checkpointing would.
    """

    @staticmethod
    def forward(
        ctx: Any,
        part: Callable[[Tensor, slice], Tensor],
        loss_of: Callable[[Tensor], Tensor],
        hidden: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(the loss, all cosines (2, B, f, h, w), outside the graph). part: the cosines of some frames. hidden: (B, f, h, w, D)."""
        gradient, sums = torch.empty_like(hidden), list[Tensor]()
        found, slopes = [], None
        for frames in parts(hidden):
            with torch.enable_grad():
                # A leaf of its own: each part's graph ends here, and is freed with it.
                some = hidden[:, frames].detach().requires_grad_()
                made = part(some, frames)
                if slopes is None:
                    blank = made.new_zeros((2, *hidden.shape[:-1]), requires_grad=True)
                    (slopes,) = torch.autograd.grad(loss_of(blank), blank)
                gradient[:, frames], *own = torch.autograd.grad(made, (some, *weights), slopes[:, :, frames])
            found.append(made.detach())
            sums = [total.add_(each) for total, each in zip(sums, own, strict=True)] if sums else own
        ctx.gradients = gradient, *sums
        together = torch.cat(found, 2)
        ctx.mark_non_differentiable(together)
        return loss_of(together), together

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scales in place: a copy of the projector's gradients would be seen in the time of a small model's step."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of CREPA's loss can be taken once: it is made beforehand, and freed")
        return None, None, *(each.mul_(scale) for each in gradients)


class CrepaLoss(nn.Module):
    """The LossModule: aligns a block's output with features of the clean frames. SupportsPauses, SupportsFeedback,
    SupportsLearningRate. Its running mean of the similarity lives on the host and is saved with its weights."""

    def __init__(self, options: CrepaOptions, width: int, features: int) -> None:
        """width: of the block's output; features: of the encoder's vectors."""
        super().__init__()
        self.projector = projector(options.projector, width, features)
        self._options = options
        self._schedule = Schedule(options.weight, options.schedule)
        self._gate = SimilarityGate(options.schedule)
        distance = options.adjacent_distance
        self._distances = range(1 if options.cumulative_neighbors else max(distance, 1), distance + 1)

    @property
    def lr_factor(self) -> float:
        return self._options.projector.lr_factor

    def active(self, step: int, run: RunLength) -> bool:
        if self._schedule.weight(step, run) == 0:
            return False
        return not self._gate.closed or self._gate.probes(step)

    def over(self, step: int, run: RunLength) -> bool:
        return self._gate.for_good or self._schedule.weight(step, run) == 0

    def observe(self, step: int, metrics: Mapping[str, float], *, decide: bool) -> None:
        if "similarity" in metrics:
            self._gate.tell(step, metrics["similarity"])
        if decide:
            self._gate.decide()

    def forward(self, view: StepView) -> LossTerm:
        """Shut off by the gate, it only measures: its value is 0, and no gradient of the denoiser comes from it."""
        weight = 0.0 if self._gate.closed else self._schedule.weight(view.step, view.run)
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            found = self._alignment(view)
        value = weight * found.loss if weight > 0 else self._nothing()
        return LossTerm(
            value,
            {
                "alignment_loss": found.loss.detach(),
                "similarity": found.similarity.detach(),
                "neighbour_similarity": found.neighbours.detach(),
                # Filled on the device: a number copied there would be waited for.
                "weight": torch.full_like(found.loss.detach(), weight),
            },
        )

    def _alignment(self, view: StepView) -> Alignment:
        tap = view.taps[self._options.block]
        self._check(tap, view.features)
        assert view.features is not None
        # Projector and cosines are fp32, which autocast would make bf16 products of.
        with Device.of(tap).autocast(None):
            return align(view.features, tap, self._distances, self._options.temporal_decay, view.mask, self.projector)

    def _nothing(self) -> Tensor:
        """0, with a gradient of 0 for each weight: processes that train together wait for every gradient."""
        return torch.stack([weight.sum() * 0.0 for weight in self.parameters()]).sum()

    def _check(self, tap: Tensor, features: Tensor | None) -> None:
        last = self.projector[-1]
        assert isinstance(last, nn.Linear)
        if features is None or features.ndim != 5:
            found = "none" if features is None else str(tuple(features.shape))
            raise ValueError(f"CREPA needs features (B, f, h, w, D) of the clean frames, not {found}")
        if features.shape[:2] != tap.shape[:2] or features.shape[4] != last.out_features:
            wanted = f"{tuple(tap.shape[:2])} and of width {last.out_features}"
            raise ValueError(f"features {tuple(features.shape)} are not of the clips and frames {wanted}")

    def get_extra_state(self) -> Tensor:
        # The floats of Python bit for bit, so that a resumed run draws the same conclusions.
        return torch.tensor(self._gate.state(), dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        if state.shape != (4,):
            raise ValueError(f"the running mean of the similarity is four numbers, not {tuple(state.shape)}")
        self._gate.restore(*state.tolist())
