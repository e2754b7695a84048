"""Micro-batches by their global number: latents, text, masks, conditions, features, source frames of the clips that are drawn."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vtrain.contract import (
    DataError,
    Latents,
    Problem,
    SupportsTokenGrid,
    Text,
    TextEncoderSpec,
    TextPart,
    TextPartSpec,
)
from vtrain.data.caching.caches import DROPPED, Caches
from vtrain.data.caching.pictures import absent
from vtrain.data.decoding.masks import is_empty, trained
from vtrain.data.decoding.video import FileFault
from vtrain.data.decoding.worker import DecodeJob, Workers, available_cpus
from vtrain.data.index import Index
from vtrain.data.order import Order
from vtrain.data.sample import Sample
from vtrain.data.seeds import chance, choice, generator
from vtrain.plan.conditions import given_latents
from vtrain.plan.datasets import token_frames
from vtrain.plan.records import Plan


def drawn(seed: int, clips: Latents, draws: Sequence[int]) -> Tensor:
    """(B, C, f, h, w) fp32 of as many clips. draws: their draw numbers.

    Of clips with a std: mean + std * noise, the noise a pure function of (seed, draw number); without: the mean.
    """
    if clips.std is None:
        return clips.mean
    shape = clips.mean.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=generator(seed, "latents", draw)) for draw in draws])
    return torch.addcmul(clips.mean, clips.std, noise)


_MOST_DECODERS = 4


class SourceFrames:
    """The frames that tokens stand for, of windows in the index, decoded in processes that live until `close`.

    As many are at work as a batch has clips, at most four. One thread at a time.
    """

    def __init__(self, plan: Plan, index: Index) -> None:
        self._plan, self._index = plan, index
        self._stack = ExitStack()
        self._workers: Workers | None = None

    def close(self) -> None:
        """End the processes. They are started again if more is asked for."""
        self._workers = None
        self._stack.close()

    def of(self, chosen: Sequence[tuple[int, int]]) -> Tensor:
        """(number of a sample, of its window) of clips of one shape -> uint8 (B, 3, f, H, W).

        Raises DataError that names a clip which cannot be decoded, or whose file is another than the one that was encoded.
        """
        jobs = [self._job(self._index.source(number), window) for number, window in chosen]
        parts = []
        for job, decoded in self._open().decoded(jobs, ahead=len(jobs)):
            if decoded.pixels is None or decoded.fault is not None:
                raise self._failed(job.sample, decoded.fault or FileFault("was not decoded", lasting=False))
            if decoded.content != job.sample.content:  # its latents are of the file as it was
                raise self._failed(job.sample, FileFault("its file changed since its latents were encoded"))
            parts.append(decoded.pixels)
        return torch.stack(parts)

    def _job(self, sample: Sample, window: int) -> DecodeJob:
        dataset, family = self._plan.datasets[sample.place], self._plan.family
        assert isinstance(family, SupportsTokenGrid)  # the plan refuses others
        latents = family.latent_shape(sample.shape)
        frames = token_frames(family, latents.frames, family.token_grid(latents))
        limit = dataset.table.decode_timeout
        start, torchcodec = sample.starts[window], bool(dataset.decoder)
        return DecodeJob(dataset.backend, sample, start, limit, frames=frames, torchcodec=torchcodec)

    def _open(self) -> Workers:
        if self._workers is None:
            free = max(1, available_cpus() // self._plan.processes - 1)  # one core is left to the training process
            count = min(_MOST_DECODERS, self._plan.config.train.batch_size, free)
            limit = max(dataset.table.decode_timeout for dataset in self._plan.datasets)
            self._workers = self._stack.enter_context(Workers(count, limit))
        return self._workers

    def _failed(self, sample: Sample, fault: FileFault) -> DataError:
        place = f"{self._plan.datasets[sample.place].backend.location}/{sample.ref_id}"
        remedy = "Fix the file, or remove it and start the run again."
        return DataError(Problem(place, f"{fault.reason}, and its frames are read at each step.", remedy))


ROUND = 8
"""Attention kernels read masks in pieces of eight."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B clips of one shape.

    latents: mean (B, C, f, h, w) fp32, drawn again from mean and std where those are cached. text: as `pad` makes it.
    draws: each sample's draw number, from which its noise derives. dropped: whose caption was dropped. clean: of each, how many
    latent frames are given clean, from the first on: never all that are trained. conditions: every tensor of the family's
    conditions by name, (B, ...) in the type in which it is stored; zeros of a draw that lacks the condition.
    mask: (B, f, h, w) fp32 in [0, 1], how much each latent counts, all ones for a clip without one; None if no clip has one.
    features: regularizer -> (B, f', h', w', D') from the cache, in the type in which they are stored. frames: uint8
    (B, 3, f, H, W), the source's frame for each frame of tokens; None if no regularizer reads them.
    """

    micro_batch: int
    latents: Latents
    text: Text
    draws: tuple[int, ...]
    sample_ids: tuple[str, ...]
    dropped: tuple[bool, ...]
    clean: tuple[int, ...] = ()
    mask: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    frames: Tensor | None = None
    conditions: Mapping[str, Tensor] = field(default_factory=dict)


class Batches:
    """batches[m] for every m >= 0, in any order and in any process: a pure function of plan, index and m.

    index: of the samples whose entries are in the caches, the same in every process.
    """

    def __init__(self, plan: Plan, caches: Caches, index: Index) -> None:
        if not len(index):
            raise DataError(Problem("", "there is no sample to train on."))
        self._plan, self._caches, self._index = plan, caches, index
        self._frames = SourceFrames(plan, index)
        self._encoders = plan.family.text_encoders()
        # Those that some draw has.
        self._given = [each for each in plan.conditions if any(dataset.has(each) for dataset in plan.datasets)]
        self._encoded = [each for each in plan.conditions if each.encoder is not None]
        self._online = {name for name, part in plan.regularizers if part.needs().features == "source"}
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

    def close(self) -> None:
        """End the processes that decode source frames, if any were started."""
        self._frames.close()

    def __getitem__(self, micro_batch: int) -> Batch:
        """With all that any regularizer reads."""
        return self.get(micro_batch)

    def get(self, micro_batch: int, features: Collection[str] | None = None) -> Batch:
        """features: names of the regularizers for which features or frames are read; None: all that ask for some.

        Raises IndexError for a negative number, DataError if an entry is missing or damaged, or if a clip whose frames are
        read cannot be decoded.
        """
        draws = self._order.draws(micro_batch)
        samples = [int(self._samples[draw.item]) for draw in draws]
        numbers = tuple(draw.number for draw in draws)
        dropped = tuple(map(self._drops, numbers))
        windows = [(sample, self._window(sample, number)) for sample, number in zip(samples, numbers, strict=True)]
        ids = tuple(map(self._index.id, samples))
        with _of(ids):
            texts = [
                self._caches.text(DROPPED, "dropped")
                if drop
                else self._caches.text_entry(self._caption(sample, number))
                for sample, number, drop in zip(samples, numbers, dropped, strict=True)
            ]
            clips = self._caches.video_entries([self._index.video.keys(sample)[window] for sample, window in windows])
            mask = self._mask(windows, clips.mean.shape[2:])
            had, clean = self._had(windows, numbers, mask, clips.mean.shape[2])
            conditions = self._conditions(windows, had)
            read = {name: self._features(name, windows) for name in self._index.features if _read(name, features)}
        text = pad(texts, self._encoders)
        latents = Latents(drawn(self._plan.config.run.seed, clips, numbers))
        return Batch(
            micro_batch, latents, text, numbers, ids, dropped, clean, mask=mask, features=read,
            frames=self._frames.of(windows) if any(_read(name, features) for name in self._online) else None,
            conditions=conditions,
        )  # fmt: skip

    def _caption(self, sample: int, draw: int) -> Sequence[str]:
        """The keys of the caption that this draw uses."""
        keys, count = self._index.text.keys(sample), len(self._encoders)
        at = count * choice(self._plan.config.run.seed, "caption", draw, len(keys) // count)
        return keys[at : at + count]

    def _window(self, sample: int, draw: int) -> int:
        """Which of the sample's windows this draw uses."""
        return choice(self._plan.config.run.seed, "window", draw, len(self._index.video.keys(sample)))

    def _features(self, name: str, windows: Sequence[tuple[int, int]]) -> Tensor:
        rows = self._index.features[name]
        return self._caches.feature_entries([rows.keys(sample)[window] for sample, window in windows])

    def _mask(self, windows: Sequence[tuple[int, int]], latents: Sequence[int]) -> Tensor | None:
        """latents: frames, height and width."""
        rows = self._index.masks
        keys = [() if rows is None else rows.keys(sample) for sample, _ in windows]
        if not any(keys):
            return None
        found = torch.ones(len(windows), *latents)  # a clip without a mask trains whole
        for row, (own, (sample, window)) in enumerate(zip(keys, windows, strict=True)):
            if own:
                masks = self._plan.datasets[int(self._index.datasets[sample])].masks
                found[row] = trained(self._caches.mask_entry(own[window]), invert=masks is not None and masks.invert)
        return found

    def _had(
        self, windows: Sequence[tuple[int, int]], draws: Sequence[int], mask: Tensor | None, frames: int
    ) -> tuple[list[frozenset[str]], tuple[int, ...]]:
        """The names of the conditions that each draw has, and how many of its latent frames are clean. frames: latent ones."""
        if not self._given:
            return [frozenset()] * len(draws), (0,) * len(draws)
        found = [
            self._one_had(sample, draw, None if mask is None else mask[row], frames)
            for row, ((sample, _), draw) in enumerate(zip(windows, draws, strict=True))
        ]
        return [names for names, _ in found], tuple(clean for _, clean in found)

    def _one_had(self, sample: int, draw: int, mask: Tensor | None, frames: int) -> tuple[frozenset[str], int]:
        chosen = self._continues(sample, draw)
        # Of a single latent frame nothing would be left to make.
        had = [each for each in self._given if each.required or (chosen and frames >= each.latent_frames)]

        def trains(clean: int) -> bool:
            """Whether something is left to train. invert=False: a batch's masks are inverted already."""
            return clean < frames and (not clean or mask is None or not is_empty(mask[clean:], invert=False))

        had = [each for each in had if each.required or trains(each.clean_frames)]
        clean = given_latents(had)
        return frozenset(each.name for each in had), clean if trains(clean) else 0

    def _conditions(self, windows: Sequence[tuple[int, int]], had: Sequence[frozenset[str]]) -> dict[str, Tensor]:
        """Every tensor of the family's conditions, of clips of one shape. had: what each draw has."""
        found: dict[str, Tensor] = {}
        for condition in self._encoded:
            rows = [row for row, names in enumerate(had) if condition.name in names]
            keys = [self._index.conditions[condition.name].keys(windows[row][0])[windows[row][1]] for row in rows]
            read = self._caches.condition_entries(keys) if keys else {}
            if len(rows) < len(windows):
                shape = self._index.shapes[int(self._index.buckets[windows[0][0]])]
                whole = absent([condition], shape, len(windows))
                for name, tensor in read.items():
                    whole[name][rows] = tensor
                read = whole
            found |= read
        return found

    def _continues(self, sample: int, draw: int) -> bool:
        """Whether this draw has what is not required: from the seed, the draw number and its dataset's share alone."""
        # One number for each draw, whatever the share: a smaller share draws a part of what a larger one does.
        share = self._plan.datasets[int(self._index.datasets[sample])].image_to_video
        return chance(self._plan.config.run.seed, "image_to_video", draw) < share

    def _drops(self, draw: int) -> bool:
        """Whether this draw's caption is dropped: from the seed and the draw number alone."""
        return chance(self._plan.config.run.seed, "caption_dropout", draw) < self._plan.config.train.caption_dropout


