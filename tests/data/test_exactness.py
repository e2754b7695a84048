"""What a change encodes again, counted on the real family from a configuration file: exactly what it touches."""

from __future__ import annotations

import gc
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import Tensor, nn

from vtrain.config import load
from vtrain.contract import Caption, Latents, NormalizedCodec, Role, Text
from vtrain.data.caching.caches import fill_caches
from vtrain.data.scanning.scan import scan
from vtrain.plan.make import make_plan
from vtrain.registry import discover

CONFIG = """
[run]
output_dir = "out"
[model]
use = "sanavideo"
path = "model"
train = "full"
text_precision = "fp32"
vae_precision = "fp32"
[[data]]
use = "folder"
path = "clips"
resolution = ["64x32"]
[data.video]
frames = 5
fps = 8
[train]
steps = 10
[optimizer]
use = "adamw"
lr = 1e-3
"""
CLIPS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints that differ in all weights."""
    from vtrain_sanavideo.tiny import build

    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("one", 0), ("two", 1)):
        build(folder / name, seed=seed)
    return folder


class Run:
    """A run in a folder, whose file and data can be changed. Counts captions and clips that are encoded."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "config.toml"
        self.texts, self.clips = 0, 0

    def change(self, pattern: str, replacement: str) -> None:
        text, count = re.subn(pattern, replacement, self.config.read_text())
        assert count == 1
        self.config.write_text(text)

    def encodes(self) -> tuple[int, int]:
        """(captions, clips) that filling the caches encodes."""
        self.texts = self.clips = 0
        plan = make_plan(load(self.config, discover()), 1)
        filled = fill_caches(plan, scan(plan).samples, (), "cpu", lambda *_: None)
        assert len(filled.index) == CLIPS
        return self.texts, self.clips


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], Run]:
    """The run, told of all that is encoded."""
    from vtrain_sanavideo.text import SanaVideoText

    encode_text, encode_video = SanaVideoText.encode, NormalizedCodec.encode

    def count(run: Run) -> Run:
        def counted_text(self: SanaVideoText, captions: Sequence[Caption], role: Role) -> Text:
            run.texts += len(captions)
            return encode_text(self, captions, role)

        def counted_video(self: NormalizedCodec, pixels: Tensor, *, std: bool = False) -> Latents:
            run.clips += len(pixels)
            return encode_video(self, pixels, std=std)

        monkeypatch.setattr(SanaVideoText, "encode", counted_text)
        monkeypatch.setattr(NormalizedCodec, "encode", counted_video)
        return run

    return count


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, models: Path, make_video: Callable[..., bytes]) -> Path:
    """The folder of a run whose caches are empty."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "config.toml").write_text(CONFIG)
    shutil.copytree(models / "one", folder / "model")
    (folder / "clips").mkdir()
    for number in range(CLIPS):
        (folder / "clips" / f"{number}.mp4").write_bytes(make_video(frames=20 + number, fps=16, size=(96, 48)))
        (folder / "clips" / f"{number}.txt").write_text(f"a clip, number {number}")
    return folder


@pytest.fixture(scope="module")
def filled(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, its caches filled."""
    folder = tmp_path_factory.mktemp("filled") / "run"
    shutil.copytree(begun, folder)
    Run(folder).encodes()
    return folder


@pytest.fixture
def run(tmp_path: Path, filled: Path, counted: Callable[[Run], Run]) -> Run:
    """A filled run in a folder of its own."""
    shutil.copytree(filled, tmp_path / "run")
    return counted(Run(tmp_path / "run"))


def test_all_is_encoded_once_and_a_run_that_was_moved_encodes_nothing(
    begun: Path, tmp_path: Path, counted: Callable[[Run], Run]
) -> None:
    shutil.copytree(begun, tmp_path / "run")
    run = counted(Run(tmp_path / "run"))
    assert run.encodes() == (CLIPS + 1, CLIPS)  # and the dropped caption
    assert run.encodes() == (0, 0)
    run.folder.rename(tmp_path / "elsewhere")
    run.folder, run.config = tmp_path / "elsewhere", tmp_path / "elsewhere" / "config.toml"
    assert run.encodes() == (0, 0)


