"""Options of the regularizer `crepa`, and how its weight follows from them at each step. No torch.

The defaults are those that users of SANA-Video are told to start with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidatorFunctionWrapHandler, WrapValidator

from vtrain.contract import Decay, DType, Duration, ModelSource, Options, RunLength, fixed, scheduled

HUB_IDS: Mapping[str, str] = {
    "dinov2_vits14": "facebook/dinov2-small",
    "dinov2_vitb14": "facebook/dinov2-base",
    "dinov2_vitl14": "facebook/dinov2-large",
    "dinov2_vitg14": "facebook/dinov2-giant",
    "dinov2_vits14_reg": "facebook/dinov2-with-registers-small",
    "dinov2_vitb14_reg": "facebook/dinov2-with-registers-base",
    "dinov2_vitl14_reg": "facebook/dinov2-with-registers-large",
    "dinov2_vitg14_reg": "facebook/dinov2-with-registers-giant",
}
"""torch hub's names of DINOv2 -> the same weights on the Hugging Face hub."""

WEIGHT_FILES = (".pth", ".pt")
"""Ends of the names of torch hub's own files."""


def _counted(value: Duration) -> Duration:
    if value.unit == "seconds":
        raise ValueError('needs "steps" or "epochs": a schedule in seconds would not be the same run twice')
    return value


def _named(value: object, source: ValidatorFunctionWrapHandler) -> str:
    if isinstance(value, str) and value in HUB_IDS:
        return value
    # A missing file is no hub id.
    bare = isinstance(value, str) and value.endswith(WEIGHT_FILES) and not value.startswith((".", "~", "/"))
    return str(source(f"./{value}" if bare else value))


Length = Annotated[Duration, AfterValidator(_counted)]
"""A duration in steps or epochs."""

EncoderSource = Annotated[ModelSource, WrapValidator(_named)]
"""One of torch hub's names, a hub id, a folder, or a .pth file of torch hub's weights."""


class ProjectorOptions(Options):
    """The MLP from hidden states to features: linear layers with SiLU between them, fp32."""

    layers: int = fixed(2, ge=1, le=8, description="linear layers, with SiLU between them; 1 is a linear map")
    hidden: int | None = fixed(
        None, ge=1, description="width between the layers; absent: that of the block's output, at most 1024"
    )
    lr_factor: float = fixed(1.0, gt=0, le=1e4, description="multiplies the optimizer's learning rate for its weights")


class ScheduleOptions(Options):
    """How the weight changes over the run."""

    decay: Decay = Field("constant", description="how the weight goes to end after the warm-up; constant: it stays")
    power: float = Field(
        2.0, gt=0, description='decay = "polynomial": of what is left; 1 is linear, 2 falls faster at first'
    )
    warmup: Length | None = Field(None, description="linear rise from 0; absent: none")
    length: Length | None = Field(None, description="of the decay, after the warm-up; absent: the rest of the run")
    end: float = Field(0.0, ge=0, description="the weight after the decay")
    cutoff: Length | None = Field(None, description="the weight is 0 from here on; absent: never")
    threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="the weight is 0 once the running mean of the similarity is this high; absent: never",
    )
    threshold_mode: Literal["permanent", "recoverable"] = Field(
        "permanent", description="whether the weight comes back when the running mean falls below the threshold again"
    )
    smoothing: float = Field(
        0.99, ge=0, lt=1, description="of the running mean: what a step leaves of it; 0.99 is about the last 100 steps"
    )
    probe_every: int = Field(
        50,
        ge=1,
        description="recoverable: while the weight is 0, the similarity is still measured at every so many steps",
    )


class CrepaOptions(Options):
    """[[regularizer]] with use = "crepa"."""

    block: int = fixed(10, ge=0, description="the block whose output is aligned, counted from 0")
    weight: float = Field(0.5, gt=0, description="of this loss beside the flow loss; the schedule changes it")
    adjacent_distance: int = Field(
        1, ge=0, description="d, in latent frames: frame f is aligned with frames f-d and f+d too; 0: with itself alone"
    )
    temporal_decay: float = Field(
        1.0, gt=0, description="tau, in latent frames: a frame d away counts exp(-d / tau) as much as the frame itself"
    )
    cumulative_neighbors: bool = Field(
        False, description="align with the frames at all distances from 1 to adjacent_distance, not at that one alone"
    )
    encoder: EncoderSource = fixed(
        "dinov2_vitg14",
        description="the frozen encoder: dinov2_vits14, dinov2_vitb14, dinov2_vitl14 or dinov2_vitg14 (with registers: "
        '"_reg" after it), a hub id such as "facebook/dinov2-small", a folder with such a model, or a .pth file of '
        "torch hub's weights",
    )
    encoder_revision: str | None = fixed(
        None, min_length=1, description="branch, tag or commit of a hub id; absent: its main branch"
    )
    size: Literal["match"] | Annotated[int, Field(ge=1)] = Field(
        "match",
        description='of the frames that the encoder sees. "match": a patch for each token, aspect kept, nothing resampled '
        "(480x832 becomes 420x728); a number such as 518 or 224: squeezed to that square, features resampled to the tokens",
    )
    pooling: bool = Field(
        False,
        description="keep the mean of every 2x2 features: a quarter of the disk, resampled to the tokens when used",
    )
    precision: DType = Field("bf16", description="storage type of the encoder and of its features")
    encoder_batch: int = Field(8, ge=1, description="frames that the encoder takes at once")
    teacher: Literal["cached", "online"] = Field(
        "cached",
        description="features: made once for each clip and window and kept on disk, or made again at each step",
    )
    online_from: Literal["latents", "source"] = Field(
        "latents",
        description='teacher = "online": from the latents, decoded at each step, or from the source\'s own frames',
    )
    drop_vae_encoder: bool = Field(
        False,
        description='teacher = "online" from latents: free the half of the video codec that encodes; clips are encoded before',
    )
    projector: ProjectorOptions = Field(ProjectorOptions(), description="the MLP from hidden states to features")
    schedule: ScheduleOptions = Field(ScheduleOptions(), description="how the weight changes over the run")


