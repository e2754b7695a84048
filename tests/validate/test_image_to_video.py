"""Validation from a picture: diffusers' own pipeline, the way of a picture to its latents, the cache, the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vtrain.cli.app import app
from vtrain.config import load
from vtrain.contract import ClipShape, Condition, DataError, Device, NoiseLevel, Text
from vtrain.data.caching.caches import Caches, fill_caches
from vtrain.data.caching.inventory import Stores
from vtrain.data.caching.pictures import Given, fill_pictures, given, keys
from vtrain.data.decoding.decode import decode
from vtrain.data.scanning.scan import pictures
from vtrain.data.scanning.surveys import DatasetSurvey
from vtrain.estimate.pictures import price_rows
from vtrain.plan.make import make_plan
from vtrain.plan.records import Plan
from vtrain.registry import discover
from vtrain.run.prepare import extra_texts, planned, prepare
from vtrain.validate.generate import Validator, after, guided

TOLERANCE = 1e-4
"""Largest difference of latents, whose values are about 1, after six solver steps in fp32 with guidance 5."""

Write = Callable[..., Path]


def drawing(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A smooth picture, (h, w, 3)."""
    coarse = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
    return (smooth[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()


def write_video(path: Path, frames: list[np.ndarray]) -> Path:
    """Lossless, as RGB."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(8))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def with_images(tmp_path: Path, write_config: Write) -> Callable[..., Path]:
    """config.toml with [validation.images]; `rabbit` has a prompt, and so has `boat`."""

    def write(more: tuple[str, str] = ("", ""), **images: str) -> Path:
        path = write_config()
        text = path.read_text(encoding="utf-8").replace("prompts = {", 'prompts = { boat = "A sailing boat",')
        listed = "".join(f'{name} = "{file}"\n' for name, file in images.items())
        path.write_text(text.replace(*more) + f"[validation.images]\n{listed}", encoding="utf-8")
        return path

    return write


@pytest.fixture
def planned_from(tmp_path: Path, with_images: Callable[..., Path]) -> Callable[..., Plan]:
    """The plan of a run whose `rabbit` starts from a picture, an array or a file."""

    def make(picture: np.ndarray | Path, more: tuple[str, str] = ("", "")) -> Plan:
        if not isinstance(picture, Path):
            Image.fromarray(picture).save(tmp_path / "picture.png")
            picture = tmp_path / "picture.png"
        return make_plan(load(with_images(more, rabbit=picture.name), discover()))

    return make


def validator(plan: Plan) -> Validator:
    assert plan.validation is not None
    fill_caches(plan, (), extra_texts(plan), "cpu", lambda _: None)
    fill_pictures(plan, "cpu")
    caches, denoiser = Caches.open(plan), plan.family.load_denoiser("cpu", "fp32")
    here, autocast = Device(), nullcontext
    own = given(plan, caches)
    return Validator(plan.validation, plan.family, plan.sampler, caches, denoiser, here, autocast, lambda: False, own)


def first_frame(pictured: Given) -> torch.Tensor:
    """Of the video, (1, C, 1, h, w)."""
    assert pictured.clean is not None
    assert not pictured.extras
    return pictured.clean


@pytest.fixture(scope="session")
def euler(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The tiny checkpoint with the scheduler that SanaImageToVideoPipeline names."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("euler") / "tiny"))
    shutil.rmtree(folder / "scheduler")
    FlowMatchEulerDiscreteScheduler(shift=8.0).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def test_latents_and_frames_equal_the_image_to_video_pipelines(
    planned_from: Callable[..., Plan],
    tiny: Path,
    euler: Path,
    generated: Callable[..., Any],
    decoded: Callable[..., Any],
) -> None:
    """The picture has the video's size: the pipeline would squeeze another one, where vtrain cuts it."""
    from diffusers import SanaImageToVideoPipeline

    picture = drawing(64, 32)
    plan = planned_from(picture, more=(tiny.as_posix(), euler.as_posix()))
    assert plan.validation is not None
    prompt, ours_from = plan.validation.prompts["rabbit"], validator(plan)
    ours = ours_from.latents(prompt, given=ours_from.pictures["rabbit"])
    pipeline = SanaImageToVideoPipeline.from_pretrained(euler, torch_dtype=torch.float32)
    theirs, frames = generated(pipeline, plan, image=Image.fromarray(picture))
    assert theirs.std() > 0.1
    assert (ours - theirs)[:, :, :1].abs().max() < 1e-5, "the picture's own latents"
    assert (ours - theirs).abs().max() < TOLERANCE
    assert (ours - ours_from.latents(prompt))[:, :, 1:].abs().max() > 100 * TOLERANCE
    assert (decoded(plan, ours) - frames).abs().max() <= 1


class Hundreds:
    """A family for which a clean frame has timestep 7."""

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return 7 + 100 * sigma


FAMILY: Any = Hundreds()


def test_the_model_is_given_all_frames_with_level_0_at_the_first() -> None:
    first, noisy = torch.ones(2, 3, 1, 2, 2), torch.zeros(2, 3, 4, 2, 2)
    seen: list[tuple[torch.Tensor, NoiseLevel]] = []

    def predict(whole: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        seen.append((whole, level))
        return torch.arange(5.0)[None, None, :, None, None].expand_as(whole)

    following = after(FAMILY, first, predict)
    predicted = following(noisy, NoiseLevel(torch.tensor([0.5, 0.25]), torch.tensor([500.0, 250.0])))
    assert predicted.shape == noisy.shape
    assert predicted[0, 0, :, 0, 0].tolist() == [1, 2, 3, 4]
    whole, level = seen[0]
    assert whole[0, 0, :, 0, 0].tolist() == [1, 0, 0, 0, 0]
    assert level.sigma.tolist() == [[0, 0.5, 0.5, 0.5, 0.5], [0, 0.25, 0.25, 0.25, 0.25]]
    assert level.timestep.tolist() == [[7, 500, 500, 500, 500], [7, 250, 250, 250, 250]]
    each = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2)
    following(noisy, NoiseLevel(each))
    assert seen[1][1].sigma[0].tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert seen[1][1].timestep[0].tolist() == pytest.approx([7, 17, 27, 37, 47])


def test_several_clean_frames_stay_before_those_that_are_solved() -> None:
    first, noisy = torch.ones(1, 3, 2, 2, 2), torch.zeros(1, 3, 3, 2, 2)
    seen: list[NoiseLevel] = []

    def predict(whole: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        assert whole[0, 0, :, 0, 0].tolist() == [1, 1, 0, 0, 0]
        seen.append(level)
        return torch.arange(5.0)[None, None, :, None, None].expand_as(whole)

    predicted = after(FAMILY, first, predict)(noisy, NoiseLevel(torch.tensor([0.5]), torch.tensor([500.0])))
    assert predicted[0, 0, :, 0, 0].tolist() == [2, 3, 4]
    assert seen[0].sigma.tolist() == [[0, 0, 0.5, 0.5, 0.5]]
    assert seen[0].timestep.tolist() == [[7, 7, 500, 500, 500]]


def test_both_sides_of_guidance_are_given_the_same_conditions() -> None:
    seen: list[Condition] = []

    class Seeing:
        def predict(self, noisy: torch.Tensor, level: NoiseLevel, condition: Condition) -> torch.Tensor:
            seen.append(condition)
            return noisy

    two, four = (Text.of(torch.rand(count, 5, 4), torch.ones(count, 5, dtype=torch.bool)) for count in (2, 4))
    extras = {"picture": torch.rand(2, 3), "way": torch.rand(2, 3, 4, 4)}
    denoiser: Any = Seeing()
    noisy, level = torch.rand(2, 3, 2, 2, 2), NoiseLevel(torch.tensor([0.5, 0.5]), torch.tensor([500.0, 500.0]))
    guided(denoiser, Condition(two, extras), 1.0)(noisy, level)
    guided(denoiser, Condition(four, extras), 3.0)(noisy, level)
    plain, both = seen
    assert plain.extras is extras
    assert both.text is four
    for name, tensor in extras.items():
        assert torch.equal(both.extras[name], torch.cat([tensor, tensor]))


def test_the_first_frame_stays_clean_and_other_prompts_are_as_without_pictures(
    planned_from: Callable[..., Plan], tmp_path: Path
) -> None:
    made = validator(planned_from(drawing(64, 32)))
    (name,) = made.pictures
    assert name == "rabbit"
    clean = made.latents(made.plan.prompts["rabbit"], given=made.pictures["rabbit"])
    assert torch.equal(clean[:, :, :1], first_frame(made.pictures["rabbit"]))
    plain = replace(made, pictures={})
    for together in (1, 2):
        files = made.videos(tmp_path / f"with-{together}", ["rabbit", "boat"], together)
        assert list(files) == ["rabbit", "boat"]
        without = plain.videos(tmp_path / f"without-{together}", ["rabbit", "boat"])
        assert files["boat"].read_bytes() == without["boat"].read_bytes()
        assert files["rabbit"].read_bytes() != without["rabbit"].read_bytes()


@pytest.mark.parametrize(
    ("size", "cut"), [((200, 64), (36, 0, 164, 64)), ((64, 100), (0, 34, 64, 66)), ((32, 16), None)]
)
def test_a_picture_is_cut_at_its_centre_and_resampled_once(
    planned_from: Callable[..., Plan], size: tuple[int, int], cut: tuple[int, int, int, int] | None
) -> None:
    """As PIL's antialiased bilinear filter has it, to one of 255 levels; a small one is enlarged."""
    picture = drawing(*size)
    (sample,) = pictures(planned_from(picture)).values()
    with Path(sample.ref_id).open("rb") as stream:
        ours = decode(stream, sample.only((0,)), 0.0)[:, 0].permute(1, 2, 0).numpy()
    wanted = Image.fromarray(picture).crop(cut).resize((64, 32), Image.Resampling.BILINEAR)
    assert np.abs(ours.astype(int) - np.asarray(wanted).astype(int)).max() <= 1


def test_of_a_video_the_first_frame_is_taken(planned_from: Callable[..., Plan], tmp_path: Path) -> None:
    frames = [drawing(64, 32, seed) for seed in range(3)]
    still = planned_from(frames[0])
    fill_pictures(still, "cpu")
    wanted = first_frame(given(still, Caches.open(still))["rabbit"])
    moving = planned_from(write_video(tmp_path / "clip.mkv", frames))
    fill_pictures(moving, "cpu")
    assert torch.equal(first_frame(given(moving, Caches.open(moving))["rabbit"]), wanted)


class Counting:
    """A family that counts how often its codec is opened."""

    def __init__(self, family: Any) -> None:
        self.family, self.opened = family, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def open_video_codec(self, device: str) -> Any:
        self.opened += 1
        return self.family.open_video_codec(device)


def test_a_picture_is_encoded_once_and_again_when_its_file_or_the_size_changes(
    planned_from: Callable[..., Plan],
) -> None:
    family = Counting(None)

    def fill(picture: np.ndarray, more: tuple[str, str] = ("", "")) -> int:
        plan = planned_from(picture, more)
        family.family = plan.family
        fill_pictures(replace(plan, family=family), "cpu")  # type: ignore[arg-type]
        return family.opened

    assert fill(drawing(64, 32)) == 1
    assert fill(drawing(64, 32)) == 1
    assert fill(drawing(64, 32, seed=1)) == 2
    assert fill(drawing(64, 32, seed=1), ('size = "64x32"', 'size = "32x64"')) == 3
    assert fill(drawing(64, 32, seed=1), ('size = "64x32"', 'size = "32x64"')) == 3
    assert fill(drawing(64, 32)) == 3


def test_an_entry_beside_latents_that_are_drawn_anew_has_its_mean(planned_from: Callable[..., Plan]) -> None:
    mode = planned_from(drawing(64, 32))
    fill_pictures(mode, "cpu")
    wanted = first_frame(given(mode, Caches.open(mode))["rabbit"])
    drawn = planned_from(drawing(64, 32), ("[train]", '[cache]\nlatents = "sample"\n[train]'))
    fill_pictures(drawn, "cpu")
    assert torch.equal(first_frame(given(drawn, Caches.open(drawn))["rabbit"]), wanted)


def test_a_picture_that_goes_before_it_is_encoded_is_an_error_of_its_file(planned_from: Callable[..., Plan]) -> None:
    plan = planned_from(drawing(64, 32))
    (sample,) = pictures(plan).values()
    Path(sample.ref_id).unlink()
    with pytest.raises(DataError, match=r"picture\.png: cannot be read: No such file"):
        fill_pictures(plan, "cpu")


def test_a_file_without_a_picture_is_a_problem_of_its_line_found_before_anything_heavy(
    tmp_path: Path, with_images: Callable[..., Path]
) -> None:
    (tmp_path / "notes.png").write_text("no picture", encoding="utf-8")
    (tmp_path / "half.png").write_bytes(b"")
    path = with_images(rabbit="notes.png", boat="half.png")
    lines = path.read_text(encoding="utf-8").splitlines()
    planned(path)  # opens no file
    with pytest.raises(DataError) as caught:
        prepare(path)
    places = {problem.where.partition("config.toml:")[2]: problem for problem in caught.value.problems}
    notes = places[str(lines.index('rabbit = "notes.png"') + 1)]
    assert notes.what.startswith(f"{tmp_path / 'notes.png'}: cannot be read as a video: ")
    assert notes.remedy == "Give an image or a video that can be played."
    assert str(lines.index('boat = "half.png"') + 1) in places
    assert len(places) == 2


def test_the_cache_command_knows_pictures(planned_from: Callable[..., Plan], tmp_path: Path) -> None:
    plan = planned_from(drawing(64, 32))
    fill_pictures(plan, "cpu")
    (ours,) = keys(Stores(plan))["rabbit"]["video"]
    (status,) = [
        json.loads(CliRunner().invoke(app, ["cache", "status", str(tmp_path / "config.toml"), "--json"]).output)
    ]
    assert status["video"]["present"]["count"] == 1
    assert status["video"]["stale"]["count"] == 0
    (tmp_path / "picture.png").unlink()
    Image.fromarray(drawing(64, 32, seed=3)).save(tmp_path / "picture.png")
    status = json.loads(CliRunner().invoke(app, ["cache", "status", str(tmp_path / "config.toml"), "--json"]).output)
    assert status["video"]["present"]["count"] == 0
    assert status["video"]["stale"]["count"] == 1
    assert keys(Stores(plan)) != {"rabbit": {"video": [ours]}}


def test_the_plan_prices_levels_at_each_token(write_config: Write) -> None:
    """Clips of 64x32@5 are 2x2x4 tokens; the longest has 15 beside the first. Bytes as its plugin's own test counts them."""
    path = write_config()
    text = path.read_text(encoding="utf-8").replace("fps = 8", "fps = 8\nimage_to_video = 0.25")
    path.write_text(text.replace("[train]", "[train]\nbatch_size = 2"), encoding="utf-8")
    plan = make_plan(load(path, discover()))
    more = 15 * 4 * (256 + 4 * 96 + 8 * 96 + 6 * 96 + 96)
    words = f"25% of draws start from a clean first frame; a batch with one takes up to {2 * more / 1024:.1f} KiB more"
    found = DatasetSurvey("clips", 1, {ClipShape(5, 32, 64): 1}, {}, 0)
    assert list(price_rows(plan, plan.datasets[0], found)) == [
        ("image to video", f"{words}, for a level at each token")
    ]


def test_a_run_generates_from_its_picture(
    planned_from: Callable[..., Plan], tmp_path: Path, run_here: Callable[[Path], None]
) -> None:
    """What `vtrain run` writes before its first step is what the model of the folder makes."""
    trained = ("fps = 8", "fps = 8\nimage_to_video = 1.0")
    plan = planned_from(drawing(64, 32), trained)
    config = tmp_path / "config.toml"
    text = config.read_text(encoding="utf-8").replace('every = "100 steps"', 'every = "100 steps"\nat_start = true')
    config.write_text(text, encoding="utf-8")
    run_here(config)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [[len(sigma), sigma[0]] for row in rows for sigma in row["sigmas"]] == [[2, 0.0]] * 2
    ours = validator(plan).videos(tmp_path / "ours", ["rabbit", "boat"])
    for name, file in ours.items():
        assert (tmp_path / "out" / "samples" / "step-000000" / f"{name}.mp4").read_bytes() == file.read_bytes(), name
