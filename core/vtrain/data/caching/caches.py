"""The caches of a run: text, video, masks, features, and the pictures that validation starts from; filled together, read by any."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from vtrain.contract import Caption, DataError, Filling, Latents, Problem, Role, Text, TextPart
from vtrain.data.caching.artifacts import Artifact
from vtrain.data.caching.encoders import opened
from vtrain.data.caching.entries import video_key
from vtrain.data.caching.fill import Unusable, fill_text, fill_windows
from vtrain.data.caching.inventory import DROPPED, Stores
from vtrain.data.caching.sharing import ALONE, Peers, together
from vtrain.data.caching.text import text_of
from vtrain.data.decoding.decode import decode
from vtrain.data.decoding.video import FileFault, faults
from vtrain.data.index import Index, Keys, build
from vtrain.data.sample import TRANSFORM_VERSION, Sample
from vtrain.data.scanning.scan import PICTURE_REMEDY, picture_file_faults, pictures
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

    def text(self, caption: Caption, role: Role) -> Text:
        """All parts, of real tokens only: (1, L, D) with a mask all true, pooled (1, D), in the encoders' types.

        Raises DataError if it is not cached.
        """
        return self.text_entry(self._stores.text_keys(caption, role))

    def text_entry(self, keys: Sequence[str]) -> Text:
        """The same by its keys, one for each encoder."""
        parts: dict[str, TextPart] = {}
        for key, (name, spec) in zip(keys, self._stores.encoders.items(), strict=True):
            parts |= text_of(name, spec, self._stores.text.read(key)).parts
        return Text(parts)

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

    def mask_entry(self, key: str) -> Tensor:
        """(f, h, w) fp32 in [0, 1], 1 where the mask is white, by its key."""
        (mask,) = self._stores.mask.read(key).values()  # whichever its name: black, white or mask
        return mask


__all__ = ["DROPPED", "Caches", "FilledCaches", "fill", "fill_caches"]


@dataclass(frozen=True)
class FilledCaches:
    """index: of the samples that can be trained on, as they were encoded. skipped: "<dataset>/<ref id>" -> why that file
    cannot be used.

    truncated: captions encoded now that were too long and lost their end.
    """

    index: Index
    skipped: Mapping[str, str]
    truncated: int
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
    """Encode what is missing: text, masks, video, features, their models one after the other, each loaded only if needed.

    Every process of a run calls it with the same samples, fills its share, and waits for the others. Tells how far this
    process's share is, stage by stage.

    extra_texts: prompts beside the samples' captions; the dropped caption is added if the run drops any. May be interrupted
    or closed at any time: what is on the disk is whole, and is not made again. Raises DataError for a full disk, a bad file
    where the configuration says stop, or no usable clip left.
    """
    stores = Stores(plan)
    truncated = yield from fill_text(stores, samples, extra_texts, peers, device)
    unusable = yield from fill_windows(stores, samples, peers, device)
    # The first process reads the ledger once more, for all: each would see another moment of it.
    index, changed = next(filter(None, together(peers, lambda: _index(stores, samples, unusable, peers))))
    skipped = unusable.reasons() | changed
    if skipped and not len(index):
        raise DataError(Problem(name, f"{reason}.") for name, reason in skipped.items())
    return FilledCaches(index, skipped, truncated, Caches(stores))


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
    online = any(part.needs().features == "source" for _, part in stores.plan.regularizers)
    return build(usable(), _keys(stores.videos), text_keys, mask_keys, features, sources=online), changed


def _keys(artifact: Artifact) -> Keys:
    """The keys of a sample's windows in an artifact, none where it has none."""

    def keys(sample: Sample) -> list[str]:
        if not artifact.covers(sample):
            return []
        content = artifact.content(sample)
        return [artifact.key(sample, start, content) for start in sample.starts]

    return keys


def fill_pictures(plan: Plan, device: str) -> None:
    """Encode what is missing; the codec is opened only if something is. Raises DataError."""
    stores = Stores(plan)
    try:
        named = {key_of(stores, sample): sample for sample in pictures(plan).values()}
        missing = {key: sample for key, sample in named.items() if not stores.video.sound(key)}
        if not missing:
            return
        with opened(stores.videos, device) as encode:
            for key, sample in missing.items():
                (parts,) = encode([_pixels(sample)], sample)
                if not all(bool(part.isfinite().all()) for part in parts.values()):
                    what = "it encodes to numbers that are not finite."
                    raise DataError(Problem(sample.ref_id, what, "Give another picture."))
                stores.video.write(key, parts)
    except FileFault as fault:
        raise _error(plan, fault) from fault


def first_frames(plan: Plan, caches: Caches) -> Mapping[str, Tensor]:
    """nickname -> clean first latent frame (1, C, 1, h, w) fp32 of those that start from a picture. Raises DataError."""
    try:
        return {name: caches.video_entries([key]).mean for name, key in keys(Stores(plan)).items()}
    except FileFault as fault:
        raise _error(plan, fault) from fault


def keys(stores: Stores) -> dict[str, str]:
    """nickname -> key of its entry among the encoded videos. Raises FileFault."""
    return {name: key_of(stores, sample) for name, sample in pictures(stores.plan).items()}


def key_of(stores: Stores, sample: Sample) -> str:
    """As that of a clip of one frame whose dataset is decoded by PyAV."""
    std = stores.plan.config.cache.latents == "sample"
    return video_key(sample.content, sample, 0.0, TRANSFORM_VERSION, stores.videos.fingerprint, std=std)


def _pixels(sample: Sample) -> Tensor:
    """uint8 (3, 1, H, W). Raises FileFault."""
    file = Path(sample.ref_id)
    with picture_file_faults(file), faults("cannot be read"), file.open("rb") as stream:
        return decode(stream, sample, 0.0)


def _error(plan: Plan, fault: FileFault) -> DataError:
    where = plan.config.where("validation", "images")
    return DataError(Problem(where, f"{fault.reason}.", PICTURE_REMEDY))
