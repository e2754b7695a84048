"""The judge: reads colour, shape and direction from the pixels of a clip of the tiny world. No network, no reference clip.

    python examples/world/judge.py CLIP.mp4 ...

Each frame is split into shape and background by colour distance from the border's colour. A word is only said where the
measurement is clear; otherwise it is None: noise, blank clips and frozen shapes get no direction, odd blobs no shape.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import world

CONTRAST = 60.0
"""RGB distance (of 0 to 441) between shape and background that a shape has at least; it is cut at half its own."""
AREAS = {"circle": np.pi, "square": (2 * 0.92) ** 2, "triangle": 2.0}
"""Of shapes of radius 1."""
BELOW = {"triangle": 1 / 3}
"""How far a shape's centroid lies below the middle of its height, for radius 1."""
AREA = (120, 1400)
"""Pixels of a shape. Those of the world have 220 to 640; less counts where a part has left the picture."""
IN_ONE_PIECE = 0.85
"""Share of a shape's pixels that must lie in its largest piece."""
SEEN = 0.7
"""Share of frames in which one shape must stand out."""
NEAREST_COLOUR = 70.0
"""Largest RGB distance from a named colour; the nearest two are 180 apart."""
MISMATCH = 0.13
"""Largest share by which an outline may differ from that of the shape it is called, both of the same area and centroid."""
CLEARER = 0.03
"""By how much the next shape must differ more. A circle and a square of one area differ by 0.18."""
LEAST_TRAVEL = 10.0
"""Pixels from first to last frame; the world moves 22 to 32."""
STRAIGHT = 0.35
"""Largest travel across the direction, and largest deviation from even motion, as shares of the travel along it."""


@dataclass(frozen=True)
class Verdict:
    """The words that a clip's pixels say; None where they say none."""

    colour: str | None
    shape: str | None
    direction: str | None

    def hits(self, words: world.Words) -> dict[str, bool]:
        """Per attribute, and "all": whether it is the word asked for."""
        hits = {name: getattr(self, name) == getattr(words, name) for name in ("colour", "shape", "direction")}
        return {**hits, "all": all(hits.values())}


@dataclass(frozen=True)
class Sighting:
    """One frame's shape: cover (H, W) is 0 to 1, soft at the edge; colour is its inside's mean RGB."""

    frame: int
    cover: np.ndarray
    colour: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        return self.cover > 0.5

    @property
    def middle(self) -> tuple[float, float]:
        """Centroid (x, y)."""
        y, x = np.indices(self.cover.shape)
        total = self.cover.sum()
        return float((x * self.cover).sum() / total), float((y * self.cover).sum() / total)

    @property
    def cut(self) -> bool:
        """Whether it touches the picture's edge, so that its outline is not all there."""
        inside = self.inside
        return bool(inside[[0, -1]].any() or inside[:, [0, -1]].any())

    def mismatch(self, shape: str) -> float:
        """Pixels in which the outline differs from that of an ideal `shape` of its area and centroid, over its area."""
        middle, area = self.middle, float(self.cover.sum())
        radius, below = np.sqrt(area / AREAS[shape]), BELOW.get(shape, 0.0)
        y, x = np.indices(self.cover.shape)
        ideal = world.coverage(shape, x - middle[0], y - middle[1] + below * radius, radius) > 0.5
        return float((ideal ^ self.inside).sum() / area)


def sight(frame: int, picture: np.ndarray) -> Sighting | None:
    """The shape of one picture, uint8 (H, W, 3); None if nothing stands out from the border, or it is not in one piece."""
    values = picture.astype(np.float64)
    border = np.concatenate([values[:2].reshape(-1, 3), values[-2:].reshape(-1, 3), values[:, 0], values[:, -1]])
    background = np.median(border, axis=0)
    distance = np.linalg.norm(values - background, axis=-1)
    strong = distance > CONTRAST
    if strong.sum() < AREA[0]:
        return None
    colour = np.median(values[distance >= np.quantile(distance[strong], 0.4)], axis=0)
    away = colour - background
    cover = ((values - background) @ away / (away @ away)).clip(0.0, 1.0)
    piece = largest_piece(cover > 0.5)
    if not AREA[0] <= piece.sum() <= AREA[1] or piece.sum() < IN_ONE_PIECE * (cover > 0.5).sum():
        return None
    cover = cover * grown(piece)
    colour = values[cover > 0.95].mean(axis=0) if (cover > 0.95).sum() > 20 else colour
    return Sighting(frame, cover, colour)