@contextmanager
def _of(samples: Sequence[str]) -> Iterator[None]:
    """What is wrong with a cache entry names the samples that it was read for: its own name is a hash."""
    try:
        yield
    except DataError as error:
        whose = f" It was read for {', '.join(samples)}."
        raise DataError(Problem(p.where, p.what + whose, p.remedy) for p in error.problems) from error


def _read(name: str, wanted: Collection[str] | None) -> bool:
    return wanted is None or name in wanted


def pad(texts: Sequence[Mapping[str, Tensor]], encoders: Mapping[str, TextEncoderSpec]) -> Text:
    """The parts of B captions as `Caches.text` gives them, (L, D) of different L and pooled (D,), as the denoiser gets them.

    encoders: the family's.
    """
    specs = [item for encoder in encoders.values() for item in encoder.parts.items()]
    return Text({part: _padded([text[part] for text in texts], spec) for part, spec in specs})


def _padded(parts: Sequence[Tensor], spec: TextPartSpec) -> TextPart:
    """Tokens: zeros after the real ones. "full": to all of them, no mask. "longest": L is the longest's, rounded up to a
    whole ROUND, and no more than the most; padding to more changes no prediction and costs time.
    """
    if spec.tokens is None:
        return TextPart(torch.stack(tuple(parts)))
    lengths = list(map(len, parts))
    full = spec.padding == "full"
    tokens = spec.tokens if full else min(spec.tokens, -(-max(lengths) // ROUND) * ROUND)
    embeds = parts[0].new_empty((len(parts), tokens, spec.width))
    for row, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        embeds[row, :length] = part
        embeds[row, length:] = 0
    if full:
        return TextPart(embeds)
    mask = torch.zeros((len(parts), tokens), dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
    return TextPart(embeds, mask)
