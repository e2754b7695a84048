"""The tiny world: short clips of one shape that moves, with a caption that says everything about them.

    python examples/world/world.py FOLDER --clips 384 --seed 0

writes `00000.mp4` and `00000.txt` ("a red circle moves left") and so on. The same arguments draw the same pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

SIZE = 64
"""Width and height in pixels."""
FRAMES = 9
FPS = 8

COLOURS = {
    "red": (225, 45, 45),
    "green": (50, 190, 70),
    "blue": (55, 90, 235),
    "yellow": (235, 210, 60),
    "purple": (180, 60, 205),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Per direction: (x, y), y downwards."""
DIAGONALS = {
    f"{one} {other}": (DIRECTIONS[other][0] / np.sqrt(2.0), DIRECTIONS[one][1] / np.sqrt(2.0))
    for one, other in product(("up", "down"), ("left", "right"))
}
"""In no training clip, though both words are: motions to fine-tune a trained model to ("moves up left")."""
MOTIONS = DIRECTIONS | DIAGONALS

NEW_COLOUR, NEW_SHAPE = "purple", "triangle"
"""In no training clip and no validation prompt: words for a LoRA to learn. Only the VAE has seen them."""
KNOWN_COLOURS = tuple(colour for colour in COLOURS if colour != NEW_COLOUR)
KNOWN_SHAPES = tuple(shape for shape in SHAPES if shape != NEW_SHAPE)

RADIUS = (10.5, 14.0)
TRAVEL = (22.0, 32.0)
"""Pixels from first to last frame, however many frames there are."""
MARGIN = 1.0
"""Pixels that a shape keeps from the picture's edge."""


@dataclass(frozen=True, order=True)
class Words:
    """What a clip shows."""

    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction}"


@dataclass(frozen=True)
class Scene:
    """A clip in numbers: pixels for lengths, 0 to 255 for colours. centre is the middle of the path, radius half the height."""

    words: Words
    centre: tuple[float, float]
    radius: float
    travel: float
    colour: tuple[float, float, float]
    background: tuple[float, float, float]


def combinations() -> list[Words]:
    """All 32 of the known words."""
    return [Words(*words) for words in product(KNOWN_COLOURS, KNOWN_SHAPES, DIRECTIONS)]


def held_out(words: Words) -> bool:
    """Whether this combination of known words is kept out of training. 8 of 32; every word occurs in the other 24."""
    if words.colour not in KNOWN_COLOURS or words.shape not in KNOWN_SHAPES or words.direction not in DIRECTIONS:
        return False
    place = KNOWN_COLOURS.index(words.colour) + 2 * KNOWN_SHAPES.index(words.shape)
    return list(DIRECTIONS).index(words.direction) == place % len(DIRECTIONS)


def training_words(clips: int, rng: np.random.Generator) -> list[Words]:
    """The combinations that are not held out, each as often as the others (give or take one), in random order."""
    seen = [words for words in combinations() if not held_out(words)]
    order = [seen[number % len(seen)] for number in range(clips)]
    return [order[place] for place in rng.permutation(clips)]


def any_words(rng: np.random.Generator) -> Words:
    """Any of all words, the new ones and the held-out combinations included: what the VAE has to know."""
    return Words(*(str(rng.choice(list(choices))) for choices in (COLOURS, SHAPES, DIRECTIONS)))


def stage(words: Words, rng: np.random.Generator) -> Scene:
    """Size, path and exact colours for these words."""
    radius, travel = rng.uniform(*RADIUS), rng.uniform(*TRAVEL)
    room = (max(0.0, SIZE / 2 - radius - MARGIN - travel * abs(step) / 2) for step in MOTIONS[words.direction])
    x, y = (SIZE / 2 + rng.uniform(-free, free) for free in room)
    grey = rng.uniform(18, 40)
    return Scene(
        words=words,
        centre=(x, y),
        radius=radius,
        travel=travel,
        colour=_near(COLOURS[words.colour], 8, rng),
        background=_near((grey, grey, grey), 4, rng),
    )


