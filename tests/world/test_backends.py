"""The tiny world's clips from a folder, from S3, from tar files and from a Parquet file: the same cached latents."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from torch import Tensor

from vtrain.data.caching import fill as filling
from vtrain.data.caching.caches import fill_caches
from vtrain.data.decoding.worker import Workers
from vtrain.data.scanning import scan as scanning
from vtrain.run.prepare import prepare

COUNT = 4
Fill = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="module")
def clips(world: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    world.write_clips(folder, world.clips(COUNT, seed=3))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _kept_process() -> Iterator[None]:
    """All scans and fillings decode in one process: each new one would import torch."""
    with Workers(1, limit_s=60) as workers, pytest.MonkeyPatch.context() as patch:
        for module in (scanning, filling):
            patch.setattr(module, "Workers", lambda count, limit_s: nullcontext(workers))
        yield


@pytest.fixture(scope="module")
def fill(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Fill:
    """fill(name, *tables of data): fills a fresh cache; "<stem of the file>: <caption>" -> cached latents."""

    place = tmp_path_factory.mktemp("caches")

    def filling(name: str, *tables: str) -> dict[str, Tensor]:
        text = f"""
            [run]
            output_dir = "{place / name / "run"}"
            [model]
            use = "sanavideo"
            path = "{built}"
            train = "full"
            text_precision = "fp32"
            [cache]
            dir = "{place / name / "cache"}"
            [train]
            steps = 1
            [optimizer]
            lr = 1e-3
        """
        for table in tables:
            text += f'[[data]]\nresolution = ["64x64"]\nvideo = {{ frames = 9, fps = 8 }}\n{table}\n'
        path = place / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        prepared = prepare(path)
        filled = fill_caches(prepared.plan, prepared.scan.samples, (), "cpu", lambda *_: None)
        assert not filled.skipped
        return {
            f"{Path(sample.ref_id).stem}: {sample.captions[0].text}": filled.caches.latents(
                sample, sample.starts[0]
            ).mean
            for sample in prepared.scan.samples
        }

    return filling


@pytest.fixture(scope="module")
def wanted(fill: Fill, clips: Path) -> dict[str, Tensor]:
    """From a folder."""
    found = fill("folder", f'use = "folder"\npath = "{clips}"')
    assert len(found) == COUNT
    assert len({tuple(latents.flatten().tolist()) for latents in found.values()}) == COUNT
    return found


def shard(clips: Path, numbers: range | tuple[int, ...]) -> bytes:
    """A tar file of clips and their captions, as webdataset writes them."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for number in numbers:
            for suffix in (".mp4", ".txt"):
                tar.add(clips / f"{number:05}{suffix}", f"{number:05}{suffix}")
    return target.getvalue()


def table_of_bytes(clips: Path, numbers: range | tuple[int, ...]) -> bytes:
    """A Parquet file with a row for each clip: its name, its bytes and its caption."""
    columns = {
        "key": [f"{number:05}" for number in numbers],
        "video": [(clips / f"{number:05}.mp4").read_bytes() for number in numbers],
        "text": [(clips / f"{number:05}.txt").read_text().strip() for number in numbers],
    }
    target = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), target, row_group_size=2)
    return target.getvalue()


COLUMNS = 'columns = { bytes = "video", caption = "text", id = "key" }'


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_every_backend_gives_the_same_latents(
    fill: Fill, wanted: dict[str, Tensor], clips: Path, bucket: Any, tmp_path: Path
) -> None:
    bucket.put({f"clips/{file.name}": file.read_bytes() for file in clips.iterdir()})
    options = f'storage_options = {{ endpoint_url = "{bucket.endpoint}" }}'
    assert same(fill("s3", f'use = "folder"\npath = "s3://{bucket.name}/clips"\n{options}'), wanted)

    for number in range(2):
        (tmp_path / f"shard-{number}.tar").write_bytes(shard(clips, (2 * number, 2 * number + 1)))
    assert same(fill("tar", f'use = "tar"\npath = "{tmp_path}/shard-{{0..1}}.tar"'), wanted)

    (tmp_path / "clips.parquet").write_bytes(table_of_bytes(clips, range(COUNT)))
    assert same(fill("parquet", f'use = "manifest"\npath = "{tmp_path}/clips.parquet"\n{COLUMNS}'), wanted)


