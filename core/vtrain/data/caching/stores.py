"""Where a run's encoded text and video lie: entries and the keys that name them."""

from __future__ import annotations

from functools import cached_property

from vtrain.contract import Caption, Role
from vtrain.data.caching import hashes
from vtrain.data.caching.entries import KINDS, Entries
from vtrain.data.caching.keys import TRANSFORM_VERSION, text_key, video_key
from vtrain.data.sample import Sample
from vtrain.data.scanning.ledger import ContentHashes
from vtrain.plan.records import Plan


class Stores:
    """The cache folder as this run's family sees it. Fingerprints are taken at their first use: they hash weights."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        folder = plan.config.cache.dir
        compress = plan.config.cache.compress
        self.text, self.video = (Entries(folder, kind, compress=compress) for kind in KINDS)
        self._contents = ContentHashes(folder)
        self._hash_file = hashes.FileHashes(folder / hashes.FILE)

    @cached_property
    def _text_fingerprint(self) -> str:
        return self.plan.family.text_fingerprint(self._hash_file)

    @cached_property
    def _video_fingerprint(self) -> str:
        return self.plan.family.video_fingerprint(self._hash_file)

    def location(self, sample: Sample) -> str:
        """The place of the sample's dataset in the ledger."""
        return self.plan.datasets[sample.place].backend.location

    def text_key(self, caption: Caption, role: Role) -> str:
        return text_key(caption, role, self._text_fingerprint)

    def video_key(self, sample: Sample, start: float, content: str) -> str:
        """start: one of the sample's. content: SHA-256 of the source's bytes."""
        std = self.plan.config.cache.latents == "sample"
        return video_key(content, sample, start, TRANSFORM_VERSION, self._video_fingerprint, std=std)

    def known_content(self, sample: Sample) -> str:
        """The content hash that the sample carries or that the ledger has; "" if the source's bytes were not read yet."""
        return sample.content or self._contents.of(self.location(sample), sample.ref) or ""

    def known_video_key(self, sample: Sample, start: float) -> str | None:
        """By the content hash, if that is known."""
        content = self.known_content(sample)
        return self.video_key(sample, start, content) if content else None
