"""Conditions of a family in the caches: of which windows, of which frames, when again, and what a batch has of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from vtrain.contract import (
    ClipShape,
    ConditionEncoderSpec,
    ConditionSpec,
    DataError,
    DType,
    HashFile,
    PluginError,
    Size,
)
from vtrain.data.batches import Batches
from vtrain.data.caching.caches import Caches, fill_caches
from vtrain.data.caching.inventory import Stores, check_all_read, prunable, wanted
from vtrain.data.caching.pictures import fill_pictures, given, keys
from vtrain.data.decoding.decode import decode, unit_range
from vtrain.data.scanning.scan import picture_faults, scan
from vtrain.data.seeds import chance
from vtrain.plan.records import MasksPlan, ValidationPlan

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class Means:
    """An encoder of a family: each latent frame's mean colour over what it is given ("way", a number by latent frame), and the
    mean of all ("tint"). It counts what it is asked to do; change: what it does to its tensors in the end."""

    version: str = "1"
    opened: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    change: Change = dict

    def tensors(self, clip: ClipShape) -> Mapping[str, tuple[tuple[int, ...], DType]]:
        return {"way": ((3, (clip.frames - 1) // 4 + 1), "fp32"), "tint": ((3,), "bf16")}

    def fingerprint(self, hash_file: HashFile) -> str:
        return f"means {self.version}"

    @contextmanager
    def open(self, device: str) -> Iterator[Means]:
        self.opened.append("open")
        yield self
        self.opened.append("closed")

    def encode(self, pixels: Tensor, clip: ClipShape) -> Mapping[str, Tensor]:
        assert pixels.abs().max() <= 1
        self.shapes.append((*pixels.shape, *clip))
        means = pixels.mean((3, 4))
        frames = (clip.frames - 1) // 4 + 1
        way = means[:, :, ::4] if pixels.shape[2] == clip.frames else means.expand(-1, -1, frames)
        return self.change({"way": way.contiguous(), "tint": means.mean(2).bfloat16()})


@pytest.fixture
def means() -> Means:
    return Means()


def spec(means: Means, **members: Any) -> ConditionSpec:
    encoder = ConditionEncoderSpec(means.tensors, means.fingerprint, means.open)
    whole = {"source": "first_frame", "required": False, "clean_frames": 0, "encoder": encoder, **members}
    return ConditionSpec("picture", "the first picture", **whole)


@pytest.fixture
def three(setup, make_video, means):
    """Three clips; the family takes a picture that is encoded, at some draws."""
    for k, size in enumerate([(128, 64), (136, 64), (128, 72)]):
        setup.add(f"{k}.mp4", make_video(frames=27 + k, fps=24, size=size), f"caption number {k}")
    setup.family.taken = (spec(means),)
    return setup


def shared(setup, share: float = 0.5, **table: Any):
    return replace(setup.dataset(**table), image_to_video=share)


def fill(setup, *datasets, report=lambda _: None, **train):
    plan = setup.plan(*datasets, **train)
    return fill_caches(plan, scan(plan).samples, (), "cpu", report)


def batches_of(setup, filled, *datasets, **train) -> Batches:
    return Batches(setup.plan(*datasets, **train), filled.caches, filled.index)


def pixels_of(setup, sample, frames: tuple[int, ...] | None) -> Tensor:
    """As the encoder is to be given them: (1, 3, F, H, W)."""
    with setup.dataset().backend.open(sample.ref) as stream:
        own = sample if frames is None else sample.only(frames)
        return unit_range(decode(stream, own, sample.starts[0]))[None]


@pytest.mark.parametrize(("source", "count"), [("first_frame", 1), ("clip", 17)])
def test_an_entry_is_what_the_encoder_makes_of_the_windows_own_frames(three, means, source, count) -> None:
    three.family.taken = (spec(means, source=source),)
    filled = fill(three, shared(three))
    assert sorted(means.shapes) == [(1, 3, count, 64, 128, 17, 64, 128)] * 3
    stores = Stores(three.plan(shared(three)))
    for sample in scan(stores.plan).samples:
        (key,) = (stores.conditions["picture"].key(sample, start, sample.content) for start in sample.starts)
        found = filled.caches.condition_entries([key])
        frames = (0,) if source == "first_frame" else None
        wanted = Means().encode(pixels_of(three, sample, frames), sample.shape)
        assert found.keys() == {"way", "tint"}
        assert found["way"].dtype is torch.float32
        assert found["tint"].dtype is torch.bfloat16
        assert torch.equal(found["way"], wanted["way"])
        assert torch.equal(found["tint"], wanted["tint"])


def test_only_windows_whose_draws_may_have_it_are_encoded_and_the_model_is_opened_once(
    three, means, make_video
) -> None:
    other = three.root / "other"
    other.mkdir()
    (other / "d.mp4").write_bytes(make_video(frames=30))
    (other / "d.txt").write_text("a clip", encoding="utf-8")
    without = three.dataset("other", other)
    fill(three, three.dataset(), without)
    assert means.opened == []
    filled = fill(three, shared(three), without)
    assert means.opened == ["open", "closed"]
    assert len(means.shapes) == 3
    rows = filled.index.conditions["picture"]
    names = [filled.index.id(number) for number in range(len(filled.index))]
    assert {name: len(rows.keys(number)) for number, name in enumerate(names)} == {
        "clips/0.mp4": 1, "clips/1.mp4": 1, "clips/2.mp4": 1, "other/d.mp4": 0,
    }  # fmt: skip
    three.family.taken = (spec(means, required=True),)
    fill(three, three.dataset(), without)
    assert len(means.shapes) == 4, "a required one is made of every window"


def test_it_is_made_again_when_its_encoder_changes_and_latents_are_not(three, means) -> None:
    stages: list[tuple[str, int]] = []

    def made() -> tuple[int, int]:
        clips, conditions = three.family.clips, len(means.shapes)
        fill(three, shared(three), report=lambda now: stages.append((now.stage, now.made)))
        return three.family.clips - clips, len(means.shapes) - conditions

    assert made() == (3, 3)
    assert ("condition (picture)", 3) in stages
    assert made() == (0, 0)
    means.version = "2"
    assert made() == (0, 3)
    three.family.taken = (spec(means, source="clip"),)
    assert made() == (0, 3)
    means.version = "1"
    three.family.taken = (spec(means),)
    assert made() == (0, 0)


def test_what_no_run_uses_any_more_is_found(three, means) -> None:
    fill(three, shared(three))
    plan = three.plan(three.dataset())
    stores = Stores(three.plan(shared(three)))
    used = wanted(stores, scan(stores.plan).samples, ())
    check_all_read(used, "config.toml")
    assert len(used["condition"].keys) == 3
    assert not list(prunable(stores.condition, used["condition"]))
    unused = wanted(Stores(plan), scan(plan).samples, ())
    assert len(list(prunable(stores.condition, unused["condition"]))) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: {**made, "way": made["way"][:, :2]}, "way (1, 2, 5) of torch.float32 where (1, 3, 5) of fp32"),
        (lambda made: {**made, "tint": made["tint"].float()}, "tint (1, 3) of torch.float32 where (1, 3) of bf16"),
        (lambda made: {"way": made["way"]}, "no tint"),
        (lambda made: {**made, "more": made["tint"]}, "more, which is not declared"),
    ],
)
def test_other_tensors_than_promised_are_the_plugins_fault(three, means, change: Change, words: str) -> None:
    means.change = change
    with pytest.raises(PluginError) as caught:
        fill(three, shared(three))
    assert f"the encoder of the condition picture made {words}" in str(caught.value)
    assert "fault of the model family's plugin" in str(caught.value)


def test_numbers_that_are_not_finite_leave_the_clip_out(three, means) -> None:
    means.change = lambda made: {**made, "way": made["way"] * torch.inf}
    with pytest.raises(DataError, match=r"encodes to numbers of the condition \(picture\) that are not finite"):
        fill(three, shared(three))


def test_a_batch_has_each_draws_own_and_zeros_where_it_lacks_it(three, means) -> None:
    filled = fill(three, shared(three))
    batches = batches_of(three, filled, shared(three), batch_size=2)
    stores = Stores(three.plan(shared(three)))
    entries = {
        sample.id: filled.caches.condition_entries([stores.conditions["picture"].key(sample, 0.0, sample.content)])
        for sample in scan(stores.plan).samples
    }
    had = 0
    for number in range(40):
        batch = batches[number]
        assert batch.clean == (0, 0)
        assert batch.conditions["way"].shape == (2, 3, 5)
        assert batch.conditions["tint"].dtype is torch.bfloat16
        for row, (draw, name) in enumerate(zip(batch.draws, batch.sample_ids, strict=True)):
            has = chance(1, "image_to_video", draw) < 0.5
            had += has
            for tensor, found in batch.conditions.items():
                expected = entries[name][tensor][0]
                assert torch.equal(found[row], expected if has else torch.zeros_like(expected))
    assert 20 < had < 60


def test_a_required_one_is_in_every_draw_and_an_unused_one_is_zeros(three, means) -> None:
    filled = fill(three, three.dataset())
    for number in range(4):
        batch = batches_of(three, filled, three.dataset())[number]
        assert not batch.conditions["way"].any()
        assert batch.conditions["tint"].shape == (1, 3)
    three.family.taken = (spec(means, required=True),)
    filled = fill(three, three.dataset())
    for number in range(6):
        assert batches_of(three, filled, three.dataset())[number].conditions["way"].all()


def test_conditions_change_nothing_else_of_a_batch(three, means) -> None:
    def drawn() -> list[tuple[Any, ...]]:
        filled = fill(three, shared(three), caption_dropout=0.3)
        found = [batches_of(three, filled, shared(three), caption_dropout=0.3)[number] for number in range(8)]
        return [(each.draws, each.sample_ids, each.dropped, each.latents.mean.tolist()) for each in found]

    with_it = drawn()
    three.family.taken = ()
    assert drawn() == with_it


def test_an_image_is_given_nothing_that_is_not_required(three, means, make_video) -> None:
    """Of one latent frame nothing would be left to make."""
    stills = three.root / "stills"
    stills.mkdir()
    (stills / "a.mp4").write_bytes(make_video(frames=1))
    (stills / "a.txt").write_text("a still", encoding="utf-8")
    dataset = replace(three.dataset("stills", stills, frames=1), image_to_video=1.0)
    for required in (False, True):
        three.family.taken = (spec(means, required=required),)
        batch = batches_of(three, fill(three, dataset), dataset)[0]
        assert bool(batch.conditions["way"].any()) is required


@pytest.fixture
def half_masked(setup, make_video):
    """Two clips, one with a mask that is white in the first frame and black after it."""
    for name in ("masked", "plain"):
        setup.add(f"{name}.mp4", make_video(frames=27))
    masks = setup.folder / "masks"
    masks.mkdir()
    with av.open(str(masks / "masked.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(24))
        stream.width, stream.height, stream.pix_fmt = 128, 64, "gray"
        for number in range(27):
            picture = np.full((64, 128), 255 if number == 0 else 3, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")))
        container.mux(stream.encode(None))
    return replace(shared(setup, 1.0), masks=MasksPlan("masks", invert=False, missing="whole", where="config.toml:30"))


def test_a_clip_whose_mask_leaves_nothing_after_the_clean_frame_is_an_ordinary_draw(setup, means, half_masked) -> None:
    """Black as lossy compression leaves it (3 of 255): divided by its own area it would count as much as white."""
    first = ConditionSpec("first_frame", "the first frame", "first_frame", required=False, clean_frames=1)
    for taken in ((first,), (spec(means, clean_frames=1),)):
        setup.family.taken = taken
        batches = batches_of(setup, fill(setup, half_masked), half_masked, batch_size=2)
        for number in range(4):
            batch = batches[number]
            clean = dict(zip(batch.sample_ids, batch.clean, strict=True))
            assert clean == {"clips/masked.mp4": 0, "clips/plain.mp4": 1}
            if batch.conditions:
                lacking = batch.sample_ids.index("clips/masked.mp4")
                assert not batch.conditions["way"][lacking].any()
                assert batch.conditions["way"][1 - lacking].any()


def test_several_conditions_are_given_together_and_the_most_clean_frames_count(three, means) -> None:
    clip = ConditionSpec("start", "its start", "clip", required=False, clean_frames=2)
    three.family.taken = (spec(means, required=True), clip)
    filled = fill(three, shared(three))
    batches = batches_of(three, filled, shared(three))
    for number in range(20):
        batch = batches[number]
        assert batch.clean == (2 if chance(1, "image_to_video", batch.draws[0]) < 0.5 else 0,)
        assert batch.conditions["way"].all()


def pictured(setup, *files: Path, frames: int = 17):
    """The plan of a run whose videos of 128x64 start from these files."""
    made = ValidationPlan(
        prompts={file.stem: "a clip" for file in files}, negative_prompt="", shape=ClipShape(frames, 64, 128),
        size=Size(128, 64), fps=16.0, guidance=1.0, steps=2, seed=1, images={file.stem: file for file in files},
    )  # fmt: skip
    return replace(setup.plan(), validation=made)


def test_a_picture_is_given_as_a_clips_first_frame_is(three, means) -> None:
    """The same file as a clip of training and as validation's picture: the same numbers, whatever the run's share."""
    three.family.taken = (*three.family.taken, ConditionSpec("first", "the first frame", "first_frame", False, 1))
    file = three.folder / "0.mp4"
    plan = pictured(three, file)
    fill_pictures(plan, "cpu")
    caches = Caches.open(plan)
    found = given(plan, caches)["0"]
    (sample, *_) = scan(three.plan()).samples
    wanted = Means().encode(pixels_of(three, sample, (0,)), sample.shape)
    assert {name: tensor[0].tolist() for name, tensor in found.extras.items()} == {
        name: tensor[0].tolist() for name, tensor in wanted.items()
    }
    assert found.clean is not None
    assert found.clean.shape == (1, 3, 1, 8, 16)
    assert means.opened == ["open", "closed"]
    fill_pictures(plan, "cpu")
    assert means.opened == ["open", "closed"], "it is encoded once"
    assert {kind: len(own) for kind, own in keys(Stores(plan))["0"].items()} == {"video": 1, "condition": 1}


def test_a_condition_of_a_whole_clip_is_made_of_a_videos_first_frames(three, means) -> None:
    """And so are clean frames: two latent frames stand for five of the video's."""
    start = ConditionSpec("start", "its start", "clip", required=False, clean_frames=2)
    three.family.taken = (spec(means, source="clip"), start)
    plan = pictured(three, three.folder / "0.mp4")
    fill_pictures(plan, "cpu")
    found = given(plan, Caches.open(plan))["0"]
    assert means.shapes == [(1, 3, 17, 64, 128, 17, 64, 128)]
    assert found.extras["way"].shape == (1, 3, 5)
    (sample, *_) = scan(three.plan()).samples
    latents = fill(three).caches.latents(replace(sample, content=known(three, sample)), sample.starts[0]).mean
    assert found.clean is not None
    torch.testing.assert_close(found.clean, latents[:, :, :2])


