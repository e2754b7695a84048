"""The tables of a configuration file: core's own keys, their limits, defaults and meanings. A default exists only here.

A table with `use` mixes these keys with the options of the part that it names.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from vtrain.contract import Duration, LocalPath, Options, Size, check_path_text, fixed, free
from vtrain.contract.precision import StorageName

Names = Annotated[tuple[str, ...], Field(strict=False)]  # TOML has lists, which strict models take for no tuple


class RunTable(Options):
    """[run]: what the run is called, where it writes, and its one seed."""

    name: str = Field("run", min_length=1, max_length=100, description="name of the run, shown by trackers")
    output_dir: LocalPath = Field(description="folder for checkpoints, samples, plan and metrics")
    seed: int = fixed(42, ge=0, lt=2**63, description="seed from which order, noise and dropout are derived")
    resume: Annotated[str, AfterValidator(check_path_text)] = free(
        "latest",
        min_length=1,
        description='"latest": resume from the newest sound checkpoint, or start; "never": start, in an empty folder; '
        "otherwise the path of a checkpoint, or the name of one of this run, such as step-000500",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU, only operations that give the same bits each time, so that a resumed run is the same run "
        "there too; a little slower. Not needed on a CPU",
    )


class LoraTable(Options):
    """[model.lora]: the adapter (LoRA, arXiv 2106.09685), through peft."""

    rank: int = fixed(16, ge=1, le=4096, description="rank of the adapter")
    alpha: float | None = fixed(None, gt=0, description="scale is alpha / rank; absent: alpha = rank")
    targets: Names | None = fixed(None, description="module names to adapt (suffixes); absent: the family's choice")
    dropout: float = fixed(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    dora: bool = fixed(
        False,
        description="also train the length of each output's weights (DoRA, arXiv 2402.09353): nearer to full training at a low "
        "rank, slower, and more memory",
    )
    rslora: bool = fixed(
        False,
        description="scale is alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732): for high ranks, which alpha / rank holds back",
    )
    init: Literal["kaiming", "gaussian", "orthogonal"] = fixed(
        "kaiming",
        description="first weights; the model predicts as before with each. kaiming: A uniform, B zero; gaussian: A normal "
        "with deviation 1 / rank, B zero; orthogonal: both random and orthogonal to each other, of an even rank",
    )
    start: LocalPath | None = free(
        None,
        description="a LoRA to continue from: a safetensors file, a folder that holds one, or a checkpoint, in the keys of "
        "diffusers, peft, ComfyUI or kohya, of the same rank and targets. Read once, at the first step of a new run",
    )


class ModelTable(Options):
    """[model]: core's keys beside the family's options."""

    train: Literal["full", "lora"] = fixed(description='what is trained: all weights ("full") or an adapter ("lora")')
    # Each of its keys has a rule of its own; that there is one follows from `train`.
    lora: LoraTable | None = Field(None, description='the adapter; only with train = "lora"')


class PrecisionTable(Options):
    """[precision]: number formats and activation memory."""

    mixed: Literal["bf16", "no"] = fixed("bf16", description="autocast of the forward pass; weights keep their type")
    base: StorageName | None = fixed(
        None,
        description='storage type of the denoiser; absent: "bf16" under LoRA, "fp32" for full training. int8, fp8 and int4 are '
        "for a base under LoRA, and need vtrain[quanto]",
    )
    quantize_on: Literal["cpu", "accelerator"] = Field(
        "cpu",
        description="where a base in int8, fp8 or int4 is quantised, block by block: the accelerator is faster, and holds one "
        "block in bf16 meanwhile. Last bits may differ between the two",
    )
    gradient_checkpointing: bool | Literal["feed_forward"] = Field(
        True,
        description="what the backward pass recomputes instead of keeping: true: blocks (least memory, about a third more "
        'time); "feed_forward": the feed-forward layer of each block (more memory, less time); false: nothing',
    )
    gradient_checkpointing_interval: int = Field(
        1, ge=1, le=1000, description="gradient_checkpointing = true: every n-th block is recomputed, from the first on"
    )


class OffloadTable(Options):
    """[offload]: what waits in the machine's memory, or on a disk, while the card does not need it."""

    group: Literal["block", "leaf"] | None = free(
        None,
        description='LoRA: the frozen weights of blocks wait off the card until they run: "block": groups of blocks; "leaf": '
        "layer by layer, the least memory and the most waiting; absent: they stay on the card",
    )
    blocks_per_group: int = free(1, ge=1, le=1000, description='group = "block": blocks that come to the card together')
    stream: bool = free(
        False,
        description='group = "block": the next group comes while one computes (two are on the card at once); on CUDA alone',
    )
    disk: LocalPath | None = free(
        None,
        description="folder on a disk in which the groups wait instead of in memory, each run in a fresh sub-folder that goes "
        "with it; read again at every use",
    )
    model_cpu: bool = free(
        False, description="the denoiser leaves the card while the video codec decodes a validation's videos"
    )
    optimizer: bool = free(
        False,
        description="the optimizer's states lie in the machine's memory, and its step is made there: gradients go there, and "
        "what is trained comes back",
    )


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


class CacheTable(Options):
    """[cache]: where encoded text and video are kept. Entries are named by their content, so runs may share a folder."""

    # The default is validated, as any relative path is made to start at the configuration file.
    dir: LocalPath = Field("cache", validate_default=True, description="folder of the ledger and the encoded samples")
    text_batch: int = Field(8, ge=1, description="captions encoded at once")
    video_batch: int = Field(1, ge=1, description="clips encoded at once")
    latents: Literal["mode", "sample"] = fixed(
        "mode",
        description="mode: the codec's likeliest latents of a clip; sample: its mean and std, "
        "from which each use draws again (twice the space)",
    )
    compress: bool = Field(
        False,
        description="lossless compression (zstd) of entries written from now on; those that are there stay as they are",
    )


