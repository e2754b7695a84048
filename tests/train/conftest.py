"""Whole runs of the toy family, as a user starts them: a config file, the `vtrain` command, an output folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vtrain.cli.app import main
from vtrain.contract import Caption, ClipShape, Condition, NoiseLevel
from vtrain.contract.transfers import Arriving, Transfers
from vtrain.data import batches as frames
from vtrain.data.batches import pad
from vtrain.data.caching import fill as filling
from vtrain.data.decoding.worker import Workers
from vtrain.data.scanning import scan
from vtrain.train.offload import Frozen, InMemory
from vtrain.train.step import StepInput

TOY_CONFIG = """
[run]
output_dir = "out"
seed = 7

[model]
use = "toy"
train = "{train}"
{lora}
[precision]
mixed = "no"

[[data]]
use = "folder"
path = "clips"

[cache]
dir = "{cache}"

[train]
steps = {steps}
batch_size = {batch_size}
accumulate = {accumulate}
caption_dropout = 0.3
log_every = {log_every}

[optimizer]
use = "adamw"
lr = {lr}

[lr_schedule]
use = "cosine"
warmup = "2 steps"

[checkpoint]
every = "{save} steps"
"""

OWN = ("seconds", "data_wait", "memory")
"""What of a row differs between runs."""

LORA = "\n[model.lora]\nrank = {rank}\nalpha = 8.0\ndropout = 0.2\n"


@dataclass(frozen=True)
class Folder:
    """A folder with a config file and what a run leaves in it."""

    path: Path
    cache: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def output(self) -> Path:
        return self.path / "out"

    def write(self, more: str = "", train: str = "full", rank: int = 4, **values: Any) -> Path:
        """Write the config; `more` is appended."""
        given = {"steps": 6, "batch_size": 2, "accumulate": 1, "log_every": 2, "lr": 1e-3, "save": 3} | values
        lora = LORA.format(rank=rank) if train == "lora" else ""
        text = TOY_CONFIG.format(train=train, lora=lora, cache=self.cache.as_posix(), **given)
        self.config.write_text(text + more, encoding="utf-8")
        return self.config

    @staticmethod
    def validation(every: str = "3 steps", **prompts: str) -> str:
        """A table for `more`. prompts: by nickname, one if none is given."""
        named = ", ".join(f'"{name}" = "{text}"' for name, text in (prompts or {"one": "gradient"}).items())
        size = 'size = "64x64"\nframes = 9\nsteps = 2'
        return f'\n[validation]\nevery = "{every}"\n{size}\nprompts = {{ {named} }}\n'

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl without what differs between runs."""
        lines = (self.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in OWN} for line in lines]

    def tensors(self, step: int) -> dict[str, Tensor]:
        """Every tensor of a checkpoint."""
        folder = self.output / "checkpoints" / f"step-{step:06d}"
        files = sorted(folder.rglob("*.safetensors"))
        assert files
        return {f"{file.relative_to(folder)}:{k}": v for file in files for k, v in load_file(file).items()}


def command(*arguments: str | Path, processes: int = 1) -> list[str]:
    """The command line of `vtrain`, by itself or under torchrun on this machine's CPU."""
    code = "from vtrain.cli.app import main; main()"
    if processes == 1:
        return [sys.executable, "-c", code, *map(str, arguments)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, "-m", "vtrain.cli", *map(str, arguments)]