def _near(colour: Sequence[float], spread: float, rng: np.random.Generator) -> tuple[float, float, float]:
    red, green, blue = (float(value + rng.uniform(-spread, spread)) for value in colour)
    return red, green, blue


def draw(scene: Scene, frames: int = FRAMES) -> np.ndarray:
    """uint8 (frames, SIZE, SIZE, 3). Edges are anti-aliased: each pixel is mixed by how much of it the shape covers."""
    step_x, step_y = MOTIONS[scene.words.direction]
    time = np.linspace(-0.5, 0.5, frames)[:, None, None] * scene.travel
    pixel = np.arange(SIZE) + 0.5
    x = pixel[None, None, :] - (scene.centre[0] + step_x * time)
    y = pixel[None, :, None] - (scene.centre[1] + step_y * time)
    cover = coverage(scene.words.shape, x, y, scene.radius)[..., None]
    picture = np.array(scene.background) * (1 - cover) + np.array(scene.colour) * cover
    return picture.round().clip(0, 255).astype(np.uint8)


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """How much of a pixel lies inside, 0 to 1, from the position of its middle relative to the shape's."""
    if shape == "circle":
        return _inside(radius - np.hypot(x, y))
    if shape == "square":
        half = 0.92 * radius
        return _inside(half - np.abs(x)) * _inside(half - np.abs(y))
    slope = np.array((2.0, 1.0)) / np.sqrt(5.0)  # sides from (0, -radius) to (+-radius, radius)
    sides = _inside(slope[1] * (y + radius) - slope[0] * np.abs(x))
    return sides * _inside(radius - y)


def _inside(depth: np.ndarray) -> np.ndarray:
    """Depth of the pixel's middle below an edge -> share of the pixel behind it."""
    return (depth + 0.5).clip(0.0, 1.0)


def clips(count: int, seed: int, frames: int = FRAMES) -> Iterator[tuple[Words, np.ndarray]]:
    """The training set: words without held-out combinations, and their frames."""
    rng = np.random.default_rng(seed)
    for words in training_words(count, rng):
        yield words, draw(stage(words, rng), frames)


def write_mp4(path: Path, frames: np.ndarray, fps: float = FPS) -> None:
    """uint8 (F, H, W, 3) -> H.264 at high quality with full chroma (yuv444p), so that edges keep their colour."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv444p"
        # No B-frames: where x264 puts them differs from run to run for pictures as small as these.
        stream.options = {"crf": "8", "preset": "medium", "threads": "1", "bf": "0"}
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG
        for picture in frames:
            rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
            yuv = rgb.reformat(format="yuv444p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))


def write_clips(folder: Path, pairs: Iterator[tuple[Words, np.ndarray]]) -> int:
    """Write <number>.mp4 and <number>.txt for each; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for words, frames in pairs:
        write_mp4(folder / f"{count:05}.mp4", frames)
        (folder / f"{count:05}.txt").write_text(words.caption + "\n", encoding="utf-8")
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description="Write training clips of the tiny world as mp4 + txt.")
    parser.add_argument("folder", type=Path, help="where to; created if missing")
    parser.add_argument("--clips", type=int, default=384, help="how many (default: 384)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--frames", type=int, default=FRAMES, help=f"frames per clip, 4k + 1 (default: {FRAMES})")
    chosen = parser.parse_args()
    if chosen.clips < 1 or chosen.frames < 5 or chosen.frames % 4 != 1:
        parser.error("--clips is at least 1, and --frames 5, 9, 13, 17 ...")
    written = write_clips(chosen.folder, clips(chosen.clips, chosen.seed, chosen.frames))
    print(f"{written} clips of {chosen.frames} frames in {chosen.folder}")


if __name__ == "__main__":
    main()
