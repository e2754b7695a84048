"""The tables of a dataset, [[data]] and those inside it: core's own keys, as in tables.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from vtrain.contract import LocalPath, Options, Size, check_path_text


class VideoTable(Options):
    """[data.video]: which frames of a clip are used. Frames are counted after resampling to fps and frame_step."""

    frames: int | None = Field(None, ge=1, description="frames of a training clip; absent: the family's default")
    min_frames: int | None = Field(
        None,
        ge=1,
        description="a clip of fewer frames is dropped; absent: frames. Clips between are cut to the frame rule",
    )
    max_frames: int | None = Field(
        None,
        ge=1,
        description="a longer clip is cut into pieces of this many frames, each used like a clip of its own; absent: it "
        'stays whole. With bucket_by = "resolution_frames" also the longest training clip; absent there: frames',
    )
    fps: Annotated[float, Field(gt=0, le=240)] | Literal["source"] | None = Field(
        None, description="frames per second after resampling; \"source\": each clip's own rate; absent: the family's"
    )
    frame_step: int = Field(1, ge=1, le=1000, description="after resampling, take every n-th frame")
    repeat_frames: bool = Field(
        False, description="use clips slower than fps, each frame shown more than once, instead of dropping them"
    )
    window: Literal["start", "center", "all", "random"] = Field(
        "start",
        description="which part of a longer clip is used; all: every part, each a sample of its own; random: one of a "
        "fixed set of windows, drawn again at each use",
    )
    windows: int = Field(
        4, ge=1, le=1000, description='window = "random": windows in the set, spread evenly over the clip, each cached'
    )
    bucket_by: Literal["aspect", "resolution_frames"] = Field(
        "aspect",
        description="aspect: clips have `frames` frames, only shorter ones fewer; resolution_frames: each clip has as "
        "many as it can, up to max_frames",
    )
    round_to: int = Field(
        1,
        ge=1,
        description='bucket_by = "resolution_frames": lengths are rounded down to steps of this many frames, so that '
        "there are fewer buckets",
    )
    image_to_video: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of draws that are trained as image-to-video: with what the model family takes beside text, such as "
        "the first latent frame, clean and out of the loss. Images are never drawn so. A family that cannot do without has it at "
        "every draw, and takes no other share than 1",
    )


def _inner_folder(folder: str) -> str:
    """A folder in a dataset, "/"-separated, without a "/" at its ends. Raises ValueError."""
    parts = check_path_text(folder).strip("/").split("/")
    if folder.startswith("/") or not all(parts) or {".", ".."} & set(parts):
        raise ValueError('a folder in the dataset, such as "masks" or "extra/masks"')
    if any(part.startswith(".") for part in parts):
        raise ValueError("files in folders whose names start with a dot are not read: give it another name")
    return "/".join(parts)


class MasksTable(Options):
    """[data.masks]: which part of each clip's picture is trained on: the white one of its mask, an image or a video."""

    folder: Annotated[str, AfterValidator(_inner_folder)] = Field(
        description='folder in the dataset that has the masks: that of "a/b.mp4" is "<folder>/a/b", with any suffix of an '
        "image or a video"
    )
    invert: bool = Field(False, description="true: the black part of a mask is trained on")
    missing: Literal["whole", "drop"] = Field(
        "whole", description="a clip without a mask is trained on whole, or dropped with that reason"
    )


class DataTable(Options):
    """[[data]]: core's keys beside the data backend's options."""

    id: str | None = Field(None, min_length=1, max_length=100, description="name of the dataset; absent: its place")
    enabled: bool = Field(True, description="false leaves the dataset out")
    captions: Literal["textfile", "filename", "instance_prompt", "csv", "parquet", "json", "backend"] | None = Field(
        None,
        description="textfile: the .txt of the same name; filename: the file's stem, _ and - as "
        "spaces; instance_prompt: `caption` for every clip; csv, parquet: from captions_file; json: the .json of the "
        'same name; backend: those the data backend has. Absent: "backend" where it has some, else "textfile"',
    )
    caption_per: Literal["line", "file"] | None = Field(
        None,
        description='captions = "textfile": each line of a .txt is a caption, or the file is one, its lines joined; absent: '
        '"line", and the plan points out files that look like one text or like JSON',
    )
    caption: str | None = Field(
        None, min_length=1, description='captions = "instance_prompt": the caption of every clip'
    )
    caption_prefix: str = Field("", description="put before every caption as it stands, with any space it ends in")
    captions_file: LocalPath | None = Field(None, description='captions = "csv" or "parquet": the file that has them')
    file_column: str | None = Field(
        None, min_length=1, description='column of captions_file with the clip\'s path in the dataset; absent: "file"'
    )
    caption_column: str | None = Field(
        None, min_length=1, description='column of captions_file with the caption; absent: "caption"'
    )
    ignore_extras: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (),
        description="keys of JSON sidecars, or names of extras, that are left alone: the plan says nothing of them, and the "
        "model family does not read them",
    )
    missing_caption: Literal["drop", "empty"] = Field(
        "drop", description="a clip without a caption is dropped with that reason, or trained with an empty one"
    )
    resolution: (
        str
        | Annotated[int, Field(ge=1, le=65536)]
        | Annotated[tuple[Size, ...], Field(strict=False, min_length=1)]
        | None
    ) = Field(
        None,
        description='a bucket set of the family ("480p"), a size "WxH", a list of sizes, or a number, from which buckets '
        "of eleven aspects are made by resolution_type; absent: the family's",
    )
    resolution_type: Literal["pixel_area", "pixel"] = Field(
        "pixel_area",
        description="unit of a number in resolution, min_size, max_size and downsample_to. pixel_area: the edge of a "
        "square of that area; pixel: the shorter edge",
    )
    crop: Literal["center", "random", "none"] = Field(
        "center",
        description="center: scale to cover the bucket, cut the rest; random: the same at a place drawn once for each "
        "clip and window; none: squeeze the whole frame into it",
    )
    min_size: int | None = Field(None, ge=1, description="a smaller clip is dropped")
    max_size: int | None = Field(None, ge=1, description="a larger clip counts as reduced to downsample_to")
    downsample_to: int | None = Field(
        None, ge=1, description="the size that a clip above max_size is reduced to before it is cropped"
    )
    upscale: bool = Field(False, description="use clips smaller than their bucket, enlarged, instead of dropping them")
    repeats: int = Field(0, ge=0, description="extra passes over the dataset in each epoch")
    weight: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="how often its clips are drawn, relative to other datasets: an epoch takes all of the datasets of the "
        "largest weight, and of another this part",
    )
    on_bad_file: Literal["skip", "stop", "move"] = Field(
        "skip", description="a file that cannot be read: skip it, stop, or skip it and move it to quarantine"
    )
    quarantine: LocalPath | None = Field(
        None, description='on_bad_file = "move": the folder, outside the dataset, that bad files are moved to'
    )
    images: bool = Field(False, description="also use single images, as clips of one frame")
    decoder: Literal["pyav", "torchcodec"] = Field(
        "pyav",
        description="what decodes clips; torchcodec needs vtrain[torchcodec] and ffmpeg's shared libraries, and leaves files "
        "that it would show wrongly to pyav",
    )
    decode_timeout: float = Field(
        120.0,
        gt=0,
        description="seconds that a file may take to decode, not counting the wait for its storage; a decoder that hangs "
        "is stopped then, and the file is skipped",
    )
    video: VideoTable = Field(VideoTable(), description="which frames of a clip are used")
    masks: MasksTable | None = Field(None, description="which part of each picture is trained on; absent: all of it")
