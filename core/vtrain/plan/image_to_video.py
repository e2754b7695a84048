"""Image-to-video in a plan: what is wrong with it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vtrain.config.record import Config
from vtrain.contract import Family, Problem, SupportsFrameLevels
from vtrain.contract.lookup import did_you_mean, listed
from vtrain.plan.records import DatasetPlan


def training_problems(config: Config, family: Family, made: Sequence[DatasetPlan]) -> Iterator[Problem]:
    """Datasets that cannot be trained as image-to-video, and shall be."""
    enabled = [number for number, part in enumerate(config.data) if part.table.enabled]
    for number, dataset in zip(enabled, made, strict=True):
        if not dataset.image_to_video:
            continue
        where = config.where("data", number, "video", "image_to_video")
        share = f"image_to_video = {dataset.image_to_video:g}"
        if not isinstance(family, SupportsFrameLevels):
            what = f"{share}: this model family takes one noise level for a whole clip."
            yield Problem(where, what, "Remove it, or train a family that takes a level for each frame.")
        elif dataset.frames < two_latent_frames(family):
            what = (
                f"{share}: clips of {frames_text(dataset.frames)} are one latent frame, with nothing to make after it."
            )
            yield Problem(where, what, f"Set frames to {two_latent_frames(family)} or more, or remove it.")


def picture_problems(config: Config, family: Family, frames: int) -> Iterator[Problem]:
    """What of [validation.images] is wrong without a look into the files. frames: of the videos to generate."""
    table = config.validation
    if table is None or not table.images:
        return
    if not isinstance(family, SupportsFrameLevels):
        what = "images: this model family takes one noise level for a whole clip, so it cannot go on from a picture."
        yield Problem(config.where("validation", "images"), what, "Remove it.")
    elif frames < two_latent_frames(family):
        what = f"images: a video of {frames_text(frames)} is one latent frame, with nothing to make after the picture."
        yield Problem(config.where("validation", "frames"), what, f"Set frames to {two_latent_frames(family)} or more.")
    elif not family.frame_rule.accepts(1) or len(family.pixel_frames(0)) > 1:
        stands = frames_text(len(family.pixel_frames(0)))
        what = f"images: the first latent frame of this model family stands for {stands}, not for a single picture."
        yield Problem(config.where("validation", "images"), what, "Remove it.")
    for nickname, file in table.images.items():
        where = config.where("validation", "images", nickname)
        if nickname not in table.prompts:
            remedy = did_you_mean(nickname, table.prompts) or f"There are {listed(table.prompts)}."
            yield Problem(where, f'images: no prompt has the nickname "{nickname}".', remedy)
        if not file.is_file():
            what = f"{file} is {'no file' if file.exists() else 'not there'}."
            yield Problem(where, what, "Relative paths start at the configuration file's folder.")


def two_latent_frames(family: Family) -> int:
    """Frames of the shortest clip of two latent frames."""
    return family.pixel_frames(1)[-1] + 1


def frames_text(frames: int) -> str:
    return f"{frames} frame{'s' if frames != 1 else ''}"
