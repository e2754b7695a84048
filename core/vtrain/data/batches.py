"""Micro-batches by number: which samples, under which draw numbers, with which text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat

import torch

from vtrain.contract import Caption, DataError, Latents, PluginError, Problem, Text
from vtrain.data.caches import DROPPED, Caches
from vtrain.data.draws import drawn
from vtrain.data.order import Order
from vtrain.data.sample import Sample
from vtrain.data.seeds import chance, choice
from vtrain.plan.records import Plan

ROUND = 8
"""Attention kernels read masks in pieces of eight."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B clips of one shape.

    latents: mean (B, C, f, h, w) fp32, drawn anew from mean and std where those are cached. text: embeds (B, L, D) with L
    just enough for its longest text, zero where the mask is false. draws: each sample's draw number, from which its noise
    derives. dropped: whose caption was dropped.
    """

    micro_batch: int
    latents: Latents
    text: Text
    draws: tuple[int, ...]
    sample_ids: tuple[str, ...]
    dropped: tuple[bool, ...]


class Batches:
    """batches[m] for every m >= 0, in any order and in any process: a pure function of plan, samples and m.

    samples: those of the scan that survived filling, the same in every process.
    """

    def __init__(self, plan: Plan, caches: Caches, samples: Sequence[Sample]) -> None:
        if not samples:
            raise DataError(Problem("", "there is no sample to train on."))
        self._plan, self._caches, self._samples = plan, caches, samples
        shapes = {shape: number for number, shape in enumerate(sorted({sample.shape for sample in samples}))}
        uses = [1 + plan.datasets[sample.place].table.repeats for sample in samples]
        self._ends = list(accumulate(uses))
        buckets = [shapes[s.shape] for s, n in zip(samples, uses, strict=True) for _ in repeat(None, n)]
        self._order = Order(plan.config.run.seed, buckets, plan.config.train.batch_size)

    @property
    def epoch_length(self) -> int:
        """Draws in an epoch: samples, each counted once more per repeat."""
        return self._order.length

    def micro_batches(self, epochs: float) -> int:
        """Micro-batches complete when that many epochs, not always whole, have passed."""
        return self._order.micro_batches(epochs)

    def epoch_of(self, micro_batch: int) -> float:
        """Epochs passed when that micro-batch is complete."""
        return self._order.epoch_of(micro_batch)

    def __getitem__(self, micro_batch: int) -> Batch:
        """Raises IndexError for a negative number, DataError if an entry is missing or damaged."""
        draws = self._order.draws(micro_batch)
        samples = [self._samples[bisect_right(self._ends, draw.item)] for draw in draws]
        numbers = tuple(draw.number for draw in draws)
        dropped = tuple(map(self._drops, numbers))
        texts = [
            self._caches.text(DROPPED, "dropped")
            if drop
            else self._caches.text(self._caption(sample, number), "prompt")
            for sample, number, drop in zip(samples, numbers, dropped, strict=True)
        ]
        clips = [
            self._caches.latents(sample, self._start(sample, number))
            for sample, number in zip(samples, numbers, strict=True)
        ]
        text = pad(texts, self._plan.family.text_tokens)
        latents = Latents(drawn(self._plan.config.run.seed, clips, numbers))
        return Batch(micro_batch, latents, text, numbers, tuple(s.id for s in samples), dropped)

    def _start(self, sample: Sample, draw: int) -> float:
        """The window that this draw uses."""
        return sample.starts[choice(self._plan.config.run.seed, "window", draw, len(sample.starts))]

    def _caption(self, sample: Sample, draw: int) -> Caption:
        """The caption that this draw uses."""
        return sample.captions[choice(self._plan.config.run.seed, "caption", draw, len(sample.captions))]

    def _drops(self, draw: int) -> bool:
        """Whether this draw's caption is dropped: from the seed and the draw number alone."""
        return chance(self._plan.config.run.seed, "caption_dropout", draw) < self._plan.config.train.caption_dropout


def pad(texts: Sequence[Text], tokens: int) -> Text:
    """Texts (1, L, D) of different L -> one Text (B, L, D), zeros after the real tokens.

    L is the longest's, rounded up to a whole ROUND, and at most `tokens`: padding to more changes no prediction and costs time.
    """
    longest = max(text.embeds.shape[1] for text in texts)
    if longest > tokens:
        what = f"a caption was encoded to {longest} tokens where the model family takes {tokens}."
        raise PluginError(Problem("", what, "This is a fault of the model family's plugin."))
    tokens = min(tokens, -(-longest // ROUND) * ROUND)
    first = texts[0].embeds
    embeds = first.new_zeros((len(texts), tokens, first.shape[2]))
    mask = torch.zeros((len(texts), tokens), dtype=torch.bool)
    for row, text in enumerate(texts):
        embeds[row, : text.embeds.shape[1]] = text.embeds[0]
        mask[row, : text.embeds.shape[1]] = True
    return Text(embeds, mask)