def test_one_caption_one_clip_and_a_new_name(run: Run, make_video: Callable[..., bytes]) -> None:
    (run.folder / "clips" / "1.txt").write_text("other words")
    assert run.encodes() == (1, 0)
    (run.folder / "clips" / "2.mp4").write_bytes(make_video(frames=31, fps=16, size=(96, 48)))
    assert run.encodes() == (0, 1)
    for suffix in (".mp4", ".txt"):
        (run.folder / "clips" / f"0{suffix}").rename(run.folder / "clips" / f"renamed{suffix}")
    assert run.encodes() == (0, 0)


@pytest.mark.parametrize(
    ("pattern", "replacement", "expected"),
    [
        ("fps = 8", "fps = 4", (0, CLIPS)),
        ('"64x32"', '"32x32"', (0, CLIPS)),
        ("frames = 5", "frames = 9", (0, CLIPS)),
        ('vae_precision = "fp32"', 'vae_precision = "bf16"', (0, CLIPS)),
        ('text_precision = "fp32"', 'text_precision = "bf16"', (CLIPS + 1, 0)),
        ('train = "full"', 'train = "full"\ninstruction = "Describe:"', (CLIPS + 1, 0)),
        ("lr = 1e-3", "lr = 1e-4", (0, 0)),
        ("steps = 10", "steps = 10\nbatch_size = 2\ncaption_dropout = 0.5", (0, 0)),
    ],
    ids=["fps", "bucket", "frames", "VAE dtype", "text dtype", "instruction", "learning rate", "batch size"],
)
def test_a_setting_encodes_what_depends_on_it_and_changing_it_back_nothing(
    run: Run, pattern: str, replacement: str, expected: tuple[int, int]
) -> None:
    run.change(pattern, replacement)
    assert run.encodes() == expected
    run.change(re.escape(replacement), pattern)
    assert run.encodes() == (0, 0)


@pytest.mark.parametrize(
    ("part", "expected"),
    [("vae", (0, CLIPS)), ("text_encoder", (CLIPS + 1, 0)), ("transformer", (0, 0))],
)
def test_other_weights_encode_what_they_encode(run: Run, models: Path, part: str, expected: tuple[int, int]) -> None:
    shutil.rmtree(run.folder / "model" / part)
    shutil.copytree(models / "two" / part, run.folder / "model" / part)
    assert run.encodes() == expected


def alive(*parts: str) -> list[bool]:
    """Whether a module of diffusers or transformers is in memory whose class is named so."""
    gc.collect()
    names = {type(each).__name__ for each in gc.get_objects() if issubclass(type(each), nn.Module)}
    return [any(part in name for name in names) for part in parts]


def test_text_encoder_and_codec_are_never_in_memory_together(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtrain_sanavideo.family import SanaVideoFamily
    from vtrain_sanavideo.text import SanaVideoText

    seen: list[tuple[str | bool, ...]] = []
    opened = SanaVideoFamily.open_video_codec
    encode_text, encode_video = SanaVideoText.encode, NormalizedCodec.encode

    def look(when: str) -> None:
        seen.append((when, *alive("Gemma2Model", "AutoencoderKLWan")))

    @contextmanager
    def opening(self: SanaVideoFamily, device: str) -> Iterator[NormalizedCodec]:
        look("before the codec loads")
        with opened(self, device) as codec:
            yield codec

    def text(self: SanaVideoText, captions: Sequence[Caption], role: Role) -> Text:
        look("text")
        return encode_text(self, captions, role)

    def video(self: NormalizedCodec, pixels: Tensor, *, std: bool = False) -> Latents:
        look("video")
        return encode_video(self, pixels, std=std)

    monkeypatch.setattr(SanaVideoFamily, "open_video_codec", opening)
    monkeypatch.setattr(SanaVideoText, "encode", text)
    monkeypatch.setattr(NormalizedCodec, "encode", video)
    shutil.rmtree(run.folder / "cache")
    run.encodes()
    look("after")
    assert set(seen) == {
        ("text", True, False),
        ("before the codec loads", False, False),
        ("video", False, True),
        ("after", False, False),
    }