def largest_piece(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected piece of a mask."""
    rest, best = mask.copy(), np.zeros_like(mask)
    while rest.sum() > best.sum():
        piece = np.zeros_like(mask)
        places = np.argwhere(rest)
        piece[tuple(places[len(places) // 2])] = True
        piece = filled(piece, mask)
        if piece.sum() > best.sum():
            best = piece
        rest &= ~piece
    return best


def filled(seed: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Everything of the mask that hangs together with the seed: whole runs along rows, then columns, until nothing is added."""
    height, width = mask.shape
    rows = (~mask).cumsum(axis=1) + (np.arange(height) * (width + 1))[:, None]
    columns = (~mask).cumsum(axis=0) + (np.arange(width) * (height + 1))[None]
    before = 0
    while (size := seed.sum()) > before:
        before = size
        for runs in (rows, columns):
            touched = np.zeros((height + 1) * (width + 1), dtype=bool)
            touched[runs[seed]] = True
            seed = touched[runs] & mask
    return seed


def grown(mask: np.ndarray) -> np.ndarray:
    """A mask and the pixels beside it, corners too."""
    wide = np.pad(mask, 1)
    tall = wide[:-2] | wide[1:-1] | wide[2:]
    return tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]


def judge(frames: np.ndarray) -> Verdict:
    """frames: uint8 (F, H, W, 3), F >= 5."""
    sightings = [seen for number, picture in enumerate(frames) if (seen := sight(number, picture)) is not None]
    if len(sightings) < SEEN * len(frames):
        return Verdict(None, None, None)
    return Verdict(colour_of(sightings), shape_of(sightings), direction_of(sightings, len(frames)))


def colour_of(sightings: list[Sighting]) -> str | None:
    """The named colour nearest to the mean over frames, if it is near."""
    mean = np.mean([seen.colour for seen in sightings], axis=0)
    distances = {name: float(np.linalg.norm(mean - np.array(value))) for name, value in world.COLOURS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= NEAREST_COLOUR else None


def shape_of(sightings: list[Sighting]) -> str | None:
    """The shape whose ideal outline fits best, in the middle of the frames in which all of the outline is there."""
    whole = [seen for seen in sightings if not seen.cut]
    if len(whole) < 3:
        return None
    misses = {name: float(np.median([seen.mismatch(name) for seen in whole])) for name in world.SHAPES}
    best, second, *_ = sorted(misses, key=misses.__getitem__)
    clear = misses[best] <= MISMATCH and misses[second] - misses[best] >= CLEARER
    return best if clear else None


def direction_of(sightings: list[Sighting], frames: int) -> str | None:
    """Straight, even motion of the centroid, far enough to tell."""
    times = np.array([seen.frame for seen in sightings]) / (frames - 1)
    middles = np.array([seen.middle for seen in sightings])
    design = np.stack([times, np.ones_like(times)], axis=1)
    (travel, _), *_ = np.linalg.lstsq(design, middles, rcond=None)
    deviation = np.abs(middles - design @ np.linalg.lstsq(design, middles, rcond=None)[0]).max()
    for name, (x, y) in world.MOTIONS.items():
        along, across = float(travel @ (x, y)), float(abs(travel @ (-y, x)))
        if along >= LEAST_TRAVEL and max(across, deviation) <= STRAIGHT * along:
            return name
    return None


def read(path: Path) -> np.ndarray:
    """All frames of a video file, uint8 (F, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Say what clips of the tiny world show.")
    parser.add_argument("clips", type=Path, nargs="+")
    for path in parser.parse_args().clips:
        verdict = judge(read(path))
        print(f"{path}: {verdict.colour or '?'} {verdict.shape or '?'} {verdict.direction or '?'}")


if __name__ == "__main__":
    main()
