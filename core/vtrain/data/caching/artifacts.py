"""Artifacts: what is cached of each window of a clip: its latents, its mask, features for each regularizer that asks for them,
and the family's conditions.

Each has its files, its keys and its entries. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Protocol

from vtrain.contract import (
    ClipShape,
    ConditionSpec,
    ConditionTensors,
    DType,
    FeatureShape,
    HashFile,
    Regularizer,
    SourceRef,
    SupportsFeatures,
    SupportsTokenGrid,
    TokenGrid,
)
from vtrain.data.caching.entries import Entries, condition_key, features_key, mask_key, transform, video_key
from vtrain.data.caching.packing import Packed
from vtrain.data.sample import MaskGrid, Sample, mask_grid
from vtrain.data.scanning.ledger import ContentHashes
from vtrain.plan.datasets import token_frames
from vtrain.plan.records import Plan

Window = tuple[Sample, float]
"""A sample and one of its starts."""

_STORED: Mapping[DType, str] = {"fp32": "F32", "bf16": "BF16"}
"""A storage type -> as safetensors names it."""

Layout = Mapping[str, Packed]
"""An entry's tensors by name, as its header tells."""


class Artifact(Protocol):
    """One of what is cached of each window."""

    @property
    def stage(self) -> str:
        """Its name in progress: "video", "mask", "features (crepa)", "condition (picture)"."""
        ...

    @property
    def entries(self) -> Entries: ...

    def covers(self, sample: Sample) -> bool:
        """Whether the sample's windows have one."""
        ...

    def ref(self, sample: Sample) -> SourceRef:
        """The file it is made of."""
        ...

    def content(self, sample: Sample) -> str:
        """SHA-256 of that file, "" if its bytes were not read yet."""
        ...

    def key(self, sample: Sample, start: float, content: str) -> str:
        """content: SHA-256 of the file's bytes."""
        ...

    def fits(self, sample: Sample, layout: Layout) -> bool:
        """Whether an entry of that layout is one."""
        ...


def known_key(artifact: Artifact, sample: Sample, start: float) -> str | None:
    """The key, None if the file's bytes were not read yet."""
    content = artifact.content(sample)
    return artifact.key(sample, start, content) if content else None


def layout_of(artifact: Artifact, sample: Sample, key: str) -> Layout | None:
    """Of an entry that is there, whole and fitting, as its header and length tell; None of any other."""
    layout = artifact.entries.layout(key)
    return layout if layout is not None and artifact.fits(sample, layout) else None


class Contents:
    """Content hashes of a run's files, as samples bear them or else as the ledger has them."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self._ledger = plan, ContentHashes(plan.config.cache.dir)

    def of(self, sample: Sample, ref: SourceRef, borne: str) -> str:
        """borne: by the sample. "" if the file's bytes were not read yet."""
        if borne:
            return borne
        return self._ledger.of(self.plan.datasets[sample.place].backend.location, ref) or ""


class ClipArtifact:
    """What is made of every clip's own file."""

    def __init__(self, plan: Plan, contents: Contents, entries: Entries, hash_file: HashFile) -> None:
        self.plan, self.entries = plan, entries
        self._contents, self._hash_file = contents, hash_file

    def covers(self, sample: Sample) -> bool:
        return True

    def ref(self, sample: Sample) -> SourceRef:
        return sample.ref

    def content(self, sample: Sample) -> str:
        return self._contents.of(sample, sample.ref, sample.content)

    def transform(self, sample: Sample) -> int | str:
        return transform(self.plan.datasets[sample.place].decoder)

    def frames(self, sample: Sample) -> tuple[int, ...] | None:
        """Numbers of a window's frames that are decoded for it; None: all."""
        return None


class VideoArtifact(ClipArtifact):
    """Latents of the video codec: "mean", and "std" where they are drawn again."""

    stage = "video"

    @cached_property
    def fingerprint(self) -> str:
        return self.plan.family.video_fingerprint(self._hash_file)

    def key(self, sample: Sample, start: float, content: str) -> str:
        return self.made_key(sample, start, content, self.transform(sample))

    def made_key(self, sample: Sample, start: float, content: str, transform: int | str) -> str:
        """Of pixels that were made by that transform."""
        std = self.plan.config.cache.latents == "sample"
        return video_key(content, sample, start, transform, self.fingerprint, std=std)

    def fits(self, sample: Sample, layout: Layout) -> bool:
        return True


