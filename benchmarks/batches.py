"""Batches from warm caches against a bare loop that reads the same safetensors; and how long a training step waits for them.

The bare loop reads the files with safetensors' own load_file, stacks the latents and pads the text: what any loader does,
and nothing more. vtrain's also works out which samples come next, checks each entry, drops captions. Both read files that are in
the page cache, in one process on one thread, in blocks that take turns. What a step waits is its metric `data_wait`.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and numpy start their threads

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Ratio, ratio, say, say_machine, table, write_json
from safetensors.torch import load_file
from workload import MODELS, MODES, write_config

from vtrain.contract import ClipShape, Family, TextEncoderSpec
from vtrain.data.batches import Batches
from vtrain.data.caching.caches import Caches
from vtrain.data.caching.inventory import Stores
from vtrain.data.index import Index, Rows
from vtrain.plan.records import Plan
from vtrain.run.prepare import planned

LIMIT, WAIT_LIMIT = 0.9, 0.01
ENTRIES = 16
"""Different clips; they stay in the page cache."""

SHAPES = {"64x128, 17 frames": (16, 5, 16, 8), "832x480, 81 frames": (16, 21, 60, 104)}
"""Of latents: the training benchmark's, and SANA-Video's own."""

TEXT = {"64x128, 17 frames": (300, 64), "832x480, 81 frames": (300, 2304)}
"""Of text embeddings, bf16: tokens, width."""


@dataclass(frozen=True)
class Compared:
    """Medians of milliseconds of CPU a batch, and the ratio of batches a second in pairs."""

    clips: str
    batch_size: int
    compressed: bool
    bare: float
    vtrain: float
    ratio: Ratio


@dataclass(frozen=True)
class Waited:
    """Of one run: seconds a step, of which it waited for its data, and the share of that."""

    model: str
    mode: str
    step: float
    waited: float
    share: float


@dataclass(frozen=True)
class Cached:
    """Made entries. files: (latents, text) of each."""

    index: Index
    files: Sequence[tuple[Path, Path]]


class WideText:
    """A family whose text is of another width, such as a larger model's."""

    def __init__(self, family: Family, width: int) -> None:
        self._family, self._width = family, width

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def text_encoders(self) -> dict[str, TextEncoderSpec]:
        return {
            name: replace(spec, parts={part: replace(each, width=self._width) for part, each in spec.parts.items()})
            for name, spec in self._family.text_encoders().items()
        }


def write_entries(stores: Stores, clips: str) -> Cached:
    """ENTRIES clips of random latents, each with a caption."""
    random = torch.Generator().manual_seed(0)
    keys = [f"{number:064x}" for number in range(1, ENTRIES + 1)]
    tokens, width = TEXT[clips]
    for number, key in enumerate(keys):
        stores.video.write(key, {"mean": torch.randn(SHAPES[clips], generator=random)})
        real = tokens - number % 8 * 30
        stores.text.write(key, {"embeds": torch.randn((real, width), generator=random).bfloat16()})
    rows = Rows(bytes.fromhex("".join(keys)), np.arange(1, ENTRIES + 1, dtype=np.int64) * 32)
    names = Rows(b"".join(b"%03d" % number for number in range(ENTRIES)), np.arange(1, ENTRIES + 1, dtype=np.int64) * 3)
    zeros = np.zeros(ENTRIES, dtype=np.int32)
    index = Index((ClipShape(17, 128, 64),), zeros, zeros, names, rows, rows, {})
    return Cached(index, [(stores.video.path(key), stores.text.path(key)) for key in keys])


