"""Whole runs with CREPA through the command line: the cache, a resume, two processes, what is exported."""

# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, unused-ignore"
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import Dinov2Config, Dinov2Model

from vtrain.cli.app import main

CONFIG = """
[run]
output_dir = "{output}"
resume = "{resume}"
[model]
use = "sanavideo"
path = "{model}"
train = "full"
[[data]]
use = "folder"
path = "clips"
resolution = ["96x64", "64x64"]
[data.video]
frames = 9
fps = 8
[train]
steps = 8
batch_size = 1
accumulate = {accumulate}
log_every = 2
[checkpoint]
every = "3 steps"
[optimizer]
use = "adamw"
lr = 1e-3
[[regularizer]]
use = "crepa"
block = 2
encoder = "dino"
precision = "fp32"
{more}
[regularizer.schedule]
decay = "cosine"
warmup = "2 steps"
end = 0.1
threshold = 0.0
threshold_mode = "recoverable"
smoothing = 0.5
probe_every = 3
"""

Row = dict[str, object]
Train = Callable[..., list[Row]]
Launch = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.long


def save_encoder(folder: Path, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of two shapes with captions, and a tiny DINOv2."""
    home = tmp_path_factory.mktemp("runs")
    (home / "clips").mkdir()
    for number in range(6):
        width = 96 if number % 2 else 64
        with av.open(str(home / "clips" / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"crf": "10"})
            stream.width, stream.height, stream.pix_fmt = width, 64, "yuv420p"
            for frame in range(12):
                x, y = np.meshgrid(np.arange(width), np.arange(64))
                wave = np.stack([np.sin((x + (number + 1) * frame + 20 * c) / 9) + np.cos(y / 7) for c in range(3)], -1)
                picture = av.VideoFrame.from_ndarray((wave * 60 + 128).astype(np.uint8), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        (home / "clips" / f"{number}.txt").write_text(f"waves, number {number}")
    save_encoder(home / "dino", 64, 0)
    return home


@pytest.fixture(scope="module")
def launch(folder: Path, checkpoint: Path) -> Launch:
    """launch("name", ...) -> `vtrain run` as it ended: one process is this one, two are torchrun's. All share the cache."""

    def run(
        output: str, *, more: str = "", resume: str = "never", accumulate: int = 2, processes: int = 1
    ) -> subprocess.CompletedProcess[str]:
        file = folder / f"{output}.toml"
        values = {"output": output, "resume": resume, "model": checkpoint, "accumulate": accumulate, "more": more}
        file.write_text(CONFIG.format(**values))
        if processes == 1:
            return run_here(file)
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nproc_per_node={processes}",
                "-m",
                "vtrain.cli",
                "run",
                str(file),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=280,
        )

    return run


