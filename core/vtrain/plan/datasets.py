"""[[data]] tables to dataset plans: buckets, lengths, captions, and their keys checked against each other and the family."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from vtrain.config.data_tables import DataTable
from vtrain.config.keys import KeyPath
from vtrain.config.record import Config, Part
from vtrain.contract import (
    ClipShape,
    DataBackend,
    DataBackendSpec,
    Family,
    FrameRule,
    Problem,
    Size,
    SupportsCaptions,
    SupportsFiles,
    SupportsTokenGrid,
    TokenGrid,
    conditions_of,
)
from vtrain.contract.specs import did_you_mean
from vtrain.plan.records import DatasetPlan, MasksPlan
from vtrain.plan.text import with_extras
from vtrain.registry.spelling import check_members


def token_grid(family: Family, clip: ClipShape) -> TokenGrid | None:
    """The grid of a clip's tokens, None if the family does not say."""
    return family.token_grid(family.latent_shape(clip)) if isinstance(family, SupportsTokenGrid) else None


def token_frames(family: Family, latent_frames: int, grid: TokenGrid) -> tuple[int, ...]:
    """For each frame of tokens the pixel frame that stands for it: the last of those that it covers.

    A causal codec knows all of a latent frame's pixels only with that one (arXiv 2506.09229 leaves the choice open).
    """
    each = latent_frames // grid.frames
    return tuple(family.pixel_frames(each * (number + 1) - 1)[-1] for number in range(grid.frames))


ASPECTS = ((2, 1), (16, 9), (3, 2), (4, 3), (5, 4), (1, 1), (4, 5), (3, 4), (2, 3), (9, 16), (1, 2))
"""Width to height of the buckets made from a number, the widest first."""

ResolutionUnit = Literal["pixel_area", "pixel"]

_NEARLY = 1.1
"""Areas within this factor are not told apart in a warning."""


def measure(width: float, height: float, unit: ResolutionUnit) -> float:
    """A picture's size in a unit: the edge of a square of its area, or its shorter edge. In pixels."""
    return math.sqrt(width * height) if unit == "pixel_area" else min(width, height)


def buckets(number: int, unit: ResolutionUnit, stride: int) -> tuple[Size, ...]:
    """A size of about `number` for each of ASPECTS, edges in multiples of `stride`, none twice.

    pixel_area: the multiples around the exact size that come nearest in area and aspect. pixel: the shorter edge is the
    multiple nearest to `number`.
    """
    return tuple(dict.fromkeys(size_near(number, unit, stride, *aspect) for aspect in ASPECTS))


def size_near(number: int, unit: ResolutionUnit, stride: int, width: float, height: float) -> Size:
    """The one of those of the aspect width to height."""
    long, short = _bucket(number, unit, stride, max(width, height) / min(width, height))
    return Size(long, short) if width >= height else Size(short, long)


def _bucket(number: int, unit: ResolutionUnit, stride: int, aspect: float) -> Size:
    """For an aspect of at least 1."""
    if unit == "pixel":
        short = _nearest(number, stride)
        return Size(_nearest(short * aspect, stride), short)
    width, height = number * math.sqrt(aspect), number / math.sqrt(aspect)

    def error(size: Size) -> tuple[float, int]:
        # Logarithms, so that twice too large is as wrong as half too small; of two alike, the smaller.
        return abs(math.log(size.area / number**2)) + abs(math.log(size.aspect / aspect)), size.area

    return min((Size(*edges) for edges in product(_around(width, stride), _around(height, stride))), key=error)


def _nearest(length: float, stride: int) -> int:
    return max(stride, math.floor(length / stride + 0.5) * stride)  # halves go up: round() would go to the even one


def _around(length: float, stride: int) -> set[int]:
    """The multiples below and above."""
    return {max(stride, math.floor(length / stride) * stride), max(stride, math.ceil(length / stride) * stride)}


def dataset_sizes(
    config: Config, family: Family, number: int, part: Part[DataTable], problems: list[Problem]
) -> tuple[Size, ...]:
    """The buckets of [[data]] number `number`; none where resolution is wrong, which is added to `problems`."""
    wanted, named = part.table.resolution, family.resolutions()
    where = config.where("data", number, "resolution")
    if wanted is None:
        return next(iter(named.values()))
    if isinstance(wanted, int):
        return buckets(wanted, part.table.resolution_type, family.pixel_stride)
    if isinstance(wanted, str):
        if wanted in named:
            return named[wanted]
        try:
            sizes: tuple[Size, ...] = (Size.parse(wanted),)
        except ValueError:
            problems.append(_unknown(where, wanted, named))
            return ()
    else:
        sizes = wanted
    wrong = [found for size in sizes for found in check_size(where, size, family.pixel_stride)]
    problems += wrong
    return () if wrong else sizes


