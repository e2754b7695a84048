"""The tables of a configuration file: core's own keys, their limits, defaults and meanings. A default exists only here.

A table with `use` mixes these keys with the options of the part that it names.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from vtrain.contract import Duration, LocalPath, Options, Size, check_path_text, fixed, free
from vtrain.contract.precision import StorageName
from vtrain.contract.rooms import bytes_of

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
    processes: int = free(
        1,
        ge=1,
        le=1024,
        description="how many processes train together on this machine, each on a card of its own; `vtrain run` starts them. Under "
        "torchrun and accelerate launch their number counts",
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


Saving = Literal["checkpointing", "offload", "states", "int8", "adamw8bit"]
"""Words of [memory] may (plan/savings.py has what they stand for)."""


def _limit(text: str) -> str:
    """Raises ValueError for no amount of memory."""
    if text != "auto":
        bytes_of(text)
    return text


class MemoryTable(Options):
    """[memory]: how much memory the run may take, from which the plan chooses what saves memory; absent: nothing is chosen."""

    limit: Annotated[str, AfterValidator(_limit)] = free(
        "auto",
        description='what each process may take of its card (training on the CPU: of the machine\'s memory), such as "16 GiB"; '
        '"auto": all of it, less what others hold there when the run starts',
    )
    may: Annotated[tuple[Saving, ...], Field(strict=False)] = free(
        ("checkpointing", "offload", "states"),
        description="what the plan may set for it, where the file does not: "
        '"checkpointing": precision.gradient_checkpointing and its interval; "offload": offload.group and model_cpu; "states": '
        'offload.optimizer and ema.on; "int8": precision.base = "int8"; "adamw8bit": optimizer.use = "adamw8bit". The last two '
        "change the result, and are not in the default",
    )


class OffloadTable(Options):
    """[offload]: what waits in the machine's memory, or on a disk, while the card does not need it."""

    group: Literal["block", "leaf"] | None = free(
        None,
        description='LoRA: the frozen weights of blocks wait off the card until they run: "block": groups of blocks; "leaf": '
        "layer by layer, which takes about a tenth less than one block and waits most; absent: they stay on the card",
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


class ParallelTable(Options):
    """[parallel]: how processes that train together divide the work."""

    shard: bool = Field(
        False,
        description="each process keeps a share of the weights, of their gradients and of the optimizer's states, and has a block "
        "whole only while it computes (FSDP2); false: each has all of them (DDP)",
    )


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
    skip_nonfinite: int | None = Field(
        None,
        ge=1,
        description="how many steps of the run may be skipped because their loss or gradient is not finite: weights stay as they "
        "were, and the data and the learning rate advance; one more ends the run. Reads the device at each step. Absent: the first "
        "ends the run",
    )
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
