"""Whole runs of a family that is given a picture which it encodes (`toy-pictures`): cached, trained, resumed, generated from."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vtrain.contract import ClipShape, RunLength
from vtrain.data.caching.pictures import absent
from vtrain.train.loop import Loop
from vtrain.train.step import Step

Run = Callable[..., subprocess.CompletedProcess[str]]

VALIDATION = """
[validation]
every = "{every} steps"
frames = 9
size = "64x64"
steps = 3
guidance = 3.0
seed = 11
prompts = {{ one = "a grey hill", two = "a green hill" }}
images = {{ {images} }}
"""
BOTH = 'one = "one.png", two = "two.png"'
COLOURS = '\n[[regularizer]]\nuse = "toy-colours"\nblock = 1\nteacher = "{teacher}"\n'
HALF = "\n[data.video]\nimage_to_video = 0.5\n"


@pytest.fixture
def own(folder: Any, toy_clips: Path) -> Any:
    """A folder with clips and a cache of its own, and two pictures."""
    (folder.path / "clips").unlink()
    shutil.copytree(toy_clips / "clips", folder.path / "clips")
    for name, colour in (("one", (200, 30, 90)), ("two", (10, 220, 60))):
        Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(folder.path / f"{name}.png")
        picture = Image.blend(Image.open(folder.path / f"{name}.png"), Image.new("RGB", (64, 64), colour), 0.5)
        picture.save(folder.path / f"{name}.png")
    return type(folder)(folder.path, folder.path / "cache")


def write(folder: Any, more: str = "", model: str = "", **values: Any) -> Path:
    config: Path = folder.write(more, **{"steps": 4, "log_every": 1, "save": 4} | values)
    text = config.read_text(encoding="utf-8").replace('use = "toy"\n', f'use = "toy-pictures"\n{model}')
    config.write_text(text, encoding="utf-8")
    return config


def status(within: Run, config: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(within("cache", "status", config, "--json").stdout)
    return found


def test_the_plan_tells_what_is_given_and_what_it_takes_on_disk(own: Any, within: Run) -> None:
    """A window's entry: 13 numbers of 4 bytes at each of 3 x 8 x 8 latents (8 x 12 in the other bucket), 12 of 2 bytes beside."""
    printed = within("plan", write(own, VALIDATION.format(every=4, images=BOTH))).stdout
    assert re.search("given +at every draw: the first picture", printed)
    kib = (3 * (13 * 3 * 8 * 8 * 4 + 24) + 2 * (13 * 3 * 8 * 12 * 4 + 24)) / 1024
    assert f"5 clips, {kib:.1f} KiB: picture 13x3x8x12 fp32, colours 4x3 bf16" in printed
    assert re.search("encoder of picture +no: what it makes is cached", printed)
    found = json.loads(within("plan", write(own), "--json").stdout)
    assert found["cache_bytes"]["condition"] == {"picture": int(kib * 1024)}
    printed = within("plan", write(own, HALF, model="always = false\n")).stdout
    assert "50% of draws are given the first picture" in printed


def test_status_prune_verify_and_data_show_know_conditions(own: Any, within: Run) -> None:
    """Of five windows, and of two pictures."""
    config = write(own, VALIDATION.format(every=4, images=BOTH))
    filled = within("cache", "fill", config).stdout
    assert "condition (picture): 0 of 5 cached, 5 to do" in filled
    found = status(within, config)
    assert (found["condition"]["wanted"], found["condition"]["present"]["count"]) == (7, 7)
    assert (found["video"]["wanted"], found["video"]["present"]["count"]) == (5, 5), (
        "no frame of a picture is given clean"
    )
    assert "7 condition entries read" in within("cache", "verify", config).stdout
    assert "no entry is unused" in within("cache", "prune", config, "--yes").stdout
    (window,) = json.loads(within("data", "show", config, "clip_0.mp4", "--json").stdout)["video"]
    assert window["conditions"]["picture"]["state"] == "sound"
    shown = within("data", "show", config, "clip_0.mp4", "--no-sheet").stdout
    assert re.search("picture +given to the model at every draw", shown)
    assert f"window 1, picture  {window['conditions']['picture']['key']}  sound" in shown
    save_file({"palette": torch.eye(3).flip(0).contiguous()}, own.path / "palette.safetensors")
    other = write(own, VALIDATION.format(every=4, images=BOTH), model='palette = "palette.safetensors"\n')
    found = status(within, other)
    assert (found["condition"]["missing"], found["condition"]["stale"]["count"]) == (7, 7)
    assert found["video"]["missing"] == 0
    assert "deleted 7 files" in within("cache", "prune", other, "--yes").stdout


