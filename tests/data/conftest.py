"""A small honest family, plans over folders, and video files made with PyAV for the tests of the data layer."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import pytest
import torch
from vtrain_toy.colours import COLOURS

from vtrain.config.data_tables import DataTable
from vtrain.config.record import Config, NoKeys, Part
from vtrain.config.tables import (
    CacheTable,
    CheckpointTable,
    LrScheduleTable,
    ModelTable,
    OffloadTable,
    ParallelTable,
    PrecisionTable,
    RunTable,
    TrainTable,
)
from vtrain.contract import (
    Caption,
    CaptionExtra,
    ClipShape,
    ConditionSpec,
    FeatureEncoder,
    FrameRule,
    HashFile,
    Latents,
    LatentShape,
    Registered,
    Regularizer,
    Role,
    Size,
    SourceRef,
    Text,
    TextEncoderSpec,
    TextPartSpec,
    TokenGrid,
)
from vtrain.data import batches as source_frames
from vtrain.data.caching import fill as filling
from vtrain.data.decoding.worker import Workers
from vtrain.data.scanning import scan as scanning
from vtrain.plan.records import DatasetPlan, Plan
from vtrain_builtin.folder import FOLDER, FolderOptions, LocalFolder

CLIPS = Path(__file__).parents[2] / "examples" / "clips"


class WordEncoder:
    """One token per word after a first one, as bfloat16 numbers of the word's and the role's hash."""

    def __init__(self, family: AverageFamily) -> None:
        self.family = family

    def encode(self, captions: Sequence[Caption], role: Role) -> Text:
        self.family.encoded_texts += [(caption.text, role) for caption in captions]
        rows = [["<start>", *caption.text.split()] for caption in captions]
        longest = max(map(len, rows))
        embeds = torch.zeros(len(rows), longest, AverageFamily.text_width, dtype=torch.bfloat16)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            for j, word in enumerate(row):
                digest = hashlib.sha256(f"{role} {word}".encode()).digest()[: AverageFamily.text_width]
                embeds[i, j] = torch.tensor(list(digest)) / 255
                mask[i, j] = True
            embeds[i, len(row) :] = 7.0  # what an encoder makes of padding is not zero
        return Text.of(embeds, mask)


class AverageCodec:
    """Latents are pixels averaged over 8x8 squares, of every fourth frame."""

    def __init__(self, family: AverageFamily) -> None:
        self.family = family

    def encode(self, pixels: torch.Tensor, *, std: bool = False) -> Latents:
        if self.family.on_encode is not None:
            self.family.on_encode()
        self.family.encoded_batches.append(tuple(pixels.shape))
        assert pixels.dtype == torch.float32
        assert pixels.abs().max() <= 1
        mean = torch.nn.functional.avg_pool3d(pixels[:, :, ::4], (1, 8, 8)) + self.family.spoil
        return Latents(mean, (mean + 2) / 10 if std else None)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the data layer decodes no latents")


@dataclasses.dataclass
class AverageFamily:
    """A family with no weights: its codec averages, its text encoder hashes. It counts what it is asked to do.

    on_encode: called before each encoding of video. spoil: added to its latents. taken: what it takes beside text.
    """

    codec_weights: Path | None = None
    text_version: str = "1"
    encoded_texts: list[tuple[str, Role]] = dataclasses.field(default_factory=list)
    encoded_batches: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    opened: list[str] = dataclasses.field(default_factory=list)
    on_encode: Callable[[], None] | None = None
    spoil: float = 0.0
    taken: tuple[ConditionSpec, ...] = (
        ConditionSpec("first_frame", "the first frame", "first_frame", required=False, clean_frames=1),
    )

    default_fps = 16.0
    default_frames = 17
    default_size = Size(128, 64)
    frame_rule = FrameRule(4, 1)
    pixel_stride = 8
    caption_extras = (CaptionExtra("motion_score", "int", "how much moves", minimum=0, default="30"),)
    text_width = 6

    def conditions(self) -> tuple[ConditionSpec, ...]:
        return self.taken

    def latent_shape(self, clip: ClipShape) -> LatentShape:
        return LatentShape(3, (clip.frames - 1) // 4 + 1, clip.height // 8, clip.width // 8)

    def pixel_frames(self, latent_frame: int) -> range:
        return range(max(0, 4 * latent_frame - 3), 4 * latent_frame + 1)

    def token_grid(self, latents: LatentShape) -> TokenGrid:
        return TokenGrid(latents.frames, latents.height // 2, latents.width // 2)

    def text_encoders(self) -> Mapping[str, TextEncoderSpec]:
        part = TextPartSpec(self.text_width, 40, dtype="bf16")
        return {
            "words": TextEncoderSpec({"text": part}, lambda hash_file: f"words-{self.text_version}", self.open_words)
        }

    def video_fingerprint(self, hash_file: HashFile) -> str:
        return "average" if self.codec_weights is None else hash_file(self.codec_weights)

    @contextmanager
    def open_words(self, device: str) -> Iterator[WordEncoder]:
        self.opened.append("text")
        yield WordEncoder(self)
        self.opened.append("text closed")

    @contextmanager
    def open_video_codec(self, device: str) -> Iterator[AverageCodec]:
        self.opened.append("video")
        yield AverageCodec(self)
        self.opened.append("video closed")

    @property
    def clips(self) -> int:
        """Clips encoded so far."""
        return sum(shape[0] for shape in self.encoded_batches)


class CountingFolder(LocalFolder):
    """A folder that remembers which files were opened."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.opened: list[str] = []

    def open(self, ref: SourceRef) -> BinaryIO:
        self.opened.append(ref.id)
        return super().open(ref)


