"""What a family takes beside text, checked: whether it is declared soundly, and whether data and [validation.images] fit it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from vtrain.config.record import Config
from vtrain.contract import (
    ClipShape,
    ConditionSpec,
    Family,
    Problem,
    conditions_of,
    takes_frame_levels,
)
from vtrain.contract.specs import did_you_mean, listed
from vtrain.plan.records import DatasetPlan
from vtrain.registry.blame import PartFault


def check_declared(family: Family) -> None:
    """Raises PartFault for conditions that contradict themselves or the family."""
    conditions = conditions_of(family)
    clip = ClipShape(family.default_frames, family.default_size.height, family.default_size.width)
    tensors = [name for each in conditions if each.encoder is not None for name in each.encoder.tensors(clip)]
    found = [f'two of its conditions are called "{name}"' for name in _twice([each.name for each in conditions])]
    found += [f'two tensors of its conditions are called "{name}"' for name in _twice(tensors)]
    for each in conditions:
        found += [f'its condition "{each.name}" {what}' for what in _faults(each, family)]
    if found:
        raise PartFault("family", "", found)


def _twice(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _faults(spec: ConditionSpec, family: Family) -> Iterator[str]:
    if spec.clean_frames < 0:
        yield f"gives {spec.clean_frames} clean frames."
    if spec.clean_frames == 0 and spec.encoder is None:
        yield "gives the denoiser nothing: no clean frame, and no encoder."
    if spec.clean_frames > 0 and not takes_frame_levels(family):
        yield "gives clean frames, and its denoiser takes one noise level for a whole clip (it is no SupportsFrameLevels)."
    if spec.clean_frames > 1 and spec.source == "first_frame":
        yield f'gives {spec.clean_frames} clean latent frames of a single picture; source = "clip" has more.'


def least_frames(family: Family, latent_frames: int) -> int:
    """Frames of the shortest clip of so many latent frames."""
    return family.pixel_frames(latent_frames - 1)[-1] + 1


def given_latents(conditions: Sequence[ConditionSpec]) -> int:
    """Latent frames that are given clean where all of these conditions are."""
    return max((each.clean_frames for each in conditions), default=0)


def training_problems(config: Config, family: Family, made: Sequence[DatasetPlan]) -> Iterator[Problem]:
    """Datasets that cannot be trained with the family's conditions, and shall be."""
    enabled = [number for number, part in enumerate(config.data) if part.table.enabled]
    for number, dataset in zip(enabled, made, strict=True):
        yield from _Checks(config, family, number, dataset).all()


class _Checks:
    """Of one dataset."""

    def __init__(self, config: Config, family: Family, number: int, dataset: DatasetPlan) -> None:
        self._config, self._family, self._number, self._dataset = config, family, number, dataset
        self._all = conditions_of(family)
        self._required = [each for each in self._all if each.required]

    def all(self) -> Iterator[Problem]:
        share = self._dataset.table.video.image_to_video
        said = "image_to_video" in self._dataset.table.video.model_fields_set
        if not self._all:
            if share:
                what = f"image_to_video = {share:g}: this model family takes no picture, but text alone."
                yield self._at("image_to_video", what, "Remove it, or train a family that takes one.")
        elif said and share < 1 and len(self._required) == len(self._all):
            what = f"image_to_video = {share:g}: this model family cannot do without {_names(self._all)}, at any draw."
            yield self._at("image_to_video", what, "Remove it.")
        yield from self._lengths()

    def _lengths(self) -> Iterator[Problem]:
        """Clips with nothing to make after what is given."""
        share, frames = self._dataset.image_to_video, self._dataset.frames
        wanted = [each for each in self._all if self._dataset.has(each)]
        if not wanted:
            return
        least = least_frames(self._family, max(each.latent_frames for each in wanted))
        clean = [each for each in self._required if each.clean_frames]
        if frames < least:
            one = "are one latent frame" if frames < least_frames(self._family, 2) else "are too short"
            what = f"clips of {frames_text(frames)} {one}, with nothing to make after it."
            if self._required:
                what = f"{what[:-1]}, and this model family is given {_names(self._required)}."
                yield self._at("frames", what, f"Set frames to {least} or more.")
            else:
                what = f"image_to_video = {share:g}: {what}"
                yield self._at("image_to_video", what, f"Set frames to {least} or more, or remove it.")
        elif clean and self._dataset.min_frames < (shortest := least_frames(self._family, given_latents(clean) + 1)):
            what = (
                f"clips of {frames_text(self._dataset.min_frames)}: this model family is always given {_names(clean)}, and "
                "nothing would be left to train."
            )
            yield self._at("min_frames", what, f"Set min_frames to {shortest} or more.")

    def _at(self, key: str, what: str, remedy: str) -> Problem:
        return Problem(self._config.where("data", self._number, "video", key), what, remedy)