@pytest.mark.parametrize("teacher", ["cached", "source"])
def test_a_resumed_run_is_the_same_run_beside_a_regularizer(
    own: Any, within: Run, another: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    """Half of the draws have the picture. A copy made in the middle of step 8 is what a kill would leave."""
    values = {"train": "lora", "steps": 12, "save": 5, "accumulate": 2, "log_every": 4}
    more, model = HALF + COLOURS.format(teacher=teacher), "always = false\n"
    straight, real = another(), Loop.norm

    def copied(self: Loop, number: int) -> Tensor | None:
        if number == 7 and not own.output.exists():
            shutil.copytree(straight.output, own.output)
        return real(self, number)

    monkeypatch.setattr(Loop, "norm", copied)
    within("run", write(straight, more, model, **values))
    assert [path.name for path in (own.output / "checkpoints").iterdir()] == ["step-000005"]
    assert "resuming from" in within("run", write(own, more, model, **values)).stdout
    assert own.rows() == straight.rows()
    assert all("toy-colours/colours" in row["terms"] for row in own.rows())
    got: dict[str, Tensor] = own.tensors(12)
    for name, value in straight.tensors(12).items():
        assert torch.equal(value, got[name]), name
    assert all(isinstance(sigma, float) for row in own.rows() for sigma in row["sigmas"]), "no frame is clean"


@pytest.fixture
def pictured() -> Any:
    from vtrain_toy.pictures import TOY_PICTURES

    return TOY_PICTURES.build(TOY_PICTURES.options())


def test_a_draw_without_a_picture_trains_nothing_of_what_reads_it(pictured: Any, given: Any, sampler: Any) -> None:
    """Zeros have no gradient in the weights that they are multiplied with."""
    step = Step(pictured.load_denoiser("cpu", "fp32"), sampler, {}, RunLength(10, 1.0))
    plain, clip = given(2), ClipShape(9, 64, 96)
    with pictured.conditions()[0].encoder.open("cpu") as encoder:
        pixels = torch.rand(2, 3, 1, 64, 96, generator=torch.Generator().manual_seed(3)) * 2 - 1
        made = encoder.encode(pixels, clip)
    for extras, moves in ((absent(pictured.conditions(), clip, 2), False), (made, True)):
        step.zero_grad()
        step(replace(plain, condition=replace(plain.condition, extras=extras))).loss.backward()
        for weight in (step.denoiser_module.picture_in.weight, step.denoiser_module.colours_in.weight):
            assert bool(weight.grad.any()) is moves


def test_videos_are_generated_from_their_pictures_with_guidance(own: Any, within: Run) -> None:
    config = write(
        own, VALIDATION.format(every=2, images=BOTH).replace("[validation]", "[validation]\nat_start = true")
    )
    within("run", config)
    samples = own.output / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["step-000000", "step-000002", "step-000004"]
    first = {path.name: path.read_bytes() for path in (samples / "step-000000").glob("*.mp4")}
    assert sorted(first) == ["one.mp4", "two.mp4"]
    shutil.rmtree(own.output)
    swapped = VALIDATION.format(every=2, images='one = "two.png", two = "one.png"')
    within("run", write(own, swapped.replace("[validation]", "[validation]\nat_start = true")))
    other = {path.name: path.read_bytes() for path in (samples / "step-000000").glob("*.mp4")}
    assert other["one.mp4"] != first["one.mp4"], "the picture changes nothing"


def test_a_prompt_without_a_picture_is_given_zeros_where_it_may_lack_it(own: Any, within: Run) -> None:
    """The same as where no prompt has one."""
    start = "[validation]\nat_start = true"
    made = []
    for images in ('one = "one.png"', ""):
        more = VALIDATION.format(every=4, images=images).replace("[validation]", start)
        within("run", write(own, more, "always = false\n", steps=1, save=1))
        made.append({path.name: path.read_bytes() for path in (own.output / "samples" / "step-000000").glob("*.mp4")})
        shutil.rmtree(own.output)
    assert made[0]["two.mp4"] == made[1]["two.mp4"]
    assert made[0]["one.mp4"] != made[1]["one.mp4"]


def test_fingerprints_are_recorded_and_another_encoder_is_told_at_a_resume(own: Any, within: Run) -> None:
    save_file({"palette": torch.eye(3)}, own.path / "palette.safetensors")
    model = 'palette = "palette.safetensors"\n'
    within("run", write(own, model=model))
    mark = json.loads((own.output / "plan.json").read_text(encoding="utf-8"))["fingerprints"]["condition (picture)"]
    save_file({"palette": torch.eye(3).flip(0).contiguous()}, own.path / "palette.safetensors")
    printed = within("run", write(own, model=model, steps=6))
    words = "the encoder of the condition (picture), or an option that shapes it, changed since the checkpoint"
    assert words in printed.stdout + printed.stderr
    changed = json.loads((own.output / "plan.json").read_text(encoding="utf-8"))["fingerprints"]["condition (picture)"]
    assert changed != mark


@pytest.mark.parametrize(
    ("more", "model", "words"),
    [
        (HALF, "", "image_to_video = 0.5: this model family cannot do without the first picture, at any draw."),
        (
            VALIDATION.format(every=4, images='one = "one.png"'),
            "",
            'prompts: "two" has no picture, and this model family',
        ),
        ("", 'palette = "nowhere"\n', "the encoder of the condition picture: "),
        ("\n[data.video]\nframes = 1\n", "", "clips of 1 frame are one latent frame, with nothing to make after it"),
    ],
)
def test_bad_input_is_refused_with_its_line(own: Any, within: Run, more: str, model: str, words: str) -> None:
    done = within("plan", write(own, more, model), check=2)
    printed = " ".join((done.stdout + done.stderr).split())
    assert words in printed
    assert "config.toml:" in printed
