"""`vtrain cache fill` against a bare loop of PyAV and diffusers' VAE on the same clips: clips a second, one process each.

Both sides decode, resample, encode and write the same clips with the same VAE, each in a process of its own, in turn.
vtrain's also opens every file twice (to look at it, and to decode it), in a process of its own with a limit on time and
memory, hashes its bytes, checks the latents, keeps the ledger, and forces each entry to the disk. Seconds a clip are taken
from the fourth clip on, when all is loaded; CPU-seconds count all threads and child processes.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and numpy start their threads

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
from report import Ratio, ratio, say, say_machine, table, write_json
from workload import MODELS, fill, write_config

LIMIT = 0.95
SKIP = 4
"""Clips that are not counted: what comes before them is loading."""

WIDTH, HEIGHT, FRAMES, FPS = 160, 96, 17, 16.0
SOURCE_WIDTH, SOURCE_HEIGHT, SOURCE_FRAMES, SOURCE_FPS = 480, 272, 60, 24
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Cost:
    """Seconds a clip."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Compared:
    """Medians of seconds a clip, and the ratio of clips a second in pairs."""

    measure: str
    bare: float
    vtrain: float
    ratio: Ratio


def write_clips(folder: Path, count: int) -> Path:
    """Captioned H.264 clips of 2.5 s: a texture that moves, with some noise, so that decoding has work."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    grid = np.indices((SOURCE_HEIGHT, SOURCE_WIDTH)).sum(0)
    grain = random.integers(0, 24, (SOURCE_HEIGHT, SOURCE_WIDTH, 3))
    for number in range(count):
        (folder / f"{number:04d}.txt").write_text("a texture that moves", encoding="utf-8")
        with av.open(str(folder / f"{number:04d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(SOURCE_FPS))
            stream.width, stream.height, stream.pix_fmt = SOURCE_WIDTH, SOURCE_HEIGHT, "yuv420p"
            for frame in range(SOURCE_FRAMES):
                ramp = (grid * (1 + number % 5) + 8 * frame) % 200
                picture = np.stack([ramp, 200 - ramp, (ramp + number) % 200], -1) + np.roll(grain, frame, 1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
            container.mux(stream.encode(None))
    return folder


def config_of(folder: Path, clips: Path) -> Path:
    """A configuration whose text is cached, and nothing else."""
    config = write_config(folder, MODELS["tiny"], "full", log_every=1, name="cache")
    text = config.read_text(encoding="utf-8")
    text = text.replace((folder / "clips").as_posix(), clips.as_posix()).replace('"64x128"', f'"{WIDTH}x{HEIGHT}"')
    config.write_text(text, encoding="utf-8")
    return config


def cpu_seconds() -> float:
    """Of this process and of those it started that still run."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        times = child.cpu_times()
        total += times.user + times.system
    return total


def fill_once(config: Path) -> None:
    """As a script of its own: fill, and tell seconds a clip."""
    from vtrain.contract import Filling
    from vtrain.data.caching.caches import fill_caches
    from vtrain.data.scanning.scan import scan
    from vtrain.run.prepare import planned

    marks: list[tuple[int, float, float]] = []

    def mark(now: Filling) -> None:
        if now.stage == "video":
            marks.append((now.done, cpu_seconds(), time.perf_counter()))

    plan = planned(config)
    fill_caches(plan, scan(plan).samples, [], "cpu", mark)
    first = next(each for each in marks if each[0] >= SKIP)
    clips = marks[-1][0] - first[0]
    say(f"loop {(marks[-1][1] - first[1]) / clips} {(marks[-1][2] - first[2]) / clips}")


def measured(command: list[str]) -> Cost:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = [line.split() for line in done.stdout.splitlines() if line.startswith("loop ")]
    if done.returncode or not told:
        raise SystemExit(done.stdout + done.stderr)
    return Cost(float(told[-1][1]), float(told[-1][2]))


def pairs(folder: Path, clips: Path, count: int, *, warm_up: bool) -> tuple[list[Cost], list[Cost]]:
    """Seconds a clip of the bare loop and of vtrain, in pairs whose order changes."""
    config = config_of(folder, clips)
    fill(config, clips=1)  # all have one caption: so their text is cached
    cache, out = folder / "cache", folder / "bare"
    shape = [str(each) for each in (WIDTH, HEIGHT, FRAMES, FPS)]
    vae = MODELS["tiny"].build(folder) / "vae"
    bare = [sys.executable, str(HERE / "bare_cache.py"), str(clips), str(vae), str(out), *shape, str(SKIP)]
    ours = [sys.executable, str(HERE / "cache.py"), "--fill", str(config)]
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    for pair in range(0 if warm_up else 1, count + 1):
        for side in (0, 1) if pair % 2 else (1, 0):
            shutil.rmtree(cache / "video" if side else out, ignore_errors=True)
            for file in cache.glob("ledger.sqlite*") if side else ():
                file.unlink()
            cost = measured(ours if side else bare)
            if pair:  # the first only warms the disk's pages
                costs[side].append(cost)
    return costs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--cold", action="store_true", help="without a first pair that is not counted")
    parser.add_argument(
        "--folder", type=Path, help="where clips, checkpoint and cache go (default: a temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument(
        "--fill", type=Path, metavar="CONFIG", help="only fill the cache of this configuration, and tell"
    )
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    if chosen.fill:
        fill_once(chosen.fill)
        return
    with ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vtrain-cache-")))
        say_machine()
        bare, ours = pairs(folder, write_clips(folder / "clips", chosen.clips), chosen.pairs, warm_up=not chosen.cold)
    rows = [
        Compared(
            measure,
            statistics.median(bare_side),
            statistics.median(our_side),
            ratio(bare_side, our_side, limit, at_least=True),
        )
        for measure, bare_side, our_side, limit in (
            ("CPU", [cost.cpu for cost in bare], [cost.cpu for cost in ours], LIMIT),
            ("wall", [cost.wall for cost in bare], [cost.wall for cost in ours], LIMIT),
        )
    ]
    heads = ("seconds", "bare, a clip", "vtrain, a clip", "vtrain's clips/s by the bare loop's, 95% interval")
    say(table(heads, [(row.measure, f"{row.bare:.3f}", f"{row.vtrain:.3f}", str(row.ratio)) for row in rows]))
    write_json(chosen.json, {"clips": chosen.clips, "compared": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
