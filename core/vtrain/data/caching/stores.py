"""Where what a run caches lies: entries, and the keys that name them. Imports no torch."""

from __future__ import annotations

from functools import cached_property

from vtrain.contract import Caption, Role
from vtrain.data.caching.columns import Column, Contents, FeatureColumn, MaskColumn, VideoColumn, known_key
from vtrain.data.caching.entries import KINDS, Entries, text_key
from vtrain.data.sample import Sample
from vtrain.data.scanning.database import HASHES, FileHashes
from vtrain.plan.records import Plan


class Stores:
    """The cache folder as this run sees it. Fingerprints are taken at their first use: they hash weights.

    masks, videos, features: the columns, the last by regularizer. masks: None where no dataset has any.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        folder = plan.config.cache.dir
        compress = plan.config.cache.compress
        self.text, self.video, self.feature, self.mask = (Entries(folder, kind, compress=compress) for kind in KINDS)
        self._hash_file = FileHashes(folder / HASHES)
        contents = Contents(plan)
        self.masks = MaskColumn(plan, contents, self.mask) if any(each.masks for each in plan.datasets) else None
        self.videos = VideoColumn(plan, contents, self.video, self._hash_file)
        self.features = {
            name: FeatureColumn(plan, contents, self.feature, self._hash_file, name, part)
            for name, part in plan.regularizers
            if part.needs().features == "cached"
        }

    @property
    def columns(self) -> tuple[Column, ...]:
        """In the order in which they are filled: a clip whose mask is empty is not encoded."""
        masks = () if self.masks is None else (self.masks,)
        return (*masks, self.videos, *self.features.values())

    @cached_property
    def _text_fingerprint(self) -> str:
        return self.plan.family.text_fingerprint(self._hash_file)

    def location(self, sample: Sample) -> str:
        """The place of the sample's dataset in the ledger."""
        return self.plan.datasets[sample.place].backend.location

    def text_key(self, caption: Caption, role: Role) -> str:
        return text_key(caption, role, self._text_fingerprint)

    def video_key(self, sample: Sample, start: float, content: str) -> str:
        """start: one of the sample's. content: SHA-256 of the source's bytes."""
        return self.videos.key(sample, start, content)

    def known_content(self, sample: Sample) -> str:
        """The content hash that the sample carries or that the ledger has; "" if the source's bytes were not read yet."""
        return self.videos.content(sample)

    def known_video_key(self, sample: Sample, start: float) -> str | None:
        """By the content hash, if that is known."""
        return known_key(self.videos, sample, start)
