"""Whole runs, from text and from pictures, through the command line: all weights, LoRA, CREPA, layersync, masks, validation."""

# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, unused-ignore"
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

from vtrain.cli.app import main

CONFIG = """
[run]
output_dir = "{output}"
resume = "{resume}"
[model]
use = "{family}"
path = "{model}"
train = "{train}"
text_precision = "fp32"
[[data]]
use = "folder"
path = "{clips}"
resolution = ["{wide}x{high}", "{high}x{high}"]
[data.video]
frames = 9
fps = 8
{video}
{masks}
[train]
steps = {steps}
batch_size = 2
log_every = 1
[checkpoint]
every = "2 steps"
[optimizer]
use = "adamw"
lr = 1e-3
{more}
"""

Row = dict[str, object]
Run = Callable[..., tuple[int, str]]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips of two shapes with captions, their masks, and a tiny DINOv2."""
    from transformers import Dinov2Config, Dinov2Model

    home = tmp_path_factory.mktemp("runs")
    (home / "clips").mkdir()
    (home / "masked" / "masks").mkdir(parents=True)
    for number in range(4):
        width = 96 if number % 2 else 64
        x, y = np.meshgrid(np.arange(width), np.arange(64))
        waves = [
            np.stack([np.sin((x + (number + 1) * frame + 20 * c) / 9) + np.cos(y / 7) for c in range(3)], -1) * 60 + 128
            for frame in range(12)
        ]
        write(home / "clips" / f"{number}.mp4", waves)
        write(home / "masked" / "masks" / f"{number}.mp4", [np.repeat(255.0 * (x < 32)[..., None], 3, -1)] * 12)
        (home / "clips" / f"{number}.txt").write_text(f"a boat, number {number}")
    shutil.copytree(home / "clips", home / "masked", dirs_exist_ok=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(home / "dino")  # type: ignore[arg-type]
    return home


def write(path: Path, frames: list[np.ndarray]) -> None:  # type: ignore[type-arg]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def run(folder: Path, wan21: Path, i2v: Path, ti2v: Path) -> Run:
    """run("name", family, ...) -> (exit code, all that was printed), in this process, on the CPU."""

    def call(output: str, family: str = "wan21", command: str = "run", **settings: object) -> tuple[int, str]:
        values: dict[str, object] = {
            "output": output, "family": family.removesuffix("-i2v"), "train": "full",
            "model": {"wan21": wan21, "wan21-i2v": i2v, "wan22-ti2v": ti2v}[family],
            "clips": "clips", "resume": "never", "wide": 96, "high": 64, "video": "", "masks": "", "steps": 4, "more": "",
        }  # fmt: skip
        file = folder / f"{output}.toml"
        file.write_text(CONFIG.format(**values | settings))
        out = StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out):
            patch.setenv("ACCELERATE_USE_CPU", "1")
            patch.setattr("sys.argv", ["vtrain", command, str(file)])
            with pytest.raises(SystemExit) as ended:
                main()
        return int(ended.value.code or 0), out.getvalue()

    return call


def rows(folder: Path, output: str) -> list[Row]:
    return [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]


VALIDATION = """
[validation]
every = "2 steps"
steps = 2
guidance = 3.0
size = "96x64"
frames = 9
[validation.prompts]
boat = "a boat"
"""

CREPA = """
[[regularizer]]
use = "crepa"
block = 2
encoder = "dino"
precision = "fp32"
[[regularizer]]
use = "layersync"
student = 1
teacher = 3
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan21", "wan22-ti2v"])
def test_a_full_run_learns_validates_and_saves_what_diffusers_loads(run: Run, folder: Path, family: str) -> None:
    """Slow (10 s): that of image-to-video below goes the same ways."""
    code, printed = run(f"full-{family}", family, more=VALIDATION)
    assert code == 0, printed
    found = rows(folder, f"full-{family}")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert all(np.isfinite(float(str(row["loss"]))) for row in found)
    saved = folder / f"full-{family}" / "checkpoints" / "step-000004"
    _, report = WanTransformer3DModel.from_pretrained(saved / "transformer", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert list((folder / f"full-{family}" / "samples").rglob("boat*.mp4"))


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(run: Run, folder: Path) -> None:
    """Slow (5 s), for the same reason."""
    assert run("whole")[0] == 0
    code, printed = run("half", resume="whole/checkpoints/step-000002")
    assert code == 0, printed
    numbers = [
        [{key: row[key] for key in ("step", "loss", "samples")} for row in rows(folder, n)] for n in ("whole", "half")
    ]
    assert numbers[1] == numbers[0][2:]


@pytest.mark.parametrize("family", ["wan21", pytest.param("wan22-ti2v", marks=pytest.mark.slow)])
def test_an_adapter_with_crepa_layersync_and_masks(
    run: Run, folder: Path, wan21: Path, ti2v: Path, family: str
) -> None:
    masks = '[data.masks]\nfolder = "masks"'
    code, printed = run(f"lora-{family}", family, train="lora", more=CREPA, clips="masked", masks=masks, steps=2)
    assert code == 0, printed
    terms = rows(folder, f"lora-{family}")[-1]["terms"]
    assert isinstance(terms, dict)
    assert {"crepa/similarity", "layersync/loss"} <= set(terms)
    pipeline = WanPipeline.from_pretrained(wan21 if family == "wan21" else ti2v)
    saved = folder / f"lora-{family}" / "checkpoints" / "step-000002"
    weights = next(saved.rglob("pytorch_lora_weights.safetensors"))
    pipeline.load_lora_weights(weights.parent)
    assert sum("lora_B" in name for name in pipeline.transformer.state_dict()) == 4 * 10


def test_the_plan_says_the_recipe_and_warns_of_another(run: Run) -> None:
    code, printed = run("plan", "wan22-ti2v", "plan")
    assert code == 0, printed
    assert "shift 5" in printed
    code, printed = run("other", "wan22-ti2v", "plan", more="[sampler]\nshift = 1.0")
    assert code == 0, printed
    assert "sampler.shift = 1.0" in printed
    assert "is shift = 5.0" in printed


def test_the_plan_refuses_a_checkpoint_of_another_version(run: Run, ti2v: Path) -> None:
    code, printed = run("wrong", "wan21", "plan", model=ti2v)
    assert code == 2
    assert "this is Wan 2.2 TI2V of width 96, and not Wan 2.1 text-to-video or Wan 2.1 image-to-video." in printed


PICTURES = (
    VALIDATION.replace("2 steps", "4 steps")
    + """
[validation.images]
boat = "clips/1.mp4"
"""
)


def test_a_run_of_image_to_video_learns_resumes_and_validates_from_a_picture(run: Run, folder: Path, i2v: Path) -> None:
    """Every draw has its picture; the caches are filled once; the saved transformer is one for WanImageToVideoPipeline."""
    code, printed = run("pictures", "wan21-i2v", more=PICTURES)
    assert code == 0, printed
    code, printed = run("again", "wan21-i2v", more=PICTURES, resume="pictures/checkpoints/step-000002")
    assert code == 0, printed
    numbers = [[(row["step"], row["loss"]) for row in rows(folder, name)] for name in ("pictures", "again")]
    assert numbers[1] == numbers[0][2:]
    assert [step for step, _ in numbers[0]] == [1, 2, 3, 4]
    videos = [(folder / name / "samples" / "step-000004" / "boat.mp4").read_bytes() for name in ("pictures", "again")]
    assert videos[0] == videos[1]
    saved = folder / "pictures" / "checkpoints" / "step-000004" / "transformer"
    transformer, report = WanTransformer3DModel.from_pretrained(saved, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    WanImageToVideoPipeline.from_pretrained(i2v, transformer=transformer)


def test_a_share_of_ti2vs_draws_has_a_clean_first_frame_and_videos_begin_with_a_picture(run: Run, folder: Path) -> None:
    pictures = PICTURES.replace("4 steps", "2 steps")
    code, printed = run("share", "wan22-ti2v", more=pictures, video="image_to_video = 0.5", steps=2)
    assert code == 0, printed
    sigmas = [sigma for row in rows(folder, "share") for sigma in row["sigmas"]]  # type: ignore[attr-defined]
    assert {type(sigma) for sigma in sigmas} == {float, list}
    assert all(sigma[0] == 0 for sigma in sigmas if isinstance(sigma, list))
    assert list((folder / "share" / "samples").rglob("boat*.mp4"))


def test_the_plan_names_a_missing_picture_a_share_and_a_lacking_encoder(run: Run, tmp_path: Path, i2v: Path) -> None:
    code, printed = run("refused", "wan21-i2v", "plan", more=VALIDATION, video="image_to_video = 0.5")
    assert code == 2
    assert '"boat" has no picture, and this model family cannot do without the first frame and its CLIP emb' in printed
    assert "image_to_video = 0.5: this model family cannot do without the first frame and its CLIP embedding" in printed
    model = shutil.copytree(i2v, tmp_path / "i2v")
    (model / "image_encoder" / "model.safetensors").unlink()
    code, printed = run("lacking", "wan21-i2v", "plan", more=PICTURES, model=model)
    assert code == 2
    assert "image_encoder/model.safetensors: this weight file is missing." in printed


def test_the_plan_refuses_pictures_for_text_to_video(run: Run) -> None:
    code, printed = run("unasked", "wan21", "plan", more=PICTURES, video="image_to_video = 0.5")
    assert code == 2
    assert printed.count("this model family takes no picture, but text alone.") == 2
