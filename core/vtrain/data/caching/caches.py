"""The caches of a run: text, video, masks, features, conditions; filled together, read by any."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from vtrain.contract import Caption, DataError, Filling, Latents, Problem, Role
from vtrain.data.caching.artifacts import Artifact
from vtrain.data.caching.fill import Unusable, fill_text, fill_windows
from vtrain.data.caching.inventory import DROPPED, Stores
from vtrain.data.caching.sharing import ALONE, Peers, together
from vtrain.data.caching.text import parts_of
from vtrain.data.index import Index, Keys, build
from vtrain.data.sample import Sample
from vtrain.data.scanning.surveys import Survey
from vtrain.plan.records import Plan


class Caches:
    """Encoded text by caption and role; what is encoded of clips by sample or key. Nothing is kept in memory."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    @classmethod
    def open(cls, plan: Plan) -> Caches:
        """The caches as they lie on the disk, filled by whichever process. Reads only."""
        return cls(Stores(plan))

    def text(self, caption: Caption, role: Role) -> dict[str, Tensor]:
        """All parts by name, of real tokens only: (L, D), pooled (D,), in the encoders' types.

        Raises DataError if it is not cached.
        """
        return self.text_entry(self._stores.text_keys(caption, role))

    def text_entry(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The same by its keys, one for each encoder."""
        parts: dict[str, Tensor] = {}
        for key, (name, spec) in zip(keys, self._stores.encoders.items(), strict=True):
            parts |= parts_of(name, spec, self._stores.text.read(key))
        return parts

    def latents(self, sample: Sample, start: float) -> Latents:
        """Of the window at one of the sample's starts: mean, and std if that is cached, (1, C, f, h, w) fp32.

        Raises DataError if it is not cached.
        """
        key = self._stores.known_video_key(sample, start)
        if key is None:
            what = "this clip was not encoded, or its file changed since."
            raise DataError(Problem(sample.id, what, "Start the run again: it will be encoded."))
        return self.video_entries([key])

    def video_entries(self, keys: Sequence[str]) -> Latents:
        """The same of several windows of one shape, by their keys: (B, C, f, h, w)."""
        read = self._stores.video.read_all(keys)
        return Latents(read["mean"], read.get("std"))

    def feature_entries(self, keys: Sequence[str]) -> Tensor:
        """Features of several windows of one shape, by their keys: (B, f', h', w', D') as they are stored."""
        return self._stores.feature.read_all(keys)["features"]

    def condition_entries(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """A condition of several windows of one shape, by their keys: its tensors by name, B first, as they are stored."""
        return self._stores.condition.read_all(keys)

    def mask_entry(self, key: str) -> Tensor:
        """(f, h, w) fp32 in [0, 1], 1 where the mask is white, by its key."""
        (mask,) = self._stores.mask.read(key).values()  # whichever its name: black, white or mask
        return mask


__all__ = ["DROPPED", "Caches", "FilledCaches", "fill", "fill_caches"]


@dataclass(frozen=True)
class FilledCaches:
    """index: of the samples that can be trained on, as they were encoded. skipped: "<dataset>/<ref id>" -> why that file
    cannot be used."""

    index: Index
    skipped: Mapping[str, str]
    caches: Caches

    def recount(self, survey: Survey) -> Survey:
        """The survey without what was skipped."""
        datasets = []
        for number, found in enumerate(survey.datasets):
            tallies = sorted((shape, tally) for (of, shape), tally in self.index.tallies.items() if of == number)
            reasons = dict(found.skipped)
            for name, reason in self.skipped.items():
                if name.startswith(f"{found.id}/"):
                    count, example = reasons.get(reason, (0, name.removeprefix(f"{found.id}/")))
                    reasons[reason] = (count + 1, example)
            new = replace(
                found,
                samples={shape: tally.samples for shape, tally in tallies},
                clips={shape: tally.files for shape, tally in tallies},
                windows={shape: tally.windows for shape, tally in tallies},
                skipped=reasons,
            )
            datasets.append(new)
        return replace(survey, datasets=tuple(datasets))


def fill(
    plan: Plan,
    samples: Iterable[Sample],
    extra_texts: Sequence[tuple[Caption, Role]],
    device: str,
    peers: Peers = ALONE,
) -> Generator[Filling, None, FilledCaches]:
    """Encode what is missing: text, masks, video, features, conditions, their models one after the other, each only if needed.

    Every process of a run calls it with the same samples, fills its share, and waits for the others. Tells how far this
    process's share is, stage by stage.

    extra_texts: prompts beside the samples' captions; the dropped caption is added if the run drops any. May be interrupted
    or closed at any time: what is on the disk is whole, and is not made again. Raises DataError for a full disk, a bad file
    where the configuration says stop, or no usable clip left.
    """
    stores = Stores(plan)
    yield from fill_text(stores, samples, extra_texts, peers, device)
    unusable = yield from fill_windows(stores, samples, peers, device)
    # The first process reads the ledger once more, for all: each would see another moment of it.
    index, changed = next(filter(None, together(peers, lambda: _index(stores, samples, unusable, peers))))
    skipped = unusable.reasons() | changed
    if skipped and not len(index):
        raise DataError(Problem(name, f"{reason}.") for name, reason in skipped.items())
    return FilledCaches(index, skipped, Caches(stores))


def fill_caches(
    plan: Plan,
    samples: Iterable[Sample],
    extra_texts: Sequence[tuple[Caption, Role]],
    device: str,
    report: Callable[[Filling], None] = lambda now: None,
    peers: Peers = ALONE,
) -> FilledCaches:
    """The same in one call. report: called with each standing."""
    work = fill(plan, samples, extra_texts, device, peers)
    while True:
        try:
            report(next(work))
        except StopIteration as done:
            filled: FilledCaches = done.value
            return filled


_CHANGED = "its file changed while the caches were filled"


def _index(
    stores: Stores, samples: Iterable[Sample], unusable: Unusable, peers: Peers
) -> tuple[Index, dict[str, str]] | None:
    """The first process makes the index for all, and says what else is skipped."""
    if peers.rank:
        return None
    changed: dict[str, str] = {}
    masks = stores.masks

    def usable() -> Iterator[Sample]:
        for sample in samples:
            starts = unusable.usable(sample)
            if not starts:
                continue
            content = stores.known_content(sample)
            if content and (masks is None or not masks.covers(sample) or masks.content(sample)):
                yield replace(sample, content=content, starts=starts)
            else:
                changed[sample.file] = _CHANGED

    def text_keys(sample: Sample) -> list[str]:
        return [key for caption in sample.captions for key in stores.text_keys(caption, "prompt")]

    mask_keys = None if masks is None else _keys(masks)
    features = {name: _keys(artifact) for name, artifact in stores.features.items()}
    conditions = {name: _keys(artifact) for name, artifact in stores.conditions.items()}
    online = any(part.needs().features == "source" for _, part in stores.plan.regularizers)
    return build(usable(), _keys(stores.videos), text_keys, mask_keys, features, conditions, sources=online), changed


def _keys(artifact: Artifact) -> Keys:
    """The keys of a sample's windows in an artifact, none where it has none."""

    def keys(sample: Sample) -> list[str]:
        if not artifact.covers(sample):
            return []
        content = artifact.content(sample)
        return [artifact.key(sample, start, content) for start in sample.starts]

    return keys
