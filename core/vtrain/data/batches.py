"""Micro-batches by number: which samples, under which draw numbers, with which text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vtrain.contract import DataError, Latents, PluginError, Problem, Text
from vtrain.data.caching.caches import DROPPED, Caches
from vtrain.data.draws import drawn
from vtrain.data.index import Index
from vtrain.data.order import Order
from vtrain.data.seeds import chance, choice
from vtrain.plan.records import Plan

ROUND = 8
"""Attention kernels read masks in pieces of eight."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B clips of one shape.

    latents: mean (B, C, f, h, w) fp32, drawn anew from mean and std where those are cached. text: embeds (B, L, D) with L
    just enough for its longest text, zero where the mask is false. draws: each sample's draw number, from which its noise
    derives. dropped: whose caption was dropped. first_frame: which are drawn as image-to-video: the first latent frame is given.
    """

    micro_batch: int
    latents: Latents
    text: Text
    draws: tuple[int, ...]
    sample_ids: tuple[str, ...]
    dropped: tuple[bool, ...]
    first_frame: tuple[bool, ...] = ()


class Batches:
    """batches[m] for every m >= 0, in any order and in any process: a pure function of plan, index and m.

    index: of the samples whose entries are in the caches, the same in every process.
    """

    def __init__(self, plan: Plan, caches: Caches, index: Index) -> None:
        if not len(index):
            raise DataError(Problem("", "there is no sample to train on."))
        self._plan, self._caches, self._index = plan, caches, index
        uses = np.array([1 + dataset.table.repeats for dataset in plan.datasets], dtype=np.int32)
        # Item k is a use of sample number self._samples[k]; without repeats they are the same.
        every = np.arange(len(index), dtype=np.int32)
        self._samples = every if (uses == 1).all() else np.repeat(every, uses[index.datasets])
        self._order = Order(
            plan.config.run.seed,
            index.buckets[self._samples],
            plan.config.train.batch_size,
            index.datasets[self._samples],
            plan.shares,
        )

    def micro_batches(self, epochs: float) -> int:
        """Micro-batches complete when that many epochs, not always whole, have passed."""
        return self._order.micro_batches(epochs)

    def epoch_of(self, micro_batch: int) -> float:
        """Epochs passed when that micro-batch is complete."""
        return self._order.epoch_of(micro_batch)

    def __getitem__(self, micro_batch: int) -> Batch:
        """Raises IndexError for a negative number, DataError if an entry is missing or damaged."""
        draws = self._order.draws(micro_batch)
        samples = [int(self._samples[draw.item]) for draw in draws]
        numbers = tuple(draw.number for draw in draws)
        dropped = tuple(map(self._drops, numbers))
        texts = [
            self._caches.text(DROPPED, "dropped")
            if drop
            else self._caches.text_entry(self._chosen("caption", self._index.text.keys(sample), number))
            for sample, number, drop in zip(samples, numbers, dropped, strict=True)
        ]
        windows = [
            self._chosen("window", self._index.video.keys(sample), number)
            for sample, number in zip(samples, numbers, strict=True)
        ]
        clips = self._caches.video_entries(windows)
        text = pad(texts, self._plan.family.text_tokens)
        latents = Latents(drawn(self._plan.config.run.seed, clips, numbers))
        moving = latents.mean.shape[2] > 1
        first_frame = tuple(moving and self._continues(*pair) for pair in zip(samples, numbers, strict=True))
        return Batch(micro_batch, latents, text, numbers, tuple(map(self._index.id, samples)), dropped, first_frame)

    def _chosen(self, purpose: str, keys: Sequence[str], draw: int) -> str:
        """Of the keys of a sample's windows, or captions, the one that this draw uses."""
        return keys[choice(self._plan.config.run.seed, purpose, draw, len(keys))]

    def _continues(self, sample: int, draw: int) -> bool:
        """Whether this draw is image-to-video: from the seed, the draw number and its dataset's share alone."""
        share = self._plan.datasets[int(self._index.datasets[sample])].image_to_video
        return chance(self._plan.config.run.seed, "image_to_video", draw) < share

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
    embeds = first.new_empty((len(texts), tokens, first.shape[2]))
    mask = torch.zeros((len(texts), tokens), dtype=torch.bool)
    for row, text in enumerate(texts):
        embeds[row, : text.embeds.shape[1]] = text.embeds[0]
        embeds[row, text.embeds.shape[1] :] = 0
        mask[row, : text.embeds.shape[1]] = True
    return Text(embeds, mask)