@pytest.fixture
def vtrain() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `vtrain` in a process of its own, one thread, and give what it printed."""

    def run(*arguments: str | Path, processes: int = 1, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(*arguments, processes=processes), capture_output=True, text=True, env=environment(), timeout=240
        )
        assert check is None or done.returncode == check, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def decoding() -> Iterator[Workers]:
    with Workers(1, limit_s=60) as workers:
        yield workers


@pytest.fixture
def one_decoder(monkeypatch: pytest.MonkeyPatch, decoding: Workers) -> None:
    """Runs in this process have one that decodes for all tests: each new one would import its libraries again."""
    for module in (scan, filling, frames):
        monkeypatch.setattr(module, "Workers", lambda count, limit_s: nullcontext(decoding))


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch, one_decoder: None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `vtrain`, called in this process."""

    def run(*arguments: str | Path, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr("sys.argv", ["vtrain", *map(str, arguments)])
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
        done = subprocess.CompletedProcess(arguments, int(ended.value.code or 0), out.getvalue(), err.getvalue())
        assert check is None or done.returncode == check, done.stdout + done.stderr
        return done

    return run


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `vtrain` and go on; whatever still runs at the end of the test is killed.

    background: as the shell does what a script ends in `&`: Ctrl-C is ignored.
    """
    running: list[subprocess.Popen[str]] = []

    def begin(*arguments: str | Path, processes: int = 1, background: bool = False) -> subprocess.Popen[str]:
        shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"] if background else []
        process = subprocess.Popen(
            [*shell, *command(*arguments, processes=processes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def write_clip(path: Path, width: int, height: int, frames: int, seed: int) -> None:
    """A moving gradient at 8 fps, H.264."""
    grid = np.indices((height, width)).sum(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(8))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            ramp = (grid * (seed + 1) + number * 8) % 256
            picture = np.stack([ramp, 255 - ramp, np.full_like(ramp, seed * 30)], -1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture
def spoil_end() -> Callable[[Path], None]:
    """Make zeros of the last tenth of a clip's pictures; its header and all frames before are sound."""

    def spoil(clip: Path) -> None:
        with (
            av.open(str(clip)) as source,
            av.open(str(clip.with_suffix(".mov")), "w", options={"movflags": "faststart"}) as copy,
        ):
            stream = copy.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    copy.mux(packet)
        data = clip.with_suffix(".mov").read_bytes()
        tenth = (len(data) - data.index(b"mdat")) // 10
        clip.write_bytes(data[:-tenth] + bytes(tenth))
        clip.with_suffix(".mov").unlink()

    return spoil


@pytest.fixture(scope="session")
def toy_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five captioned clips of two shapes, and a cache that all runs share."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "clips").mkdir()
    for seed, (width, height) in enumerate([(64, 64), (96, 64), (64, 64), (96, 64), (64, 64)]):
        write_clip(folder / "clips" / f"clip_{seed}.mp4", width, height, 9, seed)
        (folder / "clips" / f"clip_{seed}.txt").write_text(f"gradient number {seed}", encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path, toy_clips: Path) -> Folder:
    (tmp_path / "clips").symlink_to(toy_clips / "clips")
    return Folder(tmp_path, toy_clips / "cache")


@pytest.fixture
def another(tmp_path_factory: pytest.TempPathFactory, toy_clips: Path) -> Callable[[], Folder]:
    """More folders beside `folder`, with the same clips and cache."""

    def make() -> Folder:
        path = tmp_path_factory.mktemp("another")
        (path / "clips").symlink_to(toy_clips / "clips")
        return Folder(path, toy_clips / "cache")

    return make


@pytest.fixture
def toy() -> Any:
    from vtrain_toy.family import TOY

    return TOY.build(TOY.options.model_validate({"width": 32, "blocks": 3}))


@pytest.fixture
def denoiser(toy: Any) -> Any:
    return toy.load_denoiser("cpu", "fp32")


@pytest.fixture
def given(toy: Any) -> Callable[[int], StepInput]:
    def make(batch: int) -> StepInput:
        shape = toy.latent_shape(ClipShape(9, 64, 96))
        generator = torch.Generator().manual_seed(5)
        clean, noise = (torch.randn((batch, *shape), generator=generator) for _ in range(2))
        sigma = torch.rand(batch, generator=generator)
        with toy.text_encoders()["words"].open("cpu") as encoder:
            words = [encoder.encode([Caption(f"clip {n}")], "prompt").only.embeds[0] for n in range(batch)]
        text = pad([{"text": each} for each in words], toy.text_encoders())
        return StepInput(clean, noise, NoiseLevel(sigma, sigma * 1000), Condition(text), 0)

    return make


@pytest.fixture
def sampler() -> Any:
    from vtrain_builtin.flow import FLOW

    return FLOW.build(FLOW.options(), {})


@dataclass
class Moves:
    """What moved. sent: how many times weights were sent to the card. together: weights on it or under way, most and now."""

    sent: int = 0
    waited: int = 0
    now: dict[int, int] = field(default_factory=dict)
    most: int = 0

    def count(self, owner: object, bytes_there: int) -> None:
        self.now[id(owner)] = bytes_there
        self.most = max(self.most, sum(self.now.values()))


def poison(monkeypatch: pytest.MonkeyPatch, *, streams: bool = False) -> Moves:
    """A stand-in for a card's own memory, since from CPU to CPU nothing moves: weights that are away are NaN, and those under way
    too. What reads one before it is there computes with NaN. Gives what moves."""
    moves = Moves()

    def leave(self: InMemory, weights: Sequence[Frozen]) -> None:
        for weight, home in zip(weights, self._tensors, strict=True):
            weight.become(torch.full_like(home, torch.nan))
        moves.count(self._tensors, 0)

    def send(self: Transfers, tensors: Sequence[Tensor]) -> Arriving:
        moves.sent += 1
        moves.count(tensors, sum(each.nbytes for each in tensors))
        return Arriving(tuple(torch.full_like(each, torch.nan) for each in tensors), tuple(tensors))

    def receive(self: Transfers, arriving: Arriving) -> tuple[Tensor, ...]:
        moves.waited += 1
        with torch.no_grad():
            for copy, source in zip(arriving.tensors, arriving.arrived, strict=True):
                copy.copy_(source)
        return arriving.tensors

    monkeypatch.setattr(InMemory, "leave", leave)
    monkeypatch.setattr(Transfers, "send", send)
    monkeypatch.setattr(Transfers, "receive", receive)
    monkeypatch.setattr(Transfers, "streams", staticmethod(lambda device: streams))
    plain: Any = Transfers.__init__
    monkeypatch.setattr(Transfers, "__init__", lambda self, device, beside=False: plain(self, device))
    return moves


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Moves]:
    """poisoned(streams=...): from now on weights that are away hold no numbers; gives what moves."""
    return lambda **how: poison(monkeypatch, **how)