def bare_batches(files: Sequence[tuple[Path, Path]], size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """(latents, embeds, mask) without end, in an order drawn anew for each pass."""
    order = np.random.default_rng(0)
    while True:
        chosen = order.permutation(len(files))
        for start in range(0, len(chosen) - size + 1, size):
            pairs = [files[number] for number in chosen[start : start + size]]
            latents = torch.stack([load_file(video)["mean"] for video, _ in pairs])
            texts = [load_file(text)["embeds"] for _, text in pairs]
            embeds = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
            mask = torch.arange(embeds.shape[1]) < torch.tensor([[len(text)] for text in texts])
            yield latents, embeds, mask


def vtrain_batches(plan: Plan, cached: Cached) -> Iterator[object]:
    batches = Batches(plan, Caches.open(plan), cached.index)
    return (batches[number] for number in itertools.count())


def block(batches: Iterator[object], count: int) -> Callable[[], float]:
    """CPU-seconds a batch of a block."""

    def take() -> float:
        began = time.process_time()
        for _ in range(count):
            next(batches)
        return (time.process_time() - began) / count

    return take


def compare(folder: Path, clips: str, size: int, *, compressed: bool, blocks: int, count: int) -> Compared:
    work = folder / f"{clips.split()[0].strip(',')}-{size}-{compressed}"
    work.mkdir()
    config = write_config(work, MODELS["tiny"], "full", log_every=1, name="batches")
    text = config.read_text(encoding="utf-8").replace(
        "caption_dropout = 0", f"caption_dropout = 0\nbatch_size = {size}"
    )
    config.write_text(text.replace("[cache]\n", f"[cache]\ncompress = {str(compressed).lower()}\n"), encoding="utf-8")
    plan = planned(config)
    plan = replace(plan, family=WideText(plan.family, TEXT[clips][1]))
    cached = write_entries(Stores(plan), clips)
    files = cached.files
    if compressed:  # the bare loop has no use for it: it reads the same numbers plain
        plain = Stores(planned(write_config(work / "..", MODELS["tiny"], "full", log_every=1, name=f"plain-{size}")))
        files = write_entries(plain, clips).files
    sides = block(bare_batches(files, size), count), block(vtrain_batches(plan, cached), count)
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(blocks + 1):
        for side in (0, 1) if turn % 2 else (1, 0):
            seconds = sides[side]()
            if turn:
                taken[side].append(seconds)
    bare, ours = taken
    limit = None if compressed else LIMIT
    middle = [1000 * statistics.median(each) for each in taken]
    return Compared(clips, size, compressed, *middle, ratio(bare, ours, limit, at_least=True))


def waiting(folder: Path, model: str, mode: str, blocks: int, steps: int) -> Waited:
    """What a run's own metrics say, its first block left out: its first batch is waited for."""
    from step import vtrain_block

    from vtrain.plan.places import METRICS

    config = write_config(folder, MODELS[model], mode, steps, name=f"wait-{model}-{mode}")
    with vtrain_block(config) as take:
        for _ in range(blocks + 1):
            take()
    lines = (config.with_suffix("") / METRICS).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][steps:]
    step, waited = (statistics.fmean(float(str(row[name])) for row in rows) for name in ("seconds", "data_wait"))
    return Waited(model, mode, step, waited, waited / step)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20, help="blocks of each side (default: 20)")
    parser.add_argument("--batches", type=int, default=32, help="batches of a block (default: 32)")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="to train, for the wait")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=20, help="steps of a block of training (default: 20)")
    parser.add_argument("--folder", type=Path, help="where checkpoint and cache go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    with ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vtrain-batches-")))
        folder.mkdir(parents=True, exist_ok=True)
        say_machine()
        wanted = [(clips, size, False) for clips in SHAPES for size in (1, 4)] + [(list(SHAPES)[1], 1, True)]
        rows = [
            compare(folder, clips, size, compressed=compressed, blocks=chosen.blocks, count=chosen.batches)
            for clips, size, compressed in wanted
        ]
        say(
            table(
                ("clips", "batch", "entries", "bare ms", "vtrain ms", "vtrain's batches/s by the bare loop's, 95% interval"),
                [
                    (
                        row.clips, str(row.batch_size), "compressed" if row.compressed else "plain",
                        f"{row.bare:.3f}", f"{row.vtrain:.3f}", str(row.ratio),
                    )
                    for row in rows
                ],
            )
        )  # fmt: skip
        waits = [waiting(folder, model, mode, 3, chosen.steps) for model in chosen.models for mode in chosen.modes]
        if waits:
            met = {True: "met", False: "MISSED"}
            cells = [
                (each.model, each.mode, f"{each.step:.4f}", f"{1000 * each.waited:.3f}",
                 f"{each.share:.3%}, limit {WAIT_LIMIT:.0%}: {met[each.share <= WAIT_LIMIT]}")
                for each in waits
            ]  # fmt: skip
            say("\n" + table(("model", "trained", "s/step", "waited ms", "share of the step"), cells))
        found = {"batches": [asdict(row) for row in rows], "waits": [asdict(each) for each in waits]}
        write_json(chosen.json, found)


if __name__ == "__main__":
    main()