def known(setup, sample) -> str:
    return Stores(setup.plan()).known_content(sample)


def test_a_picture_where_a_clip_is_needed_is_a_problem_of_its_line(three, means, make_video) -> None:
    three.family.taken = (spec(means, source="clip"),)
    still, short = three.root / "still.mp4", three.root / "short.mp4"
    still.write_bytes(make_video(frames=1))
    short.write_bytes(make_video(frames=12, fps=24))
    plan = pictured(three, still, short, three.folder / "0.mp4")
    first, second = (problem.what for problem in picture_faults(plan))
    assert first.endswith("still.mp4: it is one picture, and the first picture is made of 17 frames at 16 fps.")
    assert second.endswith("short.mp4: it is 0.5 s, and the first picture is made of 17 frames at 16 fps.")
    three.family.taken = (spec(means),)
    assert not list(picture_faults(pictured(three, still, short)))


def test_a_damaged_entry_names_its_clip(three, means) -> None:
    filled = fill(three, shared(three, 1.0))
    for path in (three.cache / "condition").rglob("*.safetensors"):
        _truncate(path)
    with pytest.raises(DataError, match=r"It was read for clips/\d\.mp4"):
        batches_of(three, filled, shared(three, 1.0))[0]
    again = len(means.shapes)
    fill(three, shared(three, 1.0))
    assert len(means.shapes) == again + 3


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