def _unknown(where: str, wanted: str, named: Mapping[str, tuple[Size, ...]]) -> Problem:
    sets = ", ".join(f'"{name}"' for name in named)
    what = f'resolution = "{wanted}" is neither a bucket set of this family ({sets}) nor a size such as "832x480".'
    if wanted.strip().isdigit():
        near = f'Did you mean "{int(wanted)}p"? ' if f"{int(wanted)}p" in named else ""
        return Problem(where, what, f"{near}A number stands without quotes: resolution = {int(wanted)}")
    return Problem(where, what, did_you_mean(wanted, list(named)))


def check_size(where: str, size: Size, stride: int) -> list[Problem]:
    """Both edges are multiples of the family's stride."""
    if size.width % stride == 0 and size.height % stride == 0:
        return []
    near = Size(*(max(stride, round(length / stride) * stride) for length in size))
    return [Problem(where, f"{size}: width and height must be multiples of {stride}.", f'The nearest is "{near}".')]


def nearest_size(family: Family, wanted: Size) -> Size:
    """The size itself if the family generates it, else the bucket of its sets that is nearest in aspect and area."""
    stride = family.pixel_stride
    if not (wanted.width % stride or wanted.height % stride):
        return wanted

    def distance(size: Size) -> float:
        # Logarithms: see _bucket.
        return abs(math.log(size.aspect / wanted.aspect)) + abs(math.log(size.area / wanted.area))

    return min((size for sizes in family.resolutions().values() for size in sizes), key=distance)


def pointed_out(family: Family, table: DataTable) -> tuple[str, ...]:
    """What of a number in `resolution` is probably not meant."""
    number, named = table.resolution, family.resolutions()
    if not isinstance(number, int) or table.resolution_type != "pixel_area":
        return ()
    name = f"{number}p" if f"{number}p" in named else next(iter(named))
    official = named[name][0]
    if number > 1 and 1 / _NEARLY < official.area / number**2 < _NEARLY:
        return ()
    return (
        f'resolution = {number} with resolution_type = "pixel_area" is the area of {number}x{number}, {_mega(number**2)}; '
        f'the family\'s "{name}" is {official}, {_mega(official.area)}: write resolution = "{name}" if that is meant',
    )


def _mega(area: int) -> str:
    return f"{area / 1e6:.2f} megapixels" if area >= 5000 else f"{area} pixels"


def datasets(
    config: Config, family: Family, problems: list[Problem], foreign_extras: Mapping[str, str]
) -> tuple[DatasetPlan, ...]:
    """Every enabled [[data]] table; what is wrong with them is added to `problems`. foreign_extras: of other families."""
    plans: list[DatasetPlan] = []
    for number, part in enumerate(config.data):
        if part.table.enabled:
            plans.append(with_extras(_dataset(config, family, number, part, problems), family, foreign_extras))
    names = [dataset.id for dataset in plans]
    for dataset in plans:
        if names.count(dataset.id) > 1:
            problems.append(Problem(dataset.where, f'two datasets are called "{dataset.id}".', "Give each its own id."))
    return tuple(plans)


def warnings(config: Config, family: Family) -> Iterator[str]:
    """What of the enabled [[data]] tables is allowed and probably not meant."""
    enabled = [part.table for part in config.data if part.table.enabled]
    for table in enabled:
        name = f"[[data]] {table.id}: " if table.id and len(enabled) > 1 else ""
        for found in (*pointed_out(family, table), *_frames_pointed_out(table, _Lengths.of(table, family))):
            yield f"{name}{found}"


@dataclass(frozen=True)
class _Lengths:
    """Frames of a training clip, resolved. most, least: with bucket_by applied; piece: of a longer clip."""

    frames: int
    most: int
    least: int
    piece: int | None

    @classmethod
    def of(cls, table: DataTable, family: Family) -> _Lengths:
        video = table.video
        frames = family.default_frames if video.frames is None else video.frames
        most = (video.max_frames or frames) if video.bucket_by == "resolution_frames" else frames
        return cls(frames, most, frames if video.min_frames is None else video.min_frames, video.max_frames)