def test_datasets_of_different_backends_train_in_one_run(
    fill: Fill, wanted: dict[str, Tensor], clips: Path, bucket: Any, tmp_path: Path
) -> None:
    """One dataset is turned off."""
    for suffix in (".mp4", ".txt"):
        (tmp_path / f"00000{suffix}").write_bytes((clips / f"00000{suffix}").read_bytes())
    row = {"path": f"s3://{bucket.name}/some/00001.mp4", "caption": (clips / "00001.txt").read_text()}
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    bucket.put({"some/00001.mp4": (clips / "00001.mp4").read_bytes(), "shards/two.tar": shard(clips, (2,))})
    (tmp_path / "three.parquet").write_bytes(table_of_bytes(clips, (3,)))
    options = f'storage_options = {{ endpoint_url = "{bucket.endpoint}" }}'
    found = fill(
        "mixed",
        f'use = "folder"\npath = "{tmp_path}"',
        f'use = "manifest"\npath = "{tmp_path}/one.jsonl"\n{options}',
        f'use = "tar"\npath = "s3://{bucket.name}/shards/*.tar"\n{options}',
        f'use = "manifest"\npath = "{tmp_path}/three.parquet"\n{COLUMNS}',
        'use = "folder"\npath = "nowhere"\nenabled = false',
    )
    assert same(found, wanted)


def test_a_run_goes_on_through_a_network_that_drops_stalls_and_is_busy(
    fill: Fill, wanted: dict[str, Tensor], clips: Path, bucket: Any, proxy: Any, fault: Any
) -> None:
    bucket.put({f"clips/{file.name}": file.read_bytes() for file in clips.iterdir()})
    proxy.match = b"/clips/"
    proxy.faults.extend([fault("drop", 700), fault("503"), fault("stall"), fault("500"), fault("drop", 0)])
    options = f'timeout = 3\nstorage_options = {{ endpoint_url = "{proxy.url}" }}'
    assert same(fill("through-proxy", f'use = "folder"\npath = "s3://{bucket.name}/clips"\n{options}'), wanted)
    assert not proxy.faults


def test_a_clip_whose_connection_always_drops_is_named_and_the_others_are_used(
    built: Path, clips: Path, bucket: Any, proxy: Any, fault: Any, tmp_path: Path
) -> None:
    """The next scan tries the clip again."""
    bucket.put({f"clips/{file.name}": file.read_bytes() for file in clips.iterdir()})
    proxy.match = b"/clips/00002.mp4"
    proxy.faults.extend([fault("drop", 1000)] * 2)  # after the head: what of it drops, aiohttp asks for again
    table = f'use = "folder"\npath = "s3://{bucket.name}/clips"\nresolution = ["64x64"]\nretries = 1\n'
    table += f'storage_options = {{ endpoint_url = "{proxy.url}" }}\nvideo = {{ frames = 9, fps = 8 }}'
    path = tmp_path / "run.toml"
    path.write_text(
        f'[run]\noutput_dir = "out"\n[model]\nuse = "sanavideo"\npath = "{built}"\ntrain = "full"\n'
        f"[train]\nsteps = 1\n[optimizer]\nlr = 1e-3\n[[data]]\n{table}\n"
    )
    survey = prepare(path).scan.survey.datasets[0]
    assert sum(survey.samples.values()) == COUNT - 1
    ((reason, (count, example)),) = survey.skipped.items()
    assert (count, example) == (1, "00002.mp4")
    assert "2 times" in reason
    assert sum(prepare(path).scan.survey.datasets[0].samples.values()) == COUNT