@dataclasses.dataclass
class Setup:
    """A dataset folder and a cache folder, with plans over them."""

    root: Path
    family: AverageFamily = dataclasses.field(default_factory=AverageFamily)
    cache_keys: dict[str, object] = dataclasses.field(default_factory=dict)
    """More keys of [cache]."""
    regularizers: tuple[tuple[str, Regularizer], ...] = ()

    @property
    def folder(self) -> Path:
        return self.root / "dataset"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def dataset(
        self,
        name: str = "clips",
        folder: Path | None = None,
        sizes: Sequence[tuple[int, int]] = ((128, 64),),
        frames: int = 17,
        min_frames: int | None = None,
        fps: float = 16.0,
        **table: object,
    ) -> DatasetPlan:
        return DatasetPlan(
            id=name, where="config.toml:20", backend=CountingFolder(str(folder or self.folder)),
            table=DataTable.model_validate(table), sizes=tuple(Size(*size) for size in sizes), frames=frames,
            min_frames=min_frames or frames, fps=fps, extras=self.family.caption_extras,
        )  # fmt: skip

    def plan(self, *datasets: DatasetPlan, seed: int = 1, video_batch: int = 1, **train: object) -> Plan:
        datasets = datasets or (self.dataset(),)
        registered = Registered(FOLDER, "builtin", "vtrain", "0")
        config = Config(
            path=self.root / "config.toml", text="", lines={},
            run=RunTable.model_validate({"output_dir": self.root / "out", "seed": seed}),
            model=Part(registered, NoKeys(), ModelTable.model_validate({"train": "full"})),
            precision=PrecisionTable(), memory=None, parallel=ParallelTable(), offload=OffloadTable(), ema=None,
            data=tuple(Part(registered, FolderOptions(path=d.backend.location), d.table) for d in datasets),
            cache=CacheTable.model_validate(
                {"dir": self.cache, "text_batch": 3, "video_batch": video_batch, **self.cache_keys}
            ),
            train=TrainTable.model_validate({"steps": 1, **train}),
            sampler=Part(registered, NoKeys(), NoKeys()), optimizer=Part(registered, NoKeys(), NoKeys()),
            lr_schedule=LrScheduleTable(), validation=None, checkpoint=CheckpointTable(), regularizers=(), trackers=(),
        )  # fmt: skip
        return Plan(
            config=config, processes=1, family=self.family, sampler=None, regularizers=self.regularizers, datasets=datasets,
            base="fp32", validation=None, warnings=(),
        )  # fmt: skip

    def use_colours(self, on_encode: Callable[[], None]) -> None:
        """Let runs use the toy plugin's regularizer with an encoder. on_encode: called before each encoding of a clip."""
        part = COLOURS.build(COLOURS.options.model_validate({"block": 0}))
        opening = part.open_feature_encoder

        @contextmanager
        def watched(device: str) -> Iterator[FeatureEncoder]:
            with opening(device) as encoder:
                encode = encoder.encode

                def told(frames: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
                    on_encode()
                    return encode(frames, grid)

                encoder.encode = told
                yield encoder

        part.open_feature_encoder = watched
        self.regularizers = (("toy-colours", part),)

    def add(self, name: str, data: bytes, caption: str | None = "a clip") -> Path:
        """Put a file into the dataset folder, with its caption beside it."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        if caption is not None:
            file.with_suffix(".txt").write_text(caption)
        return file


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    made = Setup(tmp_path)
    made.folder.mkdir()
    return made


@pytest.fixture
def three(setup: Setup, make_video: Callable[..., bytes]) -> Setup:
    """Three clips of three sizes, with captions."""
    for k, size in enumerate([(128, 64), (136, 64), (128, 72)]):
        setup.add(f"{k}.mp4", make_video(frames=27 + k, fps=24, size=size), f"caption number {k}")
    return setup


@pytest.fixture(scope="session")
def decoding_process() -> Iterator[Workers]:
    """One that stays for all tests: each would import torch anew."""
    with Workers(1, limit_s=60) as workers:
        yield workers


@pytest.fixture(autouse=True)
def kept_process(monkeypatch: pytest.MonkeyPatch, decoding_process: Workers) -> None:
    """Scans probe and filling decodes in a process that other tests used before."""
    for module in (scanning, filling, source_frames):
        monkeypatch.setattr(module, "Workers", lambda count, limit_s: nullcontext(decoding_process))


@pytest.fixture(scope="session")
def clips() -> Path:
    """The folder of real clips."""
    return CLIPS


def picture(k: int, size: tuple[int, int]) -> np.ndarray:
    """Frame k of a made video, (h, w, 3): a grey that tells k, in a frame of four colours that tells its orientation."""
    width, height = size
    frame = np.full((height, width, 3), 20 + (k * 5) % 200, dtype=np.uint8)
    frame[: height // 4, : width // 4] = (250, 0, 0)  # top left red
    frame[: height // 4, -width // 4 :] = (0, 250, 0)  # top right green
    frame[-height // 4 :, : width // 4] = (0, 0, 250)  # bottom left blue
    return frame


@pytest.fixture(scope="session")
def make_video() -> Callable[..., bytes]:
    return video_bytes


def video_bytes(
    frames: int = 27,
    fps: float = 24,
    size: tuple[int, int] = (128, 64),
    form: str = "mp4",
    codec: str = "libx264",
    rotate: int = 0,
    mirror: bool = False,
    gop: int = 250,
    b_frames: int = 3,
    aspect: Fraction | None = None,
    transfer: int | None = None,
    times: Sequence[float] | None = None,
    options: Mapping[str, str] | None = None,
) -> bytes:
    """An encoded file. times: of each frame in seconds, instead of fps. rotate: degrees in the display matrix."""
    with (
        tempfile.NamedTemporaryFile() as target,
        av.open(target.name, "w", format=form, options=dict(options or {})) as container,
    ):
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "12", "g": str(gop), "bf": str(b_frames)}
        if transfer:
            stream.codec_context.color_trc = transfer
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotate or mirror:
            stream.set_display_rotation(rotate, hflip=mirror)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(k, size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[k] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.close()
        return Path(target.name).read_bytes()


@pytest.fixture(scope="session")
def undecodable() -> bytes:
    """Of a sound header, with zeros for the pictures of its second half, which only decoding finds."""
    data = video_bytes(frames=48, options={"movflags": "faststart"})
    half = int(len(data) * 0.6)
    return data[:half] + bytes(len(data) - half)


def audio_bytes() -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        for k in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, k * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return target.getvalue()


@pytest.fixture(scope="session")
def audio_only() -> bytes:
    return audio_bytes()