def encoder_problems(config: Config, family: Family, made: Sequence[DatasetPlan]) -> Iterator[Problem]:
    """What is wrong with the files of encoders that the run uses."""
    pictures = config.validation is not None and bool(config.validation.images)
    for each in conditions_of(family):
        if each.encoder is not None and (pictures or any(dataset.has(each) for dataset in made)):
            for found in each.encoder.check():
                place = f"{found.where}: " if found.where else ""
                what = f"the encoder of the condition {each.name}: {place}{found.what}"
                yield Problem(config.where("model", "path"), what, found.remedy)


def picture_problems(config: Config, family: Family, frames: int) -> Iterator[Problem]:
    """What of [validation.images] is wrong, or missing, without a look into the files. frames: of the videos to generate."""
    table, conditions = config.validation, conditions_of(family)
    if table is None:
        return
    if required := [each for each in conditions if each.required]:
        for nickname in table.prompts:
            if nickname not in table.images:
                what = (
                    f'prompts: "{nickname}" has no picture, and this model family cannot do without {_names(required)}.'
                )
                remedy = f'Add it to [validation.images], for example: {nickname} = "picture.png"'
                yield Problem(config.where("validation", "prompts", nickname), what, remedy)
    if not table.images:
        return
    yield from _unfit(config, family, conditions, frames)
    for nickname, file in table.images.items():
        where = config.where("validation", "images", nickname)
        if nickname not in table.prompts:
            remedy = did_you_mean(nickname, table.prompts) or f"There are {listed(table.prompts)}."
            yield Problem(where, f'images: no prompt has the nickname "{nickname}".', remedy)
        if not file.is_file():
            what = f"{file} is {'no file' if file.exists() else 'not there'}."
            yield Problem(where, what, "Relative paths start at the configuration file's folder.")


def _unfit(config: Config, family: Family, conditions: Sequence[ConditionSpec], frames: int) -> Iterator[Problem]:
    """Why videos of so many frames cannot be generated from a picture by this family."""
    where = config.where("validation", "images")
    if not conditions:
        yield Problem(where, "images: this model family takes no picture, but text alone.", "Remove it.")
        return
    clean = given_latents(conditions)
    least = least_frames(family, max(each.latent_frames for each in conditions))
    if frames < least:
        one = "is one latent frame" if frames < least_frames(family, 2) else "is too short"
        what = f"images: a video of {frames_text(frames)} {one}, with nothing to make after the picture."
        yield Problem(config.where("validation", "frames"), what, f"Set frames to {least} or more.")
    elif clean and not family.frame_rule.accepts(least_frames(family, clean)):
        stands = frames_text(least_frames(family, clean))
        what = f"images: the clean latent frames stand for {stands}, and this model family encodes no such clip."
        yield Problem(where, what, "Remove it.")
    elif any(each.source == "first_frame" for each in conditions) and clean and len(family.pixel_frames(0)) > 1:
        stands = frames_text(len(family.pixel_frames(0)))
        what = f"images: the first latent frame of this model family stands for {stands}, not for a single picture."
        yield Problem(where, what, "Remove it.")


def _names(conditions: Sequence[ConditionSpec]) -> str:
    """For a sentence."""
    return " and ".join(each.summary for each in conditions)


def frames_text(frames: int) -> str:
    return f"{frames} frame{'s' if frames != 1 else ''}"
