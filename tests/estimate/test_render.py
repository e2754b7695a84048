"""What a plan says of its data, in words, in the table of buckets, and for programs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vtrain.cli.plan import show_sections
from vtrain.cli.report import bold
from vtrain.contract import ClipShape
from vtrain.data.scanning.misfits import Loss, Misfits
from vtrain.data.scanning.surveys import DatasetSurvey, Survey
from vtrain.estimate.estimate import make_estimate
from vtrain.estimate.render import as_json, buckets_json, buckets_section, dataset_rows, losses_section, sections
from vtrain.plan.records import Plan

PlanOf = Callable[..., Plan]
LOSS = Loss(stretch=1.5, stretch_mean=1.5, worst="a.mp4")
SQUARE, WIDE = ClipShape(9, 64, 64), ClipShape(5, 64, 96)


def survey(**more: Any) -> Survey:
    """Two buckets: 3 clips with 12 windows, and 2 clips cut into 5 samples of a window each."""
    given: dict[str, Any] = {
        "samples": {SQUARE: 3, WIDE: 5}, "clips": {SQUARE: 3, WIDE: 2}, "windows": {SQUARE: 12, WIDE: 5}, "skipped": {},
        **more,
    }  # fmt: skip
    return Survey((DatasetSurvey(id="clips", files=9, repeats=1, **given),), texts=7)


def rows(plan: Plan, found: Survey) -> dict[str, str]:
    return dict(dataset_rows(plan.datasets[0], found.datasets[0], alone=True))


def test_the_table_counts_clips_windows_batches_and_shares(plan_of: PlanOf) -> None:
    plan = plan_of(train="steps = 10\nbatch_size = 4")
    section = buckets_section(plan, survey())
    assert section.rows == (
        ("bucket", "clips", "windows", "batches an epoch", "latents", "share"),
        ("96x64@5", "2", "5", "2.5", "x".join(map(str, plan.family.latent_shape(WIDE))), "62.5%"),
        ("64x64@9", "3", "12", "1.5", "x".join(map(str, plan.family.latent_shape(SQUARE))), "37.5%"),
    )


def test_what_is_cropped_or_stretched_is_told_of_each_bucket_with_the_worst_clip(plan_of: PlanOf) -> None:
    losses = {WIDE: Loss(0.58, 0.12, worst="tall.mp4"), SQUARE: Loss(stretch=2.37, stretch_mean=1.1, worst="b.mp4")}
    assert losses_section(survey(losses=losses)).rows == (
        ("96x64@5", "cropped by 12.0% on average, at most 58.0% (tall.mp4)"),
        ("64x64@9", "stretched by 10.0% on average, at most 137.0% (b.mp4)"),
    )
    small = survey(losses={WIDE: Loss(0.009, 0.001, worst="a.mp4")})
    assert losses_section(small).rows == (), "whole pixels"
    plan = plan_of()
    titles = [part.title for part in sections(plan, small, make_estimate(plan, small))]
    assert "pictures" not in titles


def test_buckets_of_several_datasets_are_counted_together(plan_of: PlanOf) -> None:
    one, two = survey().datasets[0], survey(losses={WIDE: LOSS}, samples={WIDE: 1}, clips={}, windows={}).datasets[0]
    both = Survey((one, two), texts=3)
    wide, square = both.table()
    assert (wide.clips, wide.windows, wide.samples) == (3, 6, 12)
    # Of three clips in it one is half as wide again.
    assert wide.loss == Loss(stretch=1.5, stretch_mean=pytest.approx(3.5 / 3), worst="a.mp4")
    assert (square.clips, square.windows, square.samples, square.loss) == (3, 12, 6, Loss())


def test_every_window_is_cached_and_no_repeat(plan_of: PlanOf) -> None:
    plan = plan_of()
    sizes = {shape: 4 * prod(plan.family.latent_shape(shape)) for shape in (SQUARE, WIDE)}
    assert make_estimate(plan, survey()).video_bytes == 12 * sizes[SQUARE] + 5 * sizes[WIDE]


def prod(numbers: tuple[int, ...]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total


def test_programs_get_the_same_numbers(plan_of: PlanOf) -> None:
    plan, found = plan_of(train="steps = 10\nbatch_size = 4"), survey(losses={WIDE: LOSS}, notes=("a note",))
    wide, square = buckets_json(plan, found)
    assert wide == {
        "bucket": "96x64@5", "clips": 2, "windows": 5, "samples_per_epoch": 10, "batches_per_epoch": 2.5,
        "latent_shape": list(plan.family.latent_shape(WIDE)), "share": 0.625, "stretch": 1.5,
        "stretch_mean": 1.5, "cropped": 0.0, "cropped_mean": 0.0, "worst": "a.mp4",
    }  # fmt: skip
    assert square["share"] == 0.375
    whole = json.loads(json.dumps(as_json(plan, found, make_estimate(plan, found))))
    assert whole["buckets"] == [wide, square]
    assert (whole["datasets"][0]["clips"], whole["datasets"][0]["windows"]) == (5, 17)
    assert whole["datasets"][0]["notes"] == ["a note"]
    assert whole["datasets"][0]["misfits"] == {"clips": 0, "worst": []}


def test_what_is_probably_not_meant_of_the_data_is_a_warning(plan_of: PlanOf) -> None:
    found = survey(doubts=("2 caption files look odd",), misfits=Misfits(2, (("tall.mp4", 0.58),), ((0.5, 2),)))
    warnings = make_estimate(plan_of(), found).warnings
    assert warnings[0] == "2 caption files look odd"
    assert warnings[1].startswith("2 of 5 clips lose more than a third of the picture to the crop (tall.mp4 58%); ")


def test_files_samples_and_passes_are_told_apart(plan_of: PlanOf) -> None:
    assert rows(plan_of(), survey())["files"] == "9 scanned, 5 used as 8 samples, 2 passes an epoch"
    assert rows(plan_of(), survey(notes=("odd",)))["note"] == "odd"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("", "9 at 8 fps, from the start"),
        ('window = "center"\nmin_frames = 5', "5 to 9 at 8 fps, from the centre"),
        ('fps = "source"\nframe_step = 3', "9 at the clip's own rate, one of 3 taken, from the start"),
        ('window = "random"\nwindows = 3', "9 at 8 fps, one of 3 windows, drawn at each use"),
        ('window = "all"\nmax_frames = 40', "9 at 8 fps, every stretch of a clip, clips cut after 40"),
    ],
)
def test_time_is_told(plan_of: PlanOf, settings: str, words: str) -> None:
    plan = plan_of(data=f'use = "folder"\npath = "clips"\n[data.video]\n{settings}')
    assert rows(plan, survey())["frames"] == words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("", "3 sizes, cut to the nearest aspect at the centre"),
        ('resolution = "64x64"\ncrop = "none"', "64x64, squeezed to the nearest aspect"),
        (
            'crop = "random"\nmin_size = 50\nmax_size = 99\ndownsample_to = 70\nresolution_type = "pixel"',
            "3 sizes, cut to the nearest aspect at a place drawn for each sample, at least 50, above 99 reduced to 70 (pixel)",
        ),
    ],
)
def test_space_is_told(plan_of: PlanOf, settings: str, words: str) -> None:
    assert rows(plan_of(data=f'use = "folder"\npath = "clips"\n{settings}'), survey())["picture"] == words


@pytest.mark.parametrize(("terminal", "shown"), [("xterm", "\x1b[1mrun\x1b[0m"), ("dumb", "run"), ("unknown", "run")])
def test_titles_are_bold_where_the_terminal_can(monkeypatch: pytest.MonkeyPatch, terminal: str, shown: str) -> None:
    monkeypatch.setenv("TERM", terminal)
    assert bold("run") == shown


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("", "a .txt beside each clip, a caption a line"),
        ('captions = "json"\nmissing_caption = "empty"', "a .json beside each clip, empty where there is none"),
        ('captions = "instance_prompt"\ncaption = "a film"', '"a film" for all'),
        ('captions = "filename"\ncaption_prefix = "film: "', 'the file\'s name, after "film: "'),
        ('caption_per = "file"', "a .txt beside each clip, a caption a file"),
        ('captions = "csv"\ncaptions_file = "all.csv"', "{folder}/all.csv"),
    ],
)
def test_captions_are_told(plan_of: PlanOf, tmp_path: Path, settings: str, words: str) -> None:
    (tmp_path / "all.csv").write_text("file,caption\n")
    plan = plan_of(data=f'use = "folder"\npath = "clips"\n{settings}')
    assert rows(plan, survey())["captions"] == words.format(folder=tmp_path)


def test_where_bad_files_go_is_told_before_they_go(plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of(data='use = "folder"\npath = "clips"\non_bad_file = "move"\nquarantine = "away"')
    assert rows(plan, survey())["bad files"] == f"moved to {tmp_path}/away when caches are filled"
    assert "bad files" not in rows(plan_of(), survey())


def test_on_a_terminal_the_columns_of_the_table_stand_under_each_other(plan_of: PlanOf) -> None:
    plan, found, out = plan_of(), survey(skipped={"odd\nname\x1b[2J": (1, "a\nb.mp4")}), io.StringIO()
    show_sections(Console(file=out, soft_wrap=True, width=200), sections(plan, found, make_estimate(plan, found)))
    lines = out.getvalue().splitlines()
    table = lines[lines.index("buckets") + 1 :][:3]
    assert len({len(line) for line in table}) == 1
    assert table[0].split("  ")[1] == "bucket"
    assert "  skipped: 1   odd\\nname\\x1b[2J  (a\\nb.mp4)" in lines


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("", "white trains, the loss of each clip divided by its area; a clip without one trains whole"),
        (
            'invert = true\nmissing = "drop"',
            "black trains, the loss of each clip divided by its area; a clip without one is dropped",
        ),
    ],
)
def test_masks_are_told(plan_of: PlanOf, settings: str, words: str) -> None:
    plan = plan_of(data=f'use = "folder"\npath = "clips"\n[data.masks]\nfolder = "masks"\n{settings}')
    assert rows(plan, survey())["masks"] == f"masks/, under the clips' names: {words}"
    assert "masks" not in rows(plan_of(), survey())