class GradientClipTable(Options):
    """[train.gradient_clip]: limits the gradient before each optimizer step."""

    method: Literal["norm", "value"] = Field("norm", description="scale the whole gradient's norm, or clamp each value")
    max: float = Field(ge=0, examples=[1.0], description="the limit; 0: none")


class RolloutTable(Options):
    """[train.rollout]: scheduled sampling (arXiv 1506.03099). Some inputs are made by the model itself, from a noisier level."""

    probability: float = Field(
        gt=0, le=1, description="share of clips whose input the model makes itself, once the ramp is over"
    )
    ramp: Duration | None = Field(
        None, description="the probability rises from 0 over this long, linearly; absent: none"
    )
    max_offset: float = Field(
        0.2,
        gt=0,
        le=1,
        description="how far above its level a clip starts at most, in noise level; drawn for each clip",
    )
    steps: int = Field(
        2, ge=1, le=100, description="solver steps (Euler) from there to the clip's level, each a forward pass"
    )
    strategy: Literal["uniform", "early", "late"] = Field(
        "uniform",
        description="which levels are rolled out. uniform: all alike; early: noisy ones rather, at which a video begins, with "
        "probability x level; late: those near its end, with probability x (1 - level)",
    )
    min_level: float = Field(
        0.1,
        ge=0.01,
        lt=1,
        description="clips at a lower level are not rolled out: the target, (x_s - x0) / s, would magnify an error 1 / s times",
    )


class TrainTable(Options):
    """[train]: how long, in what batches."""

    steps: int | None = Field(None, ge=1, description="optimizer steps in all; give steps or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data in all; give steps or epochs")
    batch_size: int = fixed(1, ge=1, description="clips per micro-batch and process")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimizer step and process")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of samples trained with the dropped caption")
    gradient_clip: GradientClipTable | None = Field(None, description="gradient clipping; absent: none")
    rollout: RolloutTable | None = Field(None, description="inputs that the model makes itself; absent: none")
    log_every: int = Field(10, ge=1, description="optimizer steps between readings of the device's numbers")
    statistics: bool = Field(
        False,
        description="at the steps that are logged, also of each block: root mean square of gradient, weights and output, largest "
        "output, and size of the update beside the weights",
    )


class LrScheduleTable(Options):
    """[lr_schedule]: the learning rate over the run, as a factor of the optimizer's lr."""

    use: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = Field(
        "constant", description="what follows the warm-up"
    )
    warmup: Duration | None = Field(None, description="linear warm-up from 0; absent: none")
    end: float = Field(0.0, ge=0, le=1, description="all but constant: factor at the last step")
    cycles: int = Field(
        1, ge=1, description="cosine_with_restarts: how often it falls from 1 to end, over equal parts of the run"
    )
    power: float = Field(
        1.0, gt=0, description="polynomial: of what is left of the run; 1 is linear, 2 falls faster at first"
    )


class EmaTable(Options):
    """[ema]: an average of the denoiser's weights over the last steps (exponential moving average), kept in fp32."""

    decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="weight of the average against the weights after a step: 1 / (1 - decay) steps count",
    )
    warmup: bool = Field(
        True,
        description="at first a smaller decay, (1 + n) / (10 + n) after n steps, so that the start is forgotten sooner",
    )
    update_every: int = Field(
        1,
        ge=1,
        description="optimizer steps between updates of the average; the decay is compounded over them, so that it means the same",
    )
    on: Literal["device", "cpu"] = free(
        "device",
        description="where it is kept: beside the weights, or in main memory, which takes twice its size there beside a card",
    )
    validation: Literal["raw", "ema", "both"] = free(
        "ema",
        description='with which weights videos are generated: "raw": those in training; "ema": the averaged ones, as '
        '<nickname>.ema.mp4; "both": one after the other, which takes twice as long',
    )


class ValidationTable(Options):
    """[validation]: videos generated from the model being trained."""

    every: Duration = Field(description="how often")
    at_start: bool = Field(False, description="also before the first step")
    prompts: dict[str, str] = Field(min_length=1, description="nickname (a file name) -> prompt")
    images: dict[str, LocalPath] = Field(
        {},
        description="nickname -> an image, or a video whose first frame is taken: that prompt is generated as "
        "image-to-video, from this picture",
    )
    negative_prompt: str = Field("", description="guidance's other side")
    size: Size | None = Field(
        None,
        description='"WxH", even; absent: the family\'s default. One that the family cannot generate, whose edges are no '
        "multiples of its stride, is made of its nearest bucket, resized and cut",
    )
    frames: int | None = Field(None, ge=1, description="absent: the family's default")
    fps: float | None = Field(
        None, gt=0, le=240, description="playing speed of the files; absent: the family's default"
    )
    guidance: float = Field(6.0, ge=1, description="classifier-free guidance scale; 1 is none")
    steps: int = Field(50, ge=1, le=1000, description="solver steps")
    seed: int = Field(42, ge=0, lt=2**63, description="seed of the starting noise, the same at every validation")


class CheckpointTable(Options):
    """[checkpoint]: how often, how many. The last step is always saved."""

    every: Duration = Field(Duration(500, "steps"), description="how often")
    keep: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        3, description='how many of the newest are kept, or "all"'
    )
