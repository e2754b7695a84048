"""How much memory a run takes, phase by phase: arithmetic over numbers alone (plan/workload.py takes them from a plan). No torch.

The terms of a training step (bytes; T tokens of a micro-batch of the largest bucket, L blocks, N weights, n trained ones):

    weights       N x their storage type, and n x 4 of an adapter; with offload.group those of blocks that are on the card
    casts         2 x N where fp32 weights are cast for bf16 autocast, without recomputing; those of one block with it; of a
                  quantised base the largest layer, as it is computed with
    gradients     n x 4 or 2
    optimizer     n x the state of the optimizer (OptimizerSpec.bytes_of_state)
    average       n x 4 of [ema]
    activations   BlockMemory, measured by the family on fake tensors: of what lives until the backward pass
    teacher       encoders of regularizers' features that run at each step, with the codec that decodes for them (plan/teachers.py)
    loss          fp32 copies of prediction, target and error

In the backward pass kept activations go, block by block, while gradients come: both are linear in the number of blocks done, so
the peak is at its first block or behind its last, and both are reckoned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from vtrain.contract import BlockMemory, ClipShape
from vtrain.contract.records import EncoderMemory
from vtrain.plan.teachers import Teacher, at_work, given, resident, unknown

Place = Literal["device", "host", "disk"]
Recompute = Literal["nothing", "feed-forward", "blocks"]

FRAGMENTATION = 0.06
"""Of all tensors: what the allocator keeps between them. 832x480x49 LoRA: counted 10.44 GiB, on an H200 10.97."""

CONTEXT = 600 << 20
"""Bytes of CUDA's own context and libraries on a card, beside all tensors: 0.4 to 0.6 GiB by card and driver."""

IMPORTED = 600 << 20
"""Bytes of main memory of a process before it loads the model: 0.40 GiB measured, with torch, transformers, diffusers and peft
imported, and 0.56 where it has filled the caches."""

PROCESS = IMPORTED + (450 << 20)
"""With what kernels and the allocator take on a CPU beside tensors, in all 0.80 to 1.02 GiB measured, as the peak of the process less
counted tensors (104 M parameters, LoRA and full, nine settings, two machines); it varies by 0.1 GiB from run to run."""

AHEAD = 4
"""Micro-batches that wait for their step."""

TEXT_WORK = 0.1
"""Of a text encoder's weights: what it computes on captions at most (8 captions of 300 tokens beside 5 GB of weights)."""

ADAPTER = 0.95
"""Of what full training keeps for the backward pass: what an adapter's does, whose frozen layers keep no inputs. Counted of
SANA-Video with an adapter on its attention: 0.92 of all, 0.85 where feed-forward layers are recomputed, 0.96 where blocks are."""

PINNED = 1.5
"""Bytes of page-locked memory for each byte of weights of unknown sizes (`pinned_share`): 1 to 2, and 1.44 on average."""

LOSS_COPIES = 9
"""fp32 numbers for each latent at the peak of a step: clip, noise, noisy, target, prediction, error, its square, two gradients."""


@dataclass(frozen=True)
class MemorySettings:
    """What of a run's settings decides over its memory. stored: bytes of a weight of the base, on average; trained: of one that
    is trained. cast: whether fp32 weights are cast for bf16 autocast. quantised: whether the base is.

    recompute, every: what the backward pass computes again: every n-th block, or feed-forward layers. state: bytes of the optimizer
    for each trained weight, on state_on. ema: bytes of the average for each, on ema_on. resident: the share of frozen weights of
    blocks that are on the device at once; the others wait on rest_on. away: whether the denoiser leaves the device while videos
    are decoded. both: whether validation has weights for evaluation in the place of training's, which stay on the device; aside:
    whether it has the average there, while training's wait in main memory (train/ema.py, `swapped`). accumulate: micro-batches of
    a step. processes: how many train together. shards: among how many of them weights are spread.
    """

    stored: float
    trained: float
    adapter: bool
    recompute: Recompute
    cast: bool = False
    quantised: bool = False
    every: int = 1
    state: float = 8.0
    state_on: Place = "device"
    ema: float = 0.0
    ema_on: Place = "device"
    resident: float = 1.0
    rest_on: Place = "host"
    away: bool = False
    both: bool = False
    aside: bool = False
    batch: int = 1
    accumulate: int = 1
    processes: int = 1
    shards: int = 1
    video_batch: int = 1