class FeatureArtifact(ClipArtifact):
    """Features of a regularizer's own encoder: "features" (f', h', w', D'), of the frames that tokens stand for."""

    def __init__(
        self, plan: Plan, contents: Contents, entries: Entries, hash_file: HashFile, name: str, part: Regularizer
    ) -> None:
        super().__init__(plan, contents, entries, hash_file)
        assert isinstance(part, SupportsFeatures)  # the plan refuses others
        self.name, self.part = name, part
        self._known: dict[ClipShape, tuple[TokenGrid, tuple[int, ...], FeatureShape]] = {}

    @property
    def stage(self) -> str:
        return f"features ({self.name})"

    @cached_property
    def fingerprint(self) -> str:
        return self.part.feature_fingerprint(self._hash_file)

    def geometry(self, shape: ClipShape) -> tuple[TokenGrid, tuple[int, ...], FeatureShape]:
        """Of clips of one shape: the grid of their tokens, the frames that stand for these, the features' shape."""
        if shape not in self._known:
            family = self.plan.family
            assert isinstance(family, SupportsTokenGrid)  # the plan refuses others
            latents = family.latent_shape(shape)
            grid = family.token_grid(latents)
            frames = token_frames(family, latents.frames, grid)
            self._known[shape] = grid, frames, self.part.feature_shape(shape, grid)
        return self._known[shape]

    def key(self, sample: Sample, start: float, content: str) -> str:
        grid, frames, _ = self.geometry(sample.shape)
        return features_key(content, sample, start, self.transform(sample), self.name, self.fingerprint, grid, frames)

    def frames(self, sample: Sample) -> tuple[int, ...] | None:
        return self.geometry(sample.shape)[1]

    def fits(self, sample: Sample, layout: Layout) -> bool:
        _, _, expected = self.geometry(sample.shape)
        return "features" in layout and layout["features"].shape == tuple(expected)


class ConditionArtifact(ClipArtifact):
    """What one of the family's conditions gives the denoiser: its tensors by name, of windows whose draws may have it."""

    def __init__(
        self, plan: Plan, contents: Contents, entries: Entries, hash_file: HashFile, condition: ConditionSpec
    ) -> None:
        super().__init__(plan, contents, entries, hash_file)
        assert condition.encoder is not None  # of others nothing is encoded
        self.condition, self.encoder = condition, condition.encoder
        self._known: dict[ClipShape, ConditionTensors] = {}

    @property
    def stage(self) -> str:
        return f"condition ({self.condition.name})"

    @cached_property
    def fingerprint(self) -> str:
        return self.encoder.fingerprint(self._hash_file)

    def tensors(self, shape: ClipShape) -> ConditionTensors:
        """Of clips of one shape."""
        if shape not in self._known:
            self._known[shape] = self.encoder.tensors(shape)
        return self._known[shape]

    def covers(self, sample: Sample) -> bool:
        return self.plan.datasets[sample.place].has(self.condition)

    def frames(self, sample: Sample) -> tuple[int, ...] | None:
        return (0,) if self.condition.source == "first_frame" else None

    def key(self, sample: Sample, start: float, content: str) -> str:
        return self.made_key(sample, start, content, self.transform(sample))

    def made_key(self, sample: Sample, start: float, content: str, transform: int | str) -> str:
        """Of pixels that were made by that transform."""
        return condition_key(content, sample, start, transform, self.condition, self.fingerprint)

    def fits(self, sample: Sample, layout: Layout) -> bool:
        found = {name: (packed.shape, packed.dtype) for name, packed in layout.items()}
        expected = self.tensors(sample.shape)
        return found == {name: (tuple(shape), _STORED[dtype]) for name, (shape, dtype) in expected.items()}


class MaskArtifact:
    """Masks at the grid of the latents, never inverted: fp32 (f, h, w), named after what they are.

    "black" and "white": one that trains nothing as it is, or inverted; "mask": any other.
    """

    stage = "mask"

    def __init__(self, plan: Plan, contents: Contents, entries: Entries) -> None:
        self.plan, self.entries, self._contents = plan, entries, contents
        self._grids: dict[ClipShape, MaskGrid] = {}

    def covers(self, sample: Sample) -> bool:
        return sample.mask is not None

    def ref(self, sample: Sample) -> SourceRef:
        assert sample.mask is not None
        return sample.mask.ref

    def content(self, sample: Sample) -> str:
        assert sample.mask is not None
        return self._contents.of(sample, sample.mask.ref, sample.mask.content)

    def grid(self, shape: ClipShape) -> MaskGrid:
        """Of the latents of clips of one shape."""
        if shape not in self._grids:
            self._grids[shape] = mask_grid(self.plan.family, shape)
        return self._grids[shape]

    def key(self, sample: Sample, start: float, content: str) -> str:
        return mask_key(content, sample, start, self.grid(sample.shape))

    def fits(self, sample: Sample, layout: Layout) -> bool:
        return bool(layout)

    def inverts(self, sample: Sample) -> bool:
        """Whether black trains."""
        masks = self.plan.datasets[sample.place].masks
        return masks is not None and masks.invert

    def is_empty(self, sample: Sample, names: Iterable[str]) -> bool:
        """Whether nothing of a window is trained with the mask whose entry has tensors of these names."""
        return ("white" if self.inverts(sample) else "black") in names