class Schedule:
    """The weight at each optimizer step, as the options alone say: a pure function of the step."""

    def __init__(self, weight: float, options: ScheduleOptions) -> None:
        self._weight = weight
        self._options = options

    def weight(self, step: int, run: RunLength) -> float:
        """step: optimizer steps done so far, >= 0. Warm-up and decay as in `scheduled`; 0 from the cutoff on.

        Without a length the decay ends at the run's last step.
        """
        options = self._options
        if options.cutoff is not None and step >= _steps(options.cutoff, run):
            return 0.0
        warmup = 0 if options.warmup is None else _steps(options.warmup, run)
        rest = run.steps - 1 - max(warmup - 1, 0)
        return scheduled(
            step, full=self._weight, end=options.end, warmup=warmup, decay=options.decay, power=options.power,
            length=rest if options.length is None else _steps(options.length, run),
        )  # fmt: skip

    def describe(self) -> str:
        options = self._options
        words = [f"warm-up {options.warmup}"] if options.warmup is not None else []
        if options.decay == "constant":
            words.append("constant")
        else:
            power = f" of power {options.power:g}" if options.decay == "polynomial" else ""
            over = f"over {options.length}" if options.length is not None else "over the rest of the run"
            words.append(f"{options.decay}{power} to {options.end:g} {over}")
        if options.cutoff is not None:
            words.append(f"0 after {options.cutoff}")
        if options.threshold is not None:
            words.append(f"0 once the similarity's running mean is {options.threshold:g} ({options.threshold_mode})")
        return ", ".join(words)

    def idle_keys(self) -> Iterator[str]:
        """Keys that the file gives and that have no effect beside the others."""
        options = self._options
        given = options.model_fields_set
        if options.decay == "constant":
            yield from sorted(given & {"power", "length", "end"})
        elif options.decay != "polynomial":
            yield from sorted(given & {"power"})
        if options.threshold is None:
            yield from sorted(given & {"threshold_mode", "smoothing", "probe_every"})
        elif options.threshold_mode == "permanent":
            yield from sorted(given & {"probe_every"})


class SimilarityGate:
    """Shuts the loss off once the running mean of its similarity is high enough.

    The mean m is exponential in optimizer steps: n steps after it was last told, m becomes g m + (1 - g) s with
    g = smoothing ** n; the first s is m itself. `mean` is None until then.
    """

    def __init__(self, options: ScheduleOptions) -> None:
        self._options = options
        self.mean: float | None = None
        self.step = 0
        self.shut = False

    def tell(self, step: int, similarity: float) -> None:
        """step: 1-based, the one that the similarity was measured in."""
        # By steps and not by readings: between two probes many steps pass.
        kept = self._options.smoothing ** (step - self.step)
        self.mean = similarity if self.mean is None else kept * self.mean + (1 - kept) * similarity
        self.step = step

    def decide(self) -> None:
        """Draw the conclusion."""
        threshold = self._options.threshold
        if threshold is None or self.mean is None:
            return
        high = self.mean >= threshold
        self.shut = high or (self.shut and self._options.threshold_mode == "permanent")

    @property
    def closed(self) -> bool:
        return self.shut and self._options.threshold is not None

    @property
    def for_good(self) -> bool:
        return self.closed and self._options.threshold_mode == "permanent"

    def probes(self, step: int) -> bool:
        """Whether the similarity is measured at this step (steps done so far) although the loss is shut off."""
        return self.closed and not self.for_good and step % self._options.probe_every == 0

    def state(self) -> tuple[float, float, float, float]:
        """All that is remembered: whether there is a mean, the mean, its step, whether it is shut."""
        return float(self.mean is not None), self.mean or 0.0, float(self.step), float(self.shut)

    def restore(self, told: float, mean: float, step: float, shut: float) -> None:
        """Take over what `state` gave. Raises ValueError for what it cannot give."""
        if told not in (0, 1) or shut not in (0, 1) or not abs(mean) < 1.01 or step < 0 or not float(step).is_integer():
            numbers = f"{told:g}, {mean:g}, {step:g}, {shut:g}"
            raise ValueError(f"the running mean of the similarity cannot be restored from {numbers}")
        self.mean = mean if told else None
        self.step, self.shut = int(step), bool(shut)


def _steps(duration: Duration, run: RunLength) -> int:
    steps = duration.in_steps(run.per_epoch)
    assert steps is not None  # options take no seconds
    return steps