@dataclass(frozen=True)
class Workload:
    """What a run works on, whatever its settings. parameters: of the denoiser; in_blocks: the share of them in its blocks; layer:
    numbers of its largest layer.

    adapter: weights of a LoRA adapter, 0 without; guessed: whether its size is not known, and a usual one is taken. tokens,
    latents: of the largest clip, its tokens and numbers. kept: as the family measured it, None: it did not. encoders: of the
    family beside. largest: of the caches' clips. video: of validation, None without; video_tokens: its tokens; guided: whether
    each is solved with the negative prompt beside. running, filling: what is at work in training, and while the caches fill, and
    whose size nobody measured. teachers: encoders of features, at each step or while the caches fill. pinned: bytes of page-locked
    memory for each byte of weights that wait there.
    """

    parameters: int
    blocks: int
    in_blocks: float
    adapter: int
    guessed: bool
    tokens: int
    latents: int
    kept: BlockMemory | None
    encoders: Mapping[str, EncoderMemory] = field(default_factory=dict)
    largest: ClipShape | None = None
    video: ClipShape | None = None
    video_tokens: int = 0
    guided: bool = False
    layer: int = 0
    pinned: float = 1.0
    running: tuple[str, ...] = ()
    filling: tuple[str, ...] = ()
    teachers: tuple[Teacher, ...] = ()


@dataclass(frozen=True, eq=False)
class Phase:
    """What a run does at some time, and the bytes that it takes then, by what they are for. unknown: what is not in them."""

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @property
    def tensors(self) -> int:
        return sum(self.device.values())

    @property
    def total(self) -> int:
        """On an accelerator: with what its allocator and its driver take."""
        return int(self.tensors * (1 + FRAGMENTATION)) + CONTEXT

    @property
    def on_host(self) -> int:
        return sum(self.host.values()) + PROCESS

    @property
    def on_cpu(self) -> int:
        """Where the CPU trains: all of it in the machine's memory, where a checkpoint is written as it lies there, and a text
        encoder stays where it was loaded."""
        elsewhere = sum(self.host.get(name, 0) for name in ("gathered", "loading"))
        return int(self.tensors * (1 + FRAGMENTATION)) + self.on_host - elsewhere


@dataclass(frozen=True)
class MemoryEstimate:
    """All phases of a run, in their order."""

    phases: tuple[Phase, ...]
    settings: MemorySettings

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def on_device(self) -> int:
        return self.peak.total

    @property
    def on_host(self) -> int:
        return max(phase.on_host for phase in self.phases)

    @property
    def on_cpu(self) -> int:
        return max(phase.on_cpu for phase in self.phases)

    @property
    def training(self) -> Phase:
        """The phase of a training step that takes most."""
        return max((phase for phase in self.phases if phase.name in TRAINING), key=lambda phase: phase.total)

    @property
    def unknown(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text for phase in self.phases for text in phase.unknown))


FORWARD, BACKWARD, STEP = "training: forward", "training: backward", "training: optimizer step"
TRAINING = (FORWARD, BACKWARD, STEP)
CAPTIONS, CLIPS, LOADING = "encoding captions", "encoding clips", "loading the model"
FEATURES = "encoding features"
SOLVING, DECODING, SAVING = "validation: solving", "validation: decoding", "saving a checkpoint"


def estimate_of(work: Workload, settings: MemorySettings) -> MemoryEstimate:
    """The arithmetic: pure, of numbers alone."""
    codec, text = work.encoders.get(CODEC), work.encoders.get(TEXT)
    filling = [
        _filling(CAPTIONS, text, None, 1),
        _filling(CLIPS, codec, work.largest, settings.video_batch),
        *(_features(each, work.largest) for each in work.teachers if not each.online),
        *(Phase(f"encoding {name}", {}, unknown=(f"the encoder of {name}",)) for name in work.filling),
    ]
    phases = [*filling, *_loading(work, settings), *_training(work, settings)]
    if work.video is not None:
        phases += [_solving(work, settings), _decoding(work, settings, codec)]
    phases.append(_saving(work, settings))
    return MemoryEstimate(tuple(each for each in phases if each.device or each.host or each.unknown), settings)


TEXT, CODEC = "text encoder", "video codec"
"""Of a family's models beside its denoiser (SupportsEncoderMemory)."""


def pinned_share(sizes: Sequence[int]) -> float:
    """Bytes that page-locked memory takes for each byte of weights of these sizes: torch gives each the next power of two
    (CachingHostAllocator.h). SANA-Video 2B: 1.34."""
    return sum(1 << (size - 1).bit_length() for size in sizes) / sum(sizes) if sizes else PINNED


def _filling(name: str, encoder: EncoderMemory | None, clip: ClipShape | None, batch: int) -> Phase:
    if encoder is None:
        return Phase(name, {}, unknown=(f"{name}: the size of the encoder",))
    if clip is None:
        device = {"encoders": encoder.weights, "activations": int(TEXT_WORK * encoder.weights)}
        return Phase(name, device, {"loading": encoder.weights})
    if encoder.encode is None:
        return Phase(name, {"encoders": encoder.weights}, unknown=(f"{name}: what the codec computes",))
    return Phase(name, {"encoders": encoder.weights, "activations": int(batch * encoder.encode.of(clip))})


