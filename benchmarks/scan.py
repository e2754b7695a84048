"""What a dataset of very many files costs: the first scan, a warm one, the plan, the first batch; time and peak memory.

The place is made: folders of 1,000 files, 500 clips and their captions, all clips of one folder hard links to one small
H.264 file and all captions to one text, so that a million entries take a few megabytes and every one is a real file.
Headers are not read: a stub stands for the processes that probe, and says of every clip what is true of it. Content hashes
are written into the ledger by one SQL statement, as reading every file would. All else is what `vtrain plan` and
`vtrain run` do: captions are read, file_decisions decided, entries looked up, one clip and each different caption encoded.

A warm scan is held to a bare walk of the same tree with os.scandir and stat, in CPU-seconds, each in a process of its own,
in turn. Peak memory (VmHWM) is compared between the sizes.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy starts its threads; the processes below inherit it

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import Ratio, ratio, say, say_machine, table, write_json
from workload import FRAMES, HEIGHT, MODELS, WIDTH, write_clips, write_config

PER_FOLDER = 1000
CPU_LIMIT = 3.0
MEMORY_LIMIT = 2.0
PARTS = ("first", "warm", "plan", "batch")


@dataclass(frozen=True)
class Cost:
    """Of one part: CPU-seconds and wall time of the work itself, its imports done; peak memory of its process, in bytes."""

    cpu: float
    wall: float
    peak: int


def make_place(folder: Path, entries: int) -> None:
    """`entries` files below folder/clips: half of them clips, half captions."""
    original = write_clips(folder / "original") / "clip_0.mp4"
    for number in range(-(-entries // PER_FOLDER)):
        below = folder / "clips" / f"{number:04}"
        below.mkdir(parents=True)
        count = min(PER_FOLDER, entries - number * PER_FOLDER) // 2
        shutil.copyfile(original, below / "clip_000.mp4")
        (below / "clip_000.txt").write_text(f"a gradient that moves, as in folder {number}", encoding="utf-8")
        for clip in range(1, count):
            for suffix in ("mp4", "txt"):
                os.link(below / f"clip_000.{suffix}", below / f"clip_{clip:03}.{suffix}")


class Stub(AbstractContextManager["Stub"]):
    """Stands for `Workers`: knows what every clip of the place is."""

    def __init__(self, *_: object) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def probed(self, jobs: Iterable[Any]) -> Generator[tuple[Any, Any]]:
        from vtrain.data.decoding.probe import Probe

        found = Probe("h264", WIDTH, HEIGHT, 1.0, FRAMES, FRAMES / 16)
        for job in jobs:
            yield job, found


def bare(folder: Path) -> None:
    """Every file's size and time of change."""
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(entry.path)
                else:
                    entry.stat()


def measure(part: str, config: Path) -> Cost:
    """Run a part in this process."""
    if part == "bare":
        return _timed(lambda: bare(config.parent / "clips"))
    from vtrain.data.scanning import scan as scanning
    from vtrain.estimate.estimate import check_room, make_estimate
    from vtrain.estimate.render import sections
    from vtrain.run.prepare import planned

    if part == "first":
        scanning.Workers = Stub  # type: ignore[assignment, misc]
    plan = planned(config)
    if part in ("first", "warm"):
        return _timed(lambda: scanning.scan(plan))
    if part == "plan":

        def show() -> None:
            found = scanning.scan(plan)
            estimate = make_estimate(plan, found.survey)
            check_room(plan, estimate)
            sections(plan, found.survey, estimate)

        return _timed(show)
    from vtrain.data.batches import Batches
    from vtrain.data.caching.caches import fill_caches

    def batch() -> None:
        filled = fill_caches(plan, scanning.scan(plan).samples, [], "cpu", lambda _: None)
        Batches(plan, filled.caches, filled.index)[0]

    return _timed(batch)


def _timed(work: Any) -> Cost:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return Cost(cpu, wall, peak << 10)


def write_hashes(folder: Path) -> None:
    """What reading every clip would tell the ledger: all hold the same bytes."""
    import sqlite3

    from vtrain.data.scanning.database import file_sha256
    from vtrain.data.scanning.ledger import FILE

    sha256 = file_sha256(folder / "original" / "clip_0.mp4")
    with sqlite3.connect(folder / "cache" / FILE) as database:
        database.execute("UPDATE source SET sha256 = ? WHERE kind = 'video'", (sha256,))
    database.close()


def run(part: str, config: Path) -> Cost:
    """Run a part in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


@dataclass(frozen=True)
class Measured:
    """A place of so many entries. costs: by part. warm: the ratio of a warm scan's CPU-seconds to a bare walk's."""

    entries: int
    costs: dict[str, Cost]
    ledger: int
    warm: Ratio


def measure_place(folder: Path, entries: int, pairs: int, *, cold: bool) -> Measured:
    say(f"{entries} entries ...")
    make_place(folder, entries)
    config = write_config(folder, MODELS["tiny"], "full", 10)
    run("bare", config)  # once, so that all find the tree in memory
    costs = {"first": run("first", config)}
    walks, warm = [], []
    for _ in range(pairs):
        walks.append(run("bare", config))
        warm.append(run("warm", config))
    middle = sorted(range(pairs), key=lambda pair: warm[pair].cpu)[pairs // 2]
    costs |= {"bare": walks[middle], "warm": warm[middle], "plan": run("plan", config)}
    write_hashes(folder)
    if not cold:
        run("batch", config)  # encodes one clip, and each caption
    costs["batch"] = run("batch", config)
    ledger = (folder / "cache" / "ledger.sqlite").stat().st_size
    held = ratio([cost.cpu for cost in warm], [cost.cpu for cost in walks], CPU_LIMIT)
    return Measured(entries, costs, ledger, held)


def report(measured: list[Measured]) -> None:
    rows = []
    for place in measured:
        for part, cost in place.costs.items():
            rows.append(
                (f"{place.entries:,}", part, f"{cost.cpu:.2f}", f"{cost.wall:.2f}", f"{cost.peak / (1 << 20):.0f}")
            )
    say(table(("entries", "part", "CPU-s", "s", "peak MiB"), rows))
    say()
    heads = ("entries", "ledger MiB", "warm scan / bare walk, CPU, 95% interval")
    say(table(heads, [(f"{m.entries:,}", f"{m.ledger / (1 << 20):.0f}", str(m.warm)) for m in measured]))
    if len(measured) > 1:
        say()
        few, many = measured[0], measured[-1]
        grown = [(part, many.costs[part].peak / few.costs[part].peak) for part in PARTS]
        heads = ("part", f"peak at {many.entries:,} / at {few.entries:,}", f"limit {MEMORY_LIMIT:g}")
        say(table(heads, [(part, f"{by:.2f}", "met" if by <= MEMORY_LIMIT else "MISSED") for part, by in grown]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[100_000, 1_000_000], help="files of each place")
    parser.add_argument("--pairs", type=int, default=7, help="warm scans and bare walks, in turn")
    parser.add_argument(
        "--cold", action="store_true", help="the first batch is measured with what has to be encoded for it"
    )
    parser.add_argument("--folder", type=Path, help="where the places are made; absent: a temporary folder")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--part", choices=("bare", *PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        say(json.dumps(asdict(measure(options.part, options.config))))
        return
    say_machine()
    measured = []
    for entries in options.entries:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="scan-") as folder:
            measured.append(measure_place(Path(folder), entries, options.pairs, cold=options.cold))
    say()
    report(measured)
    write_json(options.json, {"places": [asdict(each) for each in measured]})


if __name__ == "__main__":
    main()
