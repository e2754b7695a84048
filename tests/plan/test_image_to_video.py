"""What a plan refuses of image-to-video, and what it says of its price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vtrain.contract import (
    ClipShape,
    ConditionEncoderSpec,
    ConditionSpec,
    ConfigError,
    FrameRule,
    PluginError,
    Problem,
    Size,
)
from vtrain.data.scanning.surveys import DatasetSurvey
from vtrain.estimate.pictures import picture_rows, price_rows
from vtrain.plan.conditions import check_declared, encoder_problems, picture_problems, training_problems
from vtrain.plan.records import Plan

PlanOf = Callable[..., Plan]
DATA = 'use = "folder"\npath = "clips"\n[data.video]\nimage_to_video = 0.3\n'
VALIDATION = 'every = "5 steps"\nprompts = { rabbit = "a rabbit", city = "a city" }\n'


def refused(plan_of: PlanOf, **tables: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan_of(**tables)
    return [str(problem) for problem in caught.value.problems]


def test_the_share_is_the_datasets_and_0_where_the_file_says_nothing(plan_of: PlanOf) -> None:
    assert plan_of(data=DATA).datasets[0].image_to_video == 0.3
    assert plan_of().datasets[0].image_to_video == 0


@pytest.mark.parametrize("share", ["-0.1", "1.5", '"half"'])
def test_a_share_is_a_number_from_0_to_1(plan_of: PlanOf, share: str) -> None:
    (problem,) = refused(plan_of, data=DATA.replace("0.3", share))
    assert "config.toml:10: " in problem
    assert "image_to_video" in problem


def test_clips_of_one_latent_frame_have_nothing_to_make_after_it(plan_of: PlanOf) -> None:
    (problem,) = refused(plan_of, data=DATA + "frames = 1\n")
    assert "config.toml:10: image_to_video = 0.3: clips of 1 frame are one latent frame" in problem
    assert problem.endswith("Set frames to 5 or more, or remove it.")
    assert plan_of(data=DATA + "frames = 5\nmin_frames = 1\n").datasets[0].image_to_video == 0.3


def test_a_dataset_that_is_left_out_is_not_asked(plan_of: PlanOf) -> None:
    off = '[[data]]\nuse = "folder"\npath = "more"\nenabled = false\n[data.video]\nframes = 1\nimage_to_video = 0.5'
    assert len(plan_of(data=DATA, more=off).datasets) == 1


class Family:
    """What the checks ask of a family."""

    frame_rule = FrameRule(4, 1)
    default_frames, default_size = 9, Size(64, 64)

    def __init__(self, *conditions: ConditionSpec) -> None:
        self._conditions = conditions

    def conditions(self) -> tuple[ConditionSpec, ...]:
        return self._conditions

    def pixel_frames(self, latent_frame: int) -> range:
        return range(max(0, 4 * latent_frame - 3), 4 * latent_frame + 1)


class ByFrame(Family):
    """Its denoiser takes a level for each latent frame."""

    frame_levels = True


def condition(**members: Any) -> ConditionSpec:
    """The first frame, clean, unless something else is said."""
    first = ConditionSpec("first_frame", "the first frame", "first_frame", required=False, clean_frames=1)
    return replace(first, **members)


def encoder(name: str = "picture", *problems: Problem) -> ConditionEncoderSpec:
    def nothing(device: str) -> Any:
        raise AssertionError("it is opened")

    return ConditionEncoderSpec(lambda clip: {name: ((3,), "fp32")}, lambda hash_file: "", nothing, lambda: problems)


def test_a_family_that_takes_text_alone_is_given_no_picture(plan_of: PlanOf) -> None:
    plan = plan_of(data=DATA, validation=VALIDATION + 'images = { city = "config.toml" }')
    family: Any = Family()
    (training,) = training_problems(plan.config, family, plan.datasets)
    assert training.where.endswith("config.toml:10")
    assert training.what == "image_to_video = 0.3: this model family takes no picture, but text alone."
    (generating,) = picture_problems(plan.config, family, 9)
    assert generating.where.endswith("config.toml:20")
    assert generating.what.startswith("images: this model family takes no picture")


def test_a_family_whose_first_latent_frame_is_no_single_picture_is_refused(plan_of: PlanOf) -> None:
    class Pairs(ByFrame):
        frame_rule = FrameRule(2, 0)

        def pixel_frames(self, latent_frame: int) -> range:
            return range(2 * latent_frame, 2 * latent_frame + 2)

    family: Any = Pairs(condition())
    plan = plan_of(data=DATA, validation=VALIDATION + 'images = { city = "config.toml" }')
    (problem,) = picture_problems(plan.config, family, 8)
    assert "the first latent frame of this model family stands for 2 frames, not for a single picture" in problem.what


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        (ByFrame(condition(), condition()), 'two of its conditions are called "first_frame"'),
        (ByFrame(condition(encoder=encoder()), condition(name="other", encoder=encoder())), 'called "picture"'),
        (Family(condition()), "its denoiser takes one noise level for a whole clip (it is no SupportsFrameLevels)"),
        (ByFrame(condition(clean_frames=2)), "gives 2 clean latent frames of a single picture"),
        (ByFrame(condition(clean_frames=0)), "gives the denoiser nothing: no clean frame, and no encoder"),
        (ByFrame(condition(clean_frames=-1, encoder=encoder())), "gives -1 clean frames"),
        (ByFrame(condition(source="first-frame")), 'made of "first-frame", and there is "clip", "first_frame"'),
    ],
)
def test_conditions_that_contradict_themselves_are_the_plugins_fault(family: Any, fault: str) -> None:
    with pytest.raises(PluginError) as caught:
        check_declared(family)
    assert fault in str(caught.value)
    assert "This is a fault of the model family's plugin." in str(caught.value)


def test_several_clean_frames_are_those_of_a_clip(plan_of: PlanOf) -> None:
    """Two latent frames stand for five; of clips of five nothing would be left."""
    family: Any = ByFrame(condition(source="clip", clean_frames=2))
    check_declared(family)
    plan = plan_of(data=DATA + "frames = 5\n", validation=VALIDATION + 'images = { city = "config.toml" }')
    (training,) = training_problems(plan.config, family, plan.datasets)
    assert training.what == "image_to_video = 0.3: clips of 5 frames are too short, with nothing to make after it."
    assert training.remedy == "Set frames to 9 or more, or remove it."
    (generating,) = picture_problems(plan.config, family, 5)
    assert generating.what == "images: a video of 5 frames is too short, with nothing to make after the picture."
    assert not list(picture_problems(plan.config, family, 9))


def test_clips_too_short_for_one_condition_name_that_one(plan_of: PlanOf) -> None:
    """The required one would do with them."""
    needed = condition(name="mask", summary="a mask", source="clip", required=True, clean_frames=0, encoder=encoder())
    family: Any = ByFrame(needed, condition(source="clip", clean_frames=2))
    plan = plan_of(data=DATA + "frames = 5\n")
    (problem,) = training_problems(plan.config, family, plan.datasets)
    assert problem.what == "image_to_video = 0.3: clips of 5 frames are too short, with nothing to make after it."


def test_a_share_below_1_of_what_the_family_cannot_do_without_is_refused(plan_of: PlanOf) -> None:
    plan = plan_of(data=DATA)
    family: Any = Family(condition(required=True, clean_frames=0, encoder=encoder()))
    (problem,) = training_problems(plan.config, family, plan.datasets)
    assert problem.where.endswith("config.toml:10")
    assert problem.what == "image_to_video = 0.3: this model family cannot do without the first frame, at any draw."
    assert not list(training_problems(plan.config, Family(condition(), *family.conditions()), plan.datasets))  # type: ignore[arg-type]


def test_a_prompt_without_the_picture_that_it_needs_is_refused_on_its_line(plan_of: PlanOf) -> None:
    plan = plan_of(validation=VALIDATION + 'images = { city = "config.toml" }')
    family: Any = Family(condition(required=True, clean_frames=0, encoder=encoder()))
    (problem,) = picture_problems(plan.config, family, 9)
    assert "config.toml:" in problem.where
    assert problem.what == 'prompts: "rabbit" has no picture, and this model family cannot do without the first frame.'
    assert problem.remedy == 'Add it to [validation.images], for example: rabbit = "picture.png"'


def test_clips_too_short_for_what_is_always_given_are_refused(plan_of: PlanOf) -> None:
    encoded: Any = Family(condition(required=True, clean_frames=0, encoder=encoder()))
    clean: Any = ByFrame(condition(required=True))
    plain = DATA.replace("image_to_video = 0.3\n", "")
    short, mixed = plan_of(data=plain + "frames = 1\n"), plan_of(data=plain + "frames = 9\nmin_frames = 1\n")
    (problem,) = training_problems(short.config, encoded, short.datasets)
    assert problem.what.startswith(
        "clips of 1 frame are one latent frame, with nothing to make after it, and this model"
    )
    assert problem.remedy == "Set frames to 5 or more."
    assert not list(training_problems(mixed.config, encoded, mixed.datasets))
    (problem,) = training_problems(mixed.config, clean, mixed.datasets)
    assert problem.what.endswith("is always given the first frame, and nothing would be left to train.")
    assert problem.remedy == "Set min_frames to 5 or more."


def test_an_encoder_without_its_files_is_refused_where_it_is_used_alone(plan_of: PlanOf) -> None:
    missing = encoder("picture", Problem("palette", "there is no such file.", "Give another."))
    plan, unused = plan_of(data=DATA), plan_of()
    family: Any = Family(condition(clean_frames=0, encoder=missing))
    (problem,) = encoder_problems(plan.config, family, plan.datasets)
    assert problem.what == "the encoder of the condition first_frame: palette: there is no such file."
    assert not list(encoder_problems(unused.config, family, unused.datasets))
    pictured = plan_of(validation=VALIDATION + 'images = { city = "config.toml" }')
    assert list(encoder_problems(pictured.config, family, pictured.datasets))


def test_pictures_are_checked_each_on_its_line(plan_of: PlanOf, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    images = '[validation.images]\nrabit = "config.toml"\ncity = "nowhere.png"\nzebra = "folder"\n'
    found = refused(plan_of, validation=VALIDATION + images)
    lines = [problem.partition("config.toml:")[2] for problem in found]
    assert lines == [
        '18: images: no prompt has the nickname "rabit". Did you mean "rabbit"?',
        f"19: {tmp_path / 'nowhere.png'} is not there. Relative paths start at the configuration file's folder.",
        f"20: {tmp_path / 'folder'} is no file. Relative paths start at the configuration file's folder.",
        '20: images: no prompt has the nickname "zebra". There are "city", "rabbit".',
    ]


def test_a_video_of_one_frame_cannot_go_on_from_a_picture(plan_of: PlanOf) -> None:
    (problem,) = refused(plan_of, validation=VALIDATION + 'frames = 1\nimages = { city = "config.toml" }')
    assert "config.toml:17: images: a video of 1 frame is one latent frame" in problem
    assert problem.endswith("Set frames to 5 or more.")


def survey(*frames: int) -> DatasetSurvey:
    """Of clips of so many frames."""
    return DatasetSurvey("clips", len(frames), {ClipShape(count, 64, 64): 1 for count in frames}, {}, 0)


def test_the_plan_names_prompts_with_a_picture_and_the_share(plan_of: PlanOf) -> None:
    plan = plan_of(data=DATA, validation=VALIDATION + 'images = { city = "config.toml" }')
    assert picture_rows(plan) == (("image to video", "from a picture: city"),)
    assert list(price_rows(plan, plan.datasets[0], survey(17))) == [
        ("image to video", "30% of draws start from a clean first frame")
    ]
    plain = plan_of(validation=VALIDATION)
    assert not list(picture_rows(plain))
    assert not list(price_rows(plain, plain.datasets[0], survey(17)))


def test_a_share_of_clips_that_are_too_short_is_told_by_what_the_scan_found(plan_of: PlanOf) -> None:
    """The plan once said 30% of a folder of pictures, none of which is ever drawn so."""
    plan = plan_of(data=DATA)
    rows = [dict(price_rows(plan, plan.datasets[0], survey(*frames)))["image to video"] for frames in ((1,), (1, 17))]
    assert rows[0] == "no draw: no clip here has 5 frames, two latent frames"
    assert rows[1] == "30% of draws of clips of 5 frames or more start from a clean first frame"
