"""A third-party plugin from its own wheel, beside vtrain from its wheel: listed, then trained, with no line of core changed.

Slow: it builds two wheels, makes an environment and trains in it, all without a network.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]

CONFIG = """
[run]
output_dir = "output"

[model]
use = "toy"
train = "{train}"

[precision]
mixed = "no"
base = "fp32"

[[data]]
use = "folder"
path = "clips"
resolution = "64x64"
[data.video]
frames = 9

[train]
steps = 2
batch_size = 2

[optimizer]
use = "adamw"
lr = 1e-3

[[regularizer]]
use = "toy-smooth"
block = 1

[[tracker]]
use = "tensorboard"

[validation]
every = "2 steps"
steps = 3
guidance = 2.0
[validation.prompts]
ball = "a bright ball"
"""


@pytest.fixture(scope="module")
def programs(environment: Callable[..., Any]) -> Callable[..., str]:
    """programs("vtrain", ..., cwd=folder): what a program prints of an environment with vtrain and vtrain-toy from wheels."""
    made = environment(ROOT / "tests/fixtures/toy_plugin")
    return partial(made.run, VTRAIN_PLUGINS="builtin,toy")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with three generated clips of a moving ball, 96x96 and 12 frames, with captions."""
    clips = tmp_path / "clips"
    clips.mkdir()
    rows, columns = np.mgrid[0:96, 0:96]
    for clip in range(3):
        with av.open(str(clips / f"ball{clip}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
            for frame in range(12):
                ball = (columns - 10 - 6 * frame) ** 2 + (rows - 24 - 20 * clip) ** 2 < 200
                picture = np.where(ball[..., None], (250, 200, 40 * clip), (20, 40, 60)).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        (clips / f"ball{clip}.txt").write_text(f"a bright ball, number {clip}", encoding="utf-8")
    return tmp_path


def test_the_wheels_are_what_runs(programs: Callable[..., str], tmp_path: Path) -> None:
    code = "import vtrain, vtrain_builtin, vtrain_toy; print(vtrain.__file__, vtrain_builtin.__file__, vtrain_toy.__file__)"
    places = programs("python", "-c", code, cwd=tmp_path).split()
    assert len(places) == 3
    prefix = programs("python", "-c", "import sys; print(sys.prefix)", cwd=tmp_path).strip()
    assert all(Path(place).is_relative_to(prefix) for place in places), places


def test_the_plugin_is_listed_with_its_distribution(programs: Callable[..., str], tmp_path: Path) -> None:
    listed = json.loads(programs("vtrain", "plugins", "list", "--json", cwd=tmp_path))
    found = {(part["kind"], part["name"]): (part["distribution"], part["version"]) for part in listed["parts"]}
    assert found["family", "toy"] == found["regularizer", "toy-smooth"] == ("vtrain-toy", "0.1.0")
    assert found["sampler", "flow"][0] == "vtrain"
    assert not [failure for failure in listed["failures"] if failure["entry_point"] in ("builtin", "toy")]


def test_the_toy_family_trains_from_its_wheel(programs: Callable[..., str], project: Path) -> None:
    (project / "config.toml").write_text(CONFIG.format(train="full"), encoding="utf-8")
    programs("vtrain", "run", "config.toml", cwd=project)
    output = project / "output"
    losses = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in losses)
    saved = sorted(output.glob("checkpoints/step-000002/**/denoiser.safetensors"))
    assert saved, sorted(str(path.relative_to(output)) for path in output.rglob("*"))
    assert sum(weight.numel() for weight in load_file(saved[0]).values()) == 48_176
    with av.open(str(output / "samples/step-000002/ball.mp4")) as container:
        frames = list(container.decode(video=0))
    assert (len(frames), frames[0].width, frames[0].height) == (9, 64, 64)
    assert list((output / "tensorboard").glob("events.*"))


def test_an_adapter_of_the_toy_family_trains_from_its_wheel(programs: Callable[..., str], project: Path) -> None:
    (project / "config.toml").write_text(CONFIG.format(train="lora"), encoding="utf-8")
    programs("vtrain", "run", "config.toml", cwd=project)
    saved = sorted((project / "output").glob("checkpoints/step-000002/**/adapter_model.safetensors"))
    assert saved
    names = load_file(saved[0])
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == {"to_q", "to_k", "to_v", "to_out"}
    assert any(value.any() for name, value in names.items() if "lora_B" in name), "the adapter was not trained"
