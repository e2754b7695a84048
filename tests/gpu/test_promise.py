"""[memory] on a card: a limit is kept while a run goes on, and a step takes what was estimated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Record = Callable[[str, object], None]
CLIPS = Path(__file__).parents[2] / "examples" / "clips"
CONFIG = """
[run]
output_dir = "out"
[model]
use = "sanavideo"
path = "model"
train = "{train}"
[[data]]
use = "folder"
path = "clips"
resolution = ["256x256"]
upscale = true
video = {{ frames = 17, min_frames = 9, fps = 8, repeat_frames = true }}
[cache]
dir = "cache"
[train]
steps = 4
batch_size = 2
log_every = 1
[optimizer]
use = "adamw"
lr = 1e-4
[checkpoint]
every = "4 steps"
[memory]
limit = "{limit}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 104 M model and clips."""
    from vtrain_sanavideo import tiny

    made = tmp_path_factory.mktemp("promise")
    tiny.build(made / "model", layers=6, heads=8, head_dim=112)
    shutil.copytree(CLIPS, made / "clips")
    return made


@pytest.mark.parametrize(
    ("train", "limit"), [("full", "6 GiB"), ("full", "3.4 GiB"), ("lora", "4 GiB"), ("lora", "1.6 GiB")]
)
def test_a_step_takes_what_was_estimated_and_no_more_than_the_limit(
    folder: Path, run: Callable[..., str], record_property: Record, train: str, limit: str
) -> None:
    config = folder / "config.toml"
    config.write_text(CONFIG.format(train=train, limit=limit), encoding="utf-8")
    shutil.rmtree(folder / "out", ignore_errors=True)
    run(config)
    (ended,) = (row for row in events(folder / "out") if row["event"] == "ended")
    settings: Any = json.loads((folder / "out" / "plan.json").read_text(encoding="utf-8"))["memory"]
    promise = settings["promise"]
    record_property("chosen", promise["chosen"])
    record_property("MiB estimated and at the peak", [ended[k] / 2**20 for k in ("estimated_memory", "peak_memory")])
    if not torch.cuda.is_available():
        return
    assert not promise["on_cpu"]
    assert ended["peak_memory"] <= promise["limit"]
    assert ended["peak_memory"] == pytest.approx(ended["estimated_memory"], rel=0.15)


def test_beyond_its_limit_the_card_counts_as_full(card: Any) -> None:
    card.release()
    card.limit(card.allocated() + (256 << 20))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(512 << 20, dtype=torch.uint8, device=card.torch)
        assert torch.empty(64 << 20, dtype=torch.uint8, device=card.torch).nbytes == 64 << 20
    finally:
        card.limit(None)


def events(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "events.jsonl").read_text(encoding="utf-8").splitlines()]