def _features(teacher: Teacher, clip: ClipShape | None) -> Phase:
    name = f"{FEATURES} of {teacher.name}"
    if teacher.why_not or clip is None or teacher.memory is None:
        return Phase(name, {}, unknown=(teacher.why_not or name,))
    return Phase(name, {"encoders": teacher.memory.weights, "activations": teacher.work(clip)})


def _loading(work: Workload, settings: MemorySettings) -> Iterator[Phase]:
    """A base that is quantised is read in bf16 first, all of it, in main memory; anything else goes where it is to be."""
    if settings.quantised:
        yield Phase(LOADING, {}, {"weights": 2 * work.parameters})


def _trained(work: Workload, settings: MemorySettings) -> int:
    """How many numbers are trained."""
    return work.adapter if settings.adapter else work.parameters


def held(work: Workload, settings: MemorySettings) -> tuple[dict[str, int], dict[str, int]]:
    """(device, host): what is there from the first step to the last."""
    trained = _trained(work, settings)
    frozen = settings.stored * work.parameters * settings.adapter
    away = frozen * work.in_blocks * (1 - settings.resident)
    whole = frozen - away + settings.trained * trained
    device = {"weights": int(whole) if settings.shards == 1 else _spread(work, settings)}
    host = {"clips": AHEAD * settings.batch * (work.latents * 8 + given(work.teachers, work.largest))}
    if teaching := resident(work.teachers, work.encoders.get(CODEC)):
        device["teacher"] = teaching
    if settings.rest_on == "host":
        host["weights"] = int(work.pinned * away)
    state, average = (int(size * trained / settings.shards) for size in (settings.state, settings.ema))
    # Stepped on the host, the optimizer has copies there of what is trained and of its gradients; an average there has one of
    # weights on their way. All of these are page-locked.
    copies = 2 * int(work.pinned * settings.trained * trained / settings.shards) if settings.state_on == "host" else 0
    more = int(work.pinned * average) if settings.ema_on == "host" else 0
    for key, size, place in (
        ("optimizer", state + copies, settings.state_on),
        ("average", average + more, settings.ema_on),
    ):
        if size:
            (device if place == "device" else host)[key] = size
    return device, host


def _training(work: Workload, settings: MemorySettings) -> Iterator[Phase]:
    """The phases of a step: where the forward pass ends, where the backward pass does, and where the weights move."""
    device, host = held(work, settings)
    gradients = {"gradients": _gradients(work, settings)}
    inputs = {"loss": int(4 * LOSS_COPIES * settings.batch * work.latents)}
    codec = work.encoders.get(CODEC)
    left_out = (*unknown(work.teachers, codec), *(f"what {name} computes" for name in work.running))
    teaching = device.get("teacher", 0) + at_work(work.teachers, work.largest, codec)
    if work.kept is None or not work.tokens:
        parts = {**device, **gradients, **inputs, "teacher": teaching}
        yield Phase(BACKWARD, parts, host, (*left_out, "activations of blocks"))
        return
    tokens = settings.batch * work.tokens * (ADAPTER if settings.adapter else 1)
    before = gradients if settings.accumulate > 1 else {}
    forward = {**device, **before, **inputs}
    # The forward pass has come to its end, where teachers run, or the backward pass has computed the first block again.
    kept, again = (tokens * size for size in _kept(work.kept, settings, work.blocks))
    casts = _casts(work, settings, work.blocks, ended=True)
    ended = {**forward, "activations": int(kept), "casts": casts, "teacher": teaching}
    turned = {**forward, "activations": int(kept + again), "casts": _casts(work, settings, work.blocks, ended=False)}
    yield Phase(FORWARD, max(ended, turned, key=lambda parts: sum(parts.values())), host, left_out)
    last = tokens * sum(_kept(work.kept, settings, 1))
    casts = _casts(work, settings, 1, ended=False)
    yield Phase(BACKWARD, {**device, **gradients, **inputs, "activations": int(last), "casts": casts}, host, left_out)
    yield Phase(STEP, {**device, **gradients}, host)


def _gradients(work: Workload, settings: MemorySettings) -> int:
    whole = int(settings.trained * _trained(work, settings))
    if settings.shards == 1:  # several processes add them up in buckets of the same size (DDP)
        return (2 if settings.processes > 1 else 1) * whole
    # A block's are whole until they are exchanged, and beside them lies what is sent.
    return whole // settings.shards + 2 * int(whole * work.in_blocks / max(work.blocks, 1))


