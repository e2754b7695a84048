"""What a plan refuses of image-to-video, and what it says of its price."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtrain.contract import ClipShape, ConfigError, FrameRule
from vtrain.data.scanning.surveys import DatasetSurvey
from vtrain.estimate.render import picture_rows, price_rows
from vtrain.plan.make import picture_problems, training_problems
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


class OneLevel:
    """What the checks ask of a family, of one whose denoiser takes a level for a whole clip."""

    frame_rule = FrameRule(4, 1)

    def pixel_frames(self, latent_frame: int) -> range:
        return range(max(0, 4 * latent_frame - 3), 4 * latent_frame + 1)


def test_a_family_with_one_level_for_a_clip_is_refused(plan_of: PlanOf) -> None:
    plan = plan_of(data=DATA, validation=VALIDATION + 'images = { city = "config.toml" }')
    family: Any = OneLevel()
    (training,) = training_problems(plan.config, family, plan.datasets)
    assert training.where.endswith("config.toml:10")
    assert training.what == "image_to_video = 0.3: this model family takes one noise level for a whole clip."
    (generating,) = picture_problems(plan.config, family, 9)
    assert generating.where.endswith("config.toml:20")
    assert generating.what.startswith("images: this model family takes one noise level for a whole clip")


def test_a_family_whose_first_latent_frame_is_no_single_picture_is_refused(plan_of: PlanOf) -> None:
    class Pairs(OneLevel):
        frame_rule = FrameRule(2, 0)
        frame_levels = True

        def pixel_frames(self, latent_frame: int) -> range:
            return range(2 * latent_frame, 2 * latent_frame + 2)

    family: Any = Pairs()
    plan = plan_of(data=DATA, validation=VALIDATION + 'images = { city = "config.toml" }')
    (problem,) = picture_problems(plan.config, family, 8)
    assert "the first latent frame of this model family stands for 2 frames, not for a single picture" in problem.what


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
