"""A third-party plugin from its own wheel, beside vtrain from its wheel: listed, then trained, with no line of core changed.

Slow: it builds two wheels, makes an environment and trains in it, all without a network. The environment has the two
wheels in its own site-packages and sees the libraries of the environment that runs the tests behind them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

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


def checked(*command: str | Path, cwd: Path) -> str:
    """What a command prints; its output is in the failure."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("VTRAIN_", "PYTHONPATH"))}
    environment |= {"VTRAIN_PLUGINS": "builtin,toy", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with vtrain and vtrain-toy from wheels."""
    place = tmp_path_factory.mktemp("third-party")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    build = ("wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", place / "wheels")
    checked(*pip, *build, ROOT, ROOT / "tests/fixtures/toy_plugin", cwd=place)
    venv.create(place / "env", symlinks=True)
    programs = place / "env" / "bin"
    wheels = sorted((place / "wheels").glob("*.whl"))
    assert [wheel.name.split("-")[0] for wheel in wheels] == ["vtrain", "vtrain_toy"]
    checked(*pip, "--python", programs / "python", "install", "-q", "--no-deps", "--no-index", *wheels, cwd=place)
    own = checked(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place)
    libraries = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (Path(own.strip()) / "libraries_of_the_tests.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    return programs


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


def test_the_wheels_are_what_runs(bin_folder: Path, tmp_path: Path) -> None:
    code = "import vtrain, vtrain_builtin, vtrain_toy; print(vtrain.__file__, vtrain_builtin.__file__, vtrain_toy.__file__)"
    places = checked(bin_folder / "python", "-c", code, cwd=tmp_path).split()
    assert len(places) == 3
    assert all(Path(place).is_relative_to(bin_folder.parent) for place in places), places


def test_the_plugin_is_listed_with_its_distribution(bin_folder: Path, tmp_path: Path) -> None:
    listed = json.loads(checked(bin_folder / "vtrain", "plugins", "list", "--json", cwd=tmp_path))
    found = {(part["kind"], part["name"]): (part["distribution"], part["version"]) for part in listed["parts"]}
    assert found["family", "toy"] == found["regularizer", "toy-smooth"] == ("vtrain-toy", "0.1.0")
    assert found["sampler", "flow"][0] == "vtrain"
    assert not [failure for failure in listed["failures"] if failure["entry_point"] in ("builtin", "toy")]


def test_the_toy_family_trains_from_its_wheel(bin_folder: Path, project: Path) -> None:
    (project / "config.toml").write_text(CONFIG.format(train="full"), encoding="utf-8")
    checked(bin_folder / "vtrain", "run", "config.toml", cwd=project)
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


def test_an_adapter_of_the_toy_family_trains_from_its_wheel(bin_folder: Path, project: Path) -> None:
    (project / "config.toml").write_text(CONFIG.format(train="lora"), encoding="utf-8")
    checked(bin_folder / "vtrain", "run", "config.toml", cwd=project)
    saved = sorted((project / "output").glob("checkpoints/step-000002/**/adapter_model.safetensors"))
    assert saved
    names = load_file(saved[0])
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == {"to_q", "to_k", "to_v", "to_out"}
    assert any(value.any() for name, value in names.items() if "lora_B" in name), "the adapter was not trained"
