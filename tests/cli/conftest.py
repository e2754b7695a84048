"""A folder as people have them, and `vtrain` called in this process, for the tests of the commands."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vtrain.cli.app import app
from vtrain.data.decoding.worker import Workers
from vtrain.data.scanning import scan as scanning

CONFIG = """
[run]
output_dir = "out"

[model]
use = "toy"
train = "full"

[precision]
mixed = "no"

[cache]
dir = "cache"

[train]
steps = 1

[optimizer]
use = "adamw"
lr = 1e-3
"""
DATA = '\n[[data]]\nuse = "folder"\nid = "{name}"\npath = "{path}"\nresolution = ["64x64", "96x64"]\n{more}\n'
VIDEO = "[data.video]\nframes = 9\nfps = 8\n"


def clip(path: Path, frames: int = 9, size: tuple[int, int] = (64, 64), fps: int = 8, seed: int = 1) -> Path:
    """A moving gradient, its index in front of its pictures."""
    grid = np.indices(size[::-1]).sum(0)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            ramp = (grid * (seed + 1) + number * 8) % 256
            picture = np.stack([ramp, 255 - ramp, np.full_like(ramp, seed * 30)], -1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def sound(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def fill_messy(folder: Path) -> None:
    for number, name in enumerate(("a clip", "-dash", "\U0001f430 hop", "two\nlines")):
        clip(folder / f"{name}.mp4", seed=number)
    clip(folder / "long.mp4", frames=40, size=(192, 128))
    clip(folder / "short.mp4", frames=4)
    clip(folder / "slow.mp4", frames=12, fps=5)
    clip(folder / "small.mp4", size=(48, 48))
    whole = clip(folder / "no words.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[:400])
    (folder / "latin.mp4").write_bytes(whole + bytes(1))
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.mp4")).write_bytes(whole)
    (folder / "empty.mp4").touch()
    sound(folder / "sound.mp4")
    for path in sorted(folder.glob("*.mp4")):
        if path.name not in ("no words.mp4", "bad\udcff.mp4"):
            path.with_suffix(".txt").write_text(f"the caption of {path.stem!r}", encoding="utf-8")
    (folder / "-dash.txt").write_text("[red]a fox\x1b[31m\nanother [/red]\nthird", encoding="utf-8")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "notes.md").write_text("# notes")
    Image.new("RGB", (64, 64)).save(folder / "picture.png")
    (folder / "gone.mp4").symlink_to("nowhere.mp4")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A messy folder, and its file. Tests that change it take a copy."""
    path = tmp_path_factory.mktemp("world")
    (path / "messy").mkdir()
    fill_messy(path / "messy")
    (path / "config.toml").write_text(CONFIG + DATA.format(name="messy", path="messy", more="") + VIDEO)
    return path


@pytest.fixture
def own(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world, tmp_path / "own", symlinks=True)
    return tmp_path / "own"


@pytest.fixture(scope="session")
def process() -> Iterator[Workers]:
    with Workers(1, limit_s=60) as workers:
        yield workers


@pytest.fixture
def kept_process(monkeypatch: pytest.MonkeyPatch, process: Workers) -> None:
    """Each would import torch anew."""
    from vtrain.cli import data_show
    from vtrain.data.caching import fill as filling

    for module in (scanning, data_show, filling):
        monkeypatch.setattr(module, "Workers", lambda count, limit_s: nullcontext(process))


@pytest.fixture
def more_data() -> Callable[..., str]:
    """A [[data]] table: more_data(name, path, more)."""
    return lambda name, path, more="": DATA.format(name=name, path=path, more=more) + VIDEO


@pytest.fixture
def file_text() -> Callable[..., str]:
    """A configuration file of one dataset: file_text(path, more)."""
    return lambda path, more="": CONFIG + DATA.format(name=path, path=path, more=more) + VIDEO


@pytest.fixture
def make_clip() -> Callable[..., Path]:
    return clip


def called(*arguments: str | Path, error: type[Exception] | None = None) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if error is None:
        assert done.exception is None, done.output
    else:
        assert isinstance(done.exception, error), done.output
    return done


@pytest.fixture
def vtrain(kept_process: None) -> Callable[..., Any]:
    """vtrain("data", "list", file): the command, called in this process; with `error`, one that it ends with."""
    return called


@pytest.fixture
def listed(vtrain: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    """The rows of `vtrain data list --json`."""

    def rows(*arguments: str | Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in vtrain("data", "list", *arguments, "--json").stdout.split("\n") if line]

    return rows


@pytest.fixture
def shown(vtrain: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """What `vtrain data show --json` prints."""
    return lambda *arguments: json.loads(vtrain("data", "show", *arguments, "--json").stdout)