def _spread(work: Workload, settings: MemorySettings) -> int:
    """Weights of one of several processes that each keep a share: this, two blocks whole, of which one comes while the other
    computes, and what lies in no block. What is quantised is whole on each."""
    frozen = settings.stored * work.parameters * settings.adapter
    cut = settings.trained * _trained(work, settings) + (0 if settings.quantised else frozen)
    gathered = cut * (1 - work.in_blocks + 2 * work.in_blocks / max(work.blocks, 1))
    return int(cut / settings.shards + gathered + (frozen if settings.quantised else 0))


def _kept(kept: BlockMemory, settings: MemorySettings, left: int) -> tuple[float, float]:
    """Bytes for a token when so many blocks are still to be gone through by the backward pass: (kept of them by the forward
    pass, made again of the last of them)."""
    if settings.recompute == "nothing":
        return kept.plain.outside + left * kept.plain.block, 0.0
    if settings.recompute == "feed-forward":
        part = kept.feed_forward or kept.plain
        return part.outside + left * part.block, max(0.0, kept.plain.block - part.block)
    recomputed = -(-left // settings.every)
    outside = kept.checkpointed.outside if settings.every == 1 else max(kept.checkpointed.outside, kept.plain.outside)
    # The last block is one of every n-th, or one that is kept whole, which goes before the next is computed again.
    again = kept.plain.block if (left - 1) % settings.every == 0 else 0.0
    return outside + recomputed * kept.checkpointed.block + (left - recomputed) * kept.plain.block, again


def _casts(work: Workload, settings: MemorySettings, left: int, *, ended: bool) -> int:
    """bf16 copies of weights that are stored otherwise: of fp32 ones those that the backward pass needs of so many blocks.

    ended: the forward pass has come to its end, where autocast still has its own copies of all that is trained.
    """
    if settings.quantised:
        return 2 * work.layer
    if not settings.cast:
        return 0
    if settings.recompute != "blocks" or (ended and not settings.adapter and settings.shards == 1):
        alive = left if not ended else work.blocks
    else:
        recomputed = -(-left // settings.every)
        alive = left - recomputed + (0 if ended else 1)
    return int(2 * work.parameters * (work.in_blocks * alive / work.blocks + 1 - work.in_blocks))


def _validating(work: Workload, settings: MemorySettings) -> tuple[dict[str, int], dict[str, int]]:
    """`held` in a validation."""
    device, host = held(work, settings)
    if settings.both:
        device["weights"] += int(settings.trained * _trained(work, settings))
    return device, host


def _solving(work: Workload, settings: MemorySettings) -> Phase:
    """Videos are solved: a forward pass without gradients, of the prompt and, guided, of the negative one."""
    device, host = _validating(work, settings)
    if settings.aside:
        host = {**host, "weights": host.get("weights", 0) + int(settings.trained * _trained(work, settings))}
    if work.kept is None or not work.video_tokens:
        return Phase(SOLVING, device, host, ("validation: what a block computes",))
    working = (1 + work.guided) * work.video_tokens * (work.kept.working or work.kept.plain.block)
    casts = _casts(work, settings, work.blocks if not settings.adapter else 1, ended=not settings.adapter)
    return Phase(SOLVING, {**device, "activations": int(working), "casts": casts}, host)


def _decoding(work: Workload, settings: MemorySettings, codec: EncoderMemory | None) -> Phase:
    device, host = _validating(work, settings)
    if settings.away:  # all but what is no module's: training's weights beside those for evaluation
        stays = device["weights"] - held(work, settings)[0]["weights"]
        host = {**host, "weights": host.get("weights", 0) + device["weights"] - stays}
        device = {**device, "weights": stays}
    elif settings.resident < 1:  # groups leave the device before
        blocks = int(settings.stored * work.parameters * work.in_blocks * settings.resident)
        device = {**device, "weights": device["weights"] - blocks}
    if codec is None or codec.decode is None:
        return Phase(DECODING, device, host, ("validation: the video codec",))
    assert work.video is not None
    # Frames of the file: float in, bytes out.
    frames = int(5 * 3 * prod(work.video))
    device = {**device, "encoders": codec.weights, "activations": int(codec.decode.of(work.video))}
    return Phase(DECODING, device, {**host, "videos": frames})


def _saving(work: Workload, settings: MemorySettings) -> Phase:
    """A checkpoint is written: what it keeps is gathered in main memory, one piece after the other, or, of shares, a tensor after
    the other, which is none larger than a block or what lies in none."""
    device, host = held(work, settings)
    part = max(work.in_blocks / max(work.blocks, 1), 1 - work.in_blocks) if settings.shards > 1 else 1
    gathered = int(_trained(work, settings) * max(settings.trained, settings.state, settings.ema) * part)
    return Phase(SAVING, device, {**host, "gathered": gathered})
