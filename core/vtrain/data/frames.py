"""Source frames of a batch, decoded anew at each step: for regularizers whose encoder runs on them (Needs.features = "source")."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from vtrain.contract import DataError, Problem, SupportsTokenGrid
from vtrain.data.decoding.video import FileFault
from vtrain.data.decoding.worker import DecodeJob, Workers, available_cpus
from vtrain.data.index import Index
from vtrain.data.sample import Sample
from vtrain.plan.records import Plan
from vtrain.plan.tokens import token_frames

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
            if decoded.content != job.sample.content:
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
            free = max(1, available_cpus() // self._plan.processes - 1)
            count = min(_MOST_DECODERS, self._plan.config.train.batch_size, free)
            limit = max(dataset.table.decode_timeout for dataset in self._plan.datasets)
            self._workers = self._stack.enter_context(Workers(count, limit))
        return self._workers

    def _failed(self, sample: Sample, fault: FileFault) -> DataError:
        place = f"{self._plan.datasets[sample.place].backend.location}/{sample.ref_id}"
        remedy = "Mend the file, or remove it and start the run again."
        return DataError(Problem(place, f"{fault.reason}, and its frames are read at each step.", remedy))