def _dataset(
    config: Config, family: Family, number: int, part: Part[DataTable], problems: list[Problem]
) -> DatasetPlan:
    spec = part.registered.spec
    assert isinstance(spec, DataBackendSpec)
    backend = spec.build(part.options)
    check_members("data backend", backend, spec.name, config.where("data", number))
    table, fps, masks = part.table, part.table.video.fps, part.table.masks
    folder: KeyPath = ("data", number, "masks", "folder")
    lengths = _Lengths.of(table, family)
    sizes = dataset_sizes(config, family, number, part, problems)
    checks = _Checks(config, number, table)
    problems += [
        *checks.frames(lengths, family.frame_rule),
        *checks.windows(),
        *checks.sizes(),
        *checks.captions(backend, spec.name),
        *checks.quarantine(backend, spec.name),
    ]
    return DatasetPlan(
        id=table.id or Path(backend.location).name or f"data-{number}",
        where=config.where("data", number),
        backend=backend,
        table=table,
        sizes=sizes,
        frames=lengths.most,
        min_frames=lengths.least,
        fps=None if fps == "source" else family.default_fps if fps is None else fps,
        max_frames=lengths.piece,
        crop_seed=config.run.seed if table.crop == "random" else 0,
        image_to_video=_share(table, family),
        masks=None if masks is None else MasksPlan(masks.folder, masks.invert, masks.missing, config.where(*folder)),
        use=spec.name,
    )


def _share(table: DataTable, family: Family) -> float:
    """Of draws with what the family does not require."""
    taken = conditions_of(family)
    return 1.0 if taken and all(each.required for each in taken) else table.video.image_to_video


def check_frames(config: Config, rule: FrameRule, key: KeyPath, frames: int) -> list[Problem]:
    """A number of frames is one that the family takes."""
    if rule.accepts(frames):
        return []
    floor = rule.floor(frames)
    near = " or ".join(str(n) for n in (floor, floor + rule.stride if floor else rule.offset) if n)
    return [Problem(config.where(*key), f"{key[-1]} = {frames}: the family takes {rule} frames.", f"Use {near}.")]


def _frames_pointed_out(table: DataTable, lengths: _Lengths) -> Iterator[str]:
    video = table.video
    if video.bucket_by != "resolution_frames":
        return
    if lengths.most == lengths.least:
        yield (
            f'data.video.bucket_by = "resolution_frames" with clips of {lengths.least} frames at least and at most: '
            'that is "aspect"; set min_frames or max_frames'
        )
    elif None not in (video.frames, video.min_frames, video.max_frames):
        yield 'data.video.frames has no effect with bucket_by = "resolution_frames" beside min_frames and max_frames'