def run_here(file: Path) -> subprocess.CompletedProcess[str]:
    """`vtrain run` in this process, on the CPU as two are."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("ACCELERATE_USE_CPU", "1")
        patch.setattr("sys.argv", ["vtrain", "run", str(file)])
        with pytest.raises(SystemExit) as ended:
            main()
    return subprocess.CompletedProcess(str(file), int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def train(folder: Path, launch: Launch) -> Train:
    """train("name", ...) -> the rows of its metrics."""

    def run(output: str, **settings: object) -> list[Row]:
        done = launch(output, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture
def replace_encoder(folder: Path) -> Iterator[Callable[..., None]]:
    """Puts another DINOv2 in its place until the end of the test."""
    own = (folder / "dino").rename(folder / "dino-own")

    def replace(width: int, seed: int) -> None:
        shutil.rmtree(folder / "dino", ignore_errors=True)
        save_encoder(folder / "dino", width, seed)

    yield replace
    shutil.rmtree(folder / "dino")
    own.rename(folder / "dino")


@pytest.fixture(scope="module")
def whole(train: Train) -> list[Row]:
    return train("whole")


def numbers(rows: list[Row]) -> list[Row]:
    """What does not depend on the machine."""
    return [{key: row[key] for key in ("step", "loss", "flow_loss", "lr", "terms", "samples")} for row in rows]


def test_a_run_pauses_by_its_similarity_and_says_each_number(whole: list[Row]) -> None:
    terms = [row["terms"] for row in whole]
    assert [bool(term) for term in terms].count(False) >= 1, terms
    names = {"loss", "alignment_loss", "similarity", "neighbour_similarity", "weight"}
    found = [term for term in terms if isinstance(term, dict) and term]
    assert all(set(term) == {f"crepa/{name}" for name in names} for term in found)
    assert found[0]["crepa/weight"] == 0.25
    for row, term in ((row, row["terms"]) for row in whole if row["terms"]):
        assert isinstance(term, dict)
        assert row["loss"] == pytest.approx(row["flow_loss"] + term["crepa/loss"], rel=1e-5)  # type: ignore[operator]


def test_a_resumed_run_is_the_same_run(train: Train, whole: list[Row]) -> None:
    for step in (3, 6):
        resumed = train(f"from{step}", resume=f"whole/checkpoints/step-{step:06}")
        assert numbers(resumed) == numbers(whole)[step:]


def test_a_resumed_run_with_another_encoder_in_the_same_place_is_told_so(
    launch: Launch, whole: list[Row], replace_encoder: Callable[..., None]
) -> None:
    """Once a width that does not fit ended in torch's own traceback, and other weights were not noticed at all."""
    assert len(whole) == 8
    replace_encoder(48, seed=0)
    wider = launch("wider", resume="whole/checkpoints/step-000006")
    assert wider.returncode == 2
    assert (
        "regularizers/crepa.safetensors: what this regularizer has learned does not fit it as it is now" in wider.stderr
    )
    assert "size mismatch for projector.2.weight" in wider.stderr
    assert "Restore what it was made with, such as its encoder's files" in wider.stderr
    assert "Traceback" not in wider.stderr
    replace_encoder(64, seed=1)
    other = launch("other", resume="whole/checkpoints/step-000006")
    assert other.returncode == 0, other.stderr
    assert "features (crepa): 0 of 6 cached, 6 to do" in other.stdout
    assert "the features of crepa changed since the checkpoint: its encoder's weights" in other.stdout


def test_two_processes_are_one_with_twice_the_accumulation(train: Train, whole: list[Row]) -> None:
    two = train("two", accumulate=1, processes=2)
    for row, other in zip(numbers(whole), numbers(two), strict=True):
        assert row["samples"] == other["samples"]
        assert row["terms"] == pytest.approx(other["terms"], abs=1e-5)
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_features_of_the_cache_train_as_those_made_at_each_step(train: Train, whole: list[Row]) -> None:
    """From the source's own frames: the same pictures, encoded in other batches."""
    online = train("online", more='teacher = "online"\nonline_from = "source"')
    for row, other in zip(numbers(whole), numbers(online), strict=True):
        assert row["terms"] == pytest.approx(other["terms"], abs=1e-4)


def test_decoded_latents_with_the_codecs_decoding_half_alone_train(train: Train, whole: list[Row]) -> None:
    decoded = train("decoded", more='teacher = "online"\ndrop_vae_encoder = true')
    assert decoded[0]["flow_loss"] == whole[0]["flow_loss"]
    assert decoded[0]["terms"] != whole[0]["terms"]


def test_the_projector_is_saved_and_no_part_of_the_exported_model(folder: Path, whole: list[Row]) -> None:
    from diffusers import SanaVideoTransformer3DModel

    saved = folder / "whole" / "checkpoints" / "step-000008"
    with safe_open(saved / "regularizers" / "crepa.safetensors", framework="pt") as file:
        kept = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert kept["projector.0.weight"] == (96, 96)
    assert kept["projector.2.weight"] == (64, 96)
    assert kept["_extra_state"] == (4,)
    _, report = SanaVideoTransformer3DModel.from_pretrained(saved / "transformer", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert [row["step"] for row in whole] == list(range(1, 9))
