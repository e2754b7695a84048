"""The pages, their fenced blocks, and a folder in which what they show can be run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\S*) ?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEAST: dict[str, Any] = {
    "run": {"output_dir": "output"},
    "model": {"use": "sanavideo", "path": "owner/name", "train": "full"},
    "data": [{"use": "folder", "path": "clips"}],
    "train": {"steps": 10},
    "optimizer": {"lr": 1e-4},
}
"""A valid file, into which fragments are merged."""


@dataclass(frozen=True)
class Block:
    """A fenced block. words: of the info string after the language, such as "fragment" or "file=x.py"."""

    page: Path
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def file(self) -> str:
        """The name under which the block says it is kept; "" for none."""
        return next((word.removeprefix("file=") for word in self.words if word.startswith("file=")), "")

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path, text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], tuple(match[2].split()), match[3])
        for match in FENCE.finditer(text)
    ]


@cache
def pages() -> tuple[Path, ...]:
    return (
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "examples/README.md",
    )


@cache
def blocks(*languages: str) -> tuple[Block, ...]:
    found = [block for page in pages() for block in blocks_of(page, page.read_text(encoding="utf-8"))]
    return tuple(block for block in found if not languages or block.language in languages)


def merged(text: str) -> str:
    """A fragment, put into the least valid file."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in LEAST.items()}
    for key, value in tomllib.loads(text).items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return "\n".join(f"{key} = {_inline(value)}" for key, value in tree.items())


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_inline(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each page or block that asks for one."""
    wanted = {
        "page": lambda: pages(),
        # A walkthrough's file names what it has installed by then: test_walkthroughs.py runs it.
        "toml_block": lambda: tuple(block for block in blocks("toml") if "walkthrough" not in block.words),
        "console_block": lambda: blocks("console"),
        "shell_block": lambda: blocks("sh", "console"),
        "python_page": lambda: tuple(dict.fromkeys(block.page for block in blocks("python"))),
    }
    for name, give in wanted.items():
        if name in metafunc.fixturenames:
            given = give()
            ids = [value.name if isinstance(value, Path) else str(value) for value in given]
            metafunc.parametrize(name, given, ids=ids)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def every_page() -> tuple[Path, ...]:
    return pages()


@pytest.fixture(scope="session")
def every_block() -> tuple[Block, ...]:
    return blocks()


@pytest.fixture(scope="session")
def make_block() -> Callable[..., Block]:
    """make_block("toml", text, "fragment"): a planted one, on a page that does not exist."""
    return lambda language, text, *words: Block(ROOT / "docs/planted.md", 1, language, words, text)


@pytest.fixture(scope="session")
def as_file() -> Callable[[Block], str]:
    """The configuration file that a TOML block stands for."""
    return lambda block: merged(block.text) if "fragment" in block.words else block.text


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `nox -s clips` leaves it: demo-output with the tiny checkpoint and its file; a bad file beside."""
    from vtrain_sanavideo import tiny

    folder = tmp_path_factory.mktemp("prepared")
    tiny.build(folder / "demo-output" / "tiny-checkpoint")
    text = (ROOT / "examples/demo.toml").read_text(encoding="utf-8")
    text = text.replace('"../demo-output', f'"{folder}/demo-output')
    text = text.replace('"clips"', f'"{(ROOT / "examples/clips").as_posix()}"')
    (folder / "demo-output" / "demo.toml").write_text(text, encoding="utf-8")
    make_messy(folder / "messy")
    text = text.replace(f'"{(ROOT / "examples/clips").as_posix()}"', '"messy"').replace(
        "demo-output/cache", "messy-cache"
    )
    text = text.replace("frames = 9\nfps = 8\n\n[cache]", "frames = 17\nfps = 12\n\n[cache]")
    text = text.replace('["160x96", "128x96"]', '"160x96"')
    (folder / "messy.toml").write_text(text, encoding="utf-8")
    make_masked(folder / "masked")
    text = (
        (ROOT / "examples/demo.toml").read_text(encoding="utf-8").replace('"../demo-output', f'"{folder}/demo-output')
    )
    text = text.replace('path = "clips"', 'id = "clips"\npath = "masked"').replace("demo-output/cache", "masked-cache")
    text = text.replace('["160x96", "128x96"]', '"160x96"')
    text = text.replace("[cache]", '[data.masks]\nfolder = "masks"\n\n[cache]').replace("steps = 300", "steps = 20")
    (folder / "masked.toml").write_text(text, encoding="utf-8")
    lines = ["[run]", 'output_dir = "out"', "", "[model]", 'use = "sanavideo"', 'path = "tiny"', 'train = "full"', ""]
    lines += ["[[data]]", 'use = "folder"', 'path = "clips"', "", "[train]", 'steps = "1000"', "batchsize = 2", ""]
    lines += ["[optimizer]", 'use = "adamv"', "lr = 1e-3"]
    (folder / "bad.toml").write_text("\n".join(lines), encoding="utf-8")
    return folder


def make_messy(folder: Path) -> None:
    """Clips, and what else is found in people's folders."""
    folder.mkdir()
    clips = ROOT / "examples/clips"
    names = {
        "bunny_00": "rabbit",
        "city_00": "city at night",
        "earth_00": "earth",
        "tree_00": "tree",
        "vtest_00": "people",
    }
    for clip, name in names.items():
        for suffix in (".mp4", ".txt"):
            (folder / (name + suffix)).write_bytes((clips / (clip + suffix)).read_bytes())
    box = (clips / "box_00.mp4").read_bytes()
    for name, data in {"half": box[: len(box) // 2], "empty": b"", "page": b"<html>not found</html>"}.items():
        (folder / f"{name}.mp4").write_bytes(data)
    (folder / "box.mp4").write_bytes(box)
    (folder / "box 2.mp4").write_bytes(box + b"\0")
    (folder / "box 2.txt").write_bytes("a bo\xeete".encode("latin-1"))
    with av.open(str(folder / "song.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    (folder / "gone.mp4").symlink_to("nowhere.mp4")
    (folder / "two\nlines \U0001f430.mp4").write_bytes(box + b"\0\0")
    (folder / "two\nlines \U0001f430.txt").write_text("A cardboard box is turned over.", encoding="utf-8")
    (folder / "notes.md").write_text("to do")
    (folder / "cover.png").write_bytes(b"")


def make_masked(folder: Path) -> None:
    """Three clips; the mask of one is a video of half its size and rate, of another an image, a third has none."""
    (folder / "masks").mkdir(parents=True)
    for clip, name in {"bunny_00": "rabbit", "box_00": "box", "tree_00": "tree"}.items():
        for suffix in (".mp4", ".txt"):
            (folder / (name + suffix)).write_bytes((ROOT / "examples/clips" / (clip + suffix)).read_bytes())
    with av.open(str(folder / "masks/rabbit.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 228, 128, "yuv420p"
        for number in range(25):
            y, x = np.mgrid[:128, :228]
            disc = np.hypot(x - 50 - 50 * number / 12, y - 64) < 40
            picture = np.repeat((255 * disc).astype(np.uint8)[..., None], 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    left = np.zeros((256, 342), dtype=np.uint8)
    left[:, :171] = 255
    Image.fromarray(left).save(folder / "masks/box.png")


@pytest.fixture
def installed_from() -> Callable[[Path, Path], Path]:
    """installed_from(page, folder): the page's `file=` blocks in `folder`, which becomes a distribution on a path."""

    def install(page: Path, folder: Path) -> Path:
        for block in blocks():
            if block.page == page and block.file:
                (folder / block.file).write_text(block.text, encoding="utf-8")
        project = folder / "pyproject.toml"
        if project.exists():
            about = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
            info = folder / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n"
            )
            entries = [
                f"[{group}]\n" + "\n".join(f"{name} = {target}" for name, target in entry.items())
                for group, entry in about["entry-points"].items()
            ]
            (info / "entry_points.txt").write_text("\n".join(entries), encoding="utf-8")
        return folder

    return install


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_python("-m", ..., folder=...): a fresh interpreter in `folder`, which is on its path; one thread, offline."""

    def run(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder)}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240
        )

    return run