@dataclass(frozen=True)
class _Checks:
    """Rules between the keys of one [[data]] table."""

    config: Config
    number: int
    table: DataTable

    def _problem(self, key: str, what: str, remedy: str = "") -> Problem:
        """At a key of the table, "video.fps" for one of [data.video]."""
        return Problem(self.config.where("data", self.number, *key.split(".")), what, remedy)

    def _said(self, key: str) -> bool:
        """Whether the file itself has the key."""
        table, _, name = key.rpartition(".")
        return name in (self.table.video if table else self.table).model_fields_set

    def _pointless(self, key: str, unless: str, remedy: str) -> Iterator[Problem]:
        """A key that the file has and nothing reads."""
        if self._said(key):
            yield self._problem(key, f"{key.rpartition('.')[2]} has no meaning without {unless}.", remedy)

    def frames(self, lengths: _Lengths, rule: FrameRule) -> Iterator[Problem]:
        video = self.table.video
        yield from check_frames(self.config, rule, ("data", self.number, "video", "frames"), lengths.frames)
        if video.min_frames is not None:
            yield from check_frames(self.config, rule, ("data", self.number, "video", "min_frames"), lengths.least)
        longest = "max_frames" if lengths.most != lengths.frames else "frames"
        if lengths.least > lengths.most:
            key = "video.min_frames" if video.min_frames is not None else "video.max_frames"
            name = "min_frames" if video.min_frames is not None else "frames"
            yield self._problem(key, f"{name} = {lengths.least} is more than {longest} = {lengths.most}.")
        if video.bucket_by == "resolution_frames":
            if video.max_frames is not None:
                yield from check_frames(self.config, rule, ("data", self.number, "video", "max_frames"), lengths.most)
        else:
            if lengths.piece is not None and lengths.piece < lengths.frames:
                what = f"max_frames = {lengths.piece} is less than frames = {lengths.frames}: no clip could have them."
                yield self._problem("video.max_frames", what, f"Set it to {lengths.frames} or more, or lower frames.")
            remedy = 'Remove it, or set bucket_by = "resolution_frames".'
            yield from self._pointless("video.round_to", 'bucket_by = "resolution_frames"', remedy)

    def windows(self) -> Iterator[Problem]:
        video = self.table.video
        if video.window != "random":
            yield from self._pointless("video.windows", 'window = "random"', 'Remove it, or set window = "random".')
        if video.fps == "source" and video.repeat_frames:
            what = 'repeat_frames has no meaning with fps = "source": no clip is slower than itself.'
            yield self._problem("video.repeat_frames", what, "Remove it, or set fps to a number.")

    def sizes(self) -> Iterator[Problem]:
        table = self.table
        limits = {"min_size": table.min_size, "max_size": table.max_size, "downsample_to": table.downsample_to}
        if not isinstance(table.resolution, int) and all(value is None for value in limits.values()):
            unless = "a number in resolution, min_size, max_size or downsample_to"
            yield from self._pointless("resolution_type", unless, "Remove it, or write, for example: resolution = 480")
        if table.max_size is not None and table.downsample_to is None:
            what = "max_size says from where clips are reduced, and downsample_to, the size they are reduced to, is missing."
            yield self._problem("max_size", what, f"Add, for example: downsample_to = {table.max_size}")
        if table.max_size is None:
            yield from self._pointless("downsample_to", "max_size", "Add max_size, or remove it.")
        for low, high in (("min_size", "max_size"), ("downsample_to", "max_size")):
            least, most = limits[low], limits[high]
            if least is not None and most is not None and least > most:
                yield self._problem(low, f"{low} = {least} is more than {high} = {most}.")

    def captions(self, backend: DataBackend, use: str) -> Iterator[Problem]:
        table = self.table
        place = table.captions or ("backend" if isinstance(backend, SupportsCaptions) else "textfile")
        if table.captions == "backend" and not isinstance(backend, SupportsCaptions):
            what = f'captions = "backend": the data backend "{use}" has no captions of its own.'
            yield self._problem("captions", what, 'Leave the key out for text files, or choose, for example, "json".')
        if table.captions != "instance_prompt":
            yield from self._pointless("caption", 'captions = "instance_prompt"', 'Set captions = "instance_prompt".')
        elif table.caption is None:
            what = 'captions = "instance_prompt" needs the key "caption".'
            yield self._problem("captions", what, 'Add, for example: caption = "a cartoon in black and white"')
        if place != "textfile":
            yield from self._pointless(
                "caption_per", 'captions = "textfile"', 'Set captions = "textfile", or remove it.'
            )
        if place in ("textfile", "filename", "instance_prompt"):
            what = f'a place of captions that has extras, which "{place}" is not'
            yield from self._pointless("ignore_extras", what, "Remove it.")
        if table.captions in ("csv", "parquet"):
            yield from self._caption_file()
            return
        for key in ("captions_file", "file_column", "caption_column"):
            remedy = 'Set captions = "csv" or "parquet", or remove it.'
            yield from self._pointless(key, 'captions = "csv" or "parquet"', remedy)

    def _caption_file(self) -> Iterator[Problem]:
        file, form = self.table.captions_file, self.table.captions
        if file is None:
            what = f'captions = "{form}" needs the key "captions_file".'
            yield self._problem("captions", what, f'Add, for example: captions_file = "captions.{form}"')
        elif not file.is_file():
            what = f"{file} is {'no file' if file.exists() else 'not there'}."
            yield self._problem("captions_file", what, "Relative paths start at the configuration file's folder.")
        if form == "parquet" and importlib.util.find_spec("pyarrow") is None:
            what = 'captions = "parquet" is read by pyarrow, which is not installed.'
            yield self._problem("captions", what, "Install it: pip install 'vtrain[parquet]'")

    def quarantine(self, backend: DataBackend, use: str) -> Iterator[Problem]:
        table = self.table
        if table.on_bad_file != "move":
            yield from self._pointless("quarantine", 'on_bad_file = "move"', 'Set on_bad_file = "move", or remove it.')
            return
        if not isinstance(backend, SupportsFiles):
            what = f'on_bad_file = "move" is for folders of this machine; files of "{use}" at {backend.location} stay.'
            yield self._problem("on_bad_file", what, 'Set on_bad_file = "skip" or "stop".')
        if table.quarantine is None:
            what = 'on_bad_file = "move" needs the key "quarantine", the folder to move bad files to.'
            yield self._problem("on_bad_file", what, 'Add, for example: quarantine = "quarantine"')
        elif isinstance(backend, SupportsFiles):
            place, folder = Path(backend.location).resolve(), table.quarantine.resolve()
            if folder.is_relative_to(place) or place.is_relative_to(folder):
                what = f"the quarantine {folder} and the dataset {place} lie in each other."
                yield self._problem("quarantine", what, "Choose a folder outside the dataset.")
