"""[[data]] tables: what is resolved, and every combination of keys that is refused, at its line."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest

from vtrain.contract import CaptionExtra, ConfigError, DataBackendSpec, PluginError, Registered, SourceRef, Words
from vtrain.plan.make import make_plan
from vtrain.plan.records import DatasetPlan, Plan
from vtrain.registry import discover
from vtrain_builtin.folder import FOLDER

PlanOf = Callable[..., Plan]

DATA_LINE = 6
"""Of [[data]] in the files made here; its own keys begin three lines further down."""


def planned(plan_of: PlanOf, rows: str) -> DatasetPlan:
    (dataset,) = plan_of(data=f'use = "folder"\npath = "clips"\n{rows}').datasets
    return dataset


def refused(plan_of: PlanOf, rows: str) -> list[str]:
    """What is wrong, "line: what remedy" each; lines counted from the first of `rows`."""
    with pytest.raises(ConfigError) as caught:
        planned(plan_of, rows)
    found = []
    for problem in caught.value.problems:
        line = int(problem.where.rpartition(":")[2]) - DATA_LINE - 2
        found.append(f"{line}: {problem.what} {problem.remedy}".strip())
    return found


def test_lengths_by_aspect_and_by_resolution_and_frames(plan_of: PlanOf) -> None:
    def lengths(rows: str) -> tuple[int, int, int | None]:
        dataset = planned(plan_of, f"[data.video]\n{rows}")
        return dataset.min_frames, dataset.frames, dataset.max_frames

    by_length = 'bucket_by = "resolution_frames"\n'
    assert lengths("") == (9, 9, None)
    assert lengths("frames = 17\nmin_frames = 5\nmax_frames = 40") == (5, 17, 40)
    assert lengths(f"{by_length}max_frames = 41") == (9, 41, 41)
    assert lengths(f"{by_length}min_frames = 5") == (5, 9, None)
    assert lengths(f"{by_length}frames = 13\nmax_frames = 41") == (13, 41, 41)


def test_the_rate_is_the_files_the_familys_or_each_clips_own(plan_of: PlanOf) -> None:
    rates = {rows: planned(plan_of, f"[data.video]\n{rows}").fps for rows in ("", "fps = 12", 'fps = "source"')}
    assert rates == {"": 8.0, "fps = 12": 12.0, 'fps = "source"': None}


def test_random_places_come_from_the_runs_seed(plan_of: PlanOf) -> None:
    assert planned(plan_of, 'crop = "random"').crop_seed == 42
    assert planned(plan_of, 'crop = "center"').crop_seed == 0


def test_captions_are_text_files_unless_the_file_or_the_backend_says_otherwise(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned(plan_of, "").captions == "textfile"
    assert planned(plan_of, 'captions = "json"').captions == "json"
    knowing(monkeypatch)
    assert planned(plan_of, "").captions == "backend"
    assert planned(plan_of, 'captions = "backend"').captions == "backend"
    assert planned(plan_of, 'captions = "textfile"').captions == "textfile"


def knowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend "folder" have captions of its own, and no files of this machine."""

    class Knowing:
        location = "/clips"

        def refs(self) -> Iterator[SourceRef]:
            yield from ()

        def open(self, ref: SourceRef) -> BinaryIO:
            raise OSError("there are no files")

        def captions(self, extras: Sequence[str] = ()) -> Iterator[tuple[str, Words]]:
            yield from ()

    monkeypatch.setitem(vars_of(FOLDER), "build", lambda options: Knowing())


def vars_of(spec: DataBackendSpec) -> dict[str, object]:
    return spec.__dict__


GOOD = [
    'captions = "instance_prompt"\ncaption = "a film"',
    'caption_prefix = "film: "',
    'caption_per = "file"',
    'captions = "textfile"\ncaption_per = "line"',
    "min_size = 10",
    "max_size = 10\ndownsample_to = 10\nmin_size = 10",
    'resolution_type = "pixel"\nmin_size = 10',
    'on_bad_file = "move"\nquarantine = "bad"',
    "[data.video]\nframes = 9\nmax_frames = 9",
    '[data.video]\nwindow = "random"\nwindows = 7',
    '[data.video]\nbucket_by = "resolution_frames"\nmax_frames = 25\nround_to = 8',
    '[data.video]\nfps = "source"\nframe_step = 2',
    '[data.masks]\nfolder = "masks"\ninvert = true\nmissing = "drop"',
]


@pytest.mark.parametrize("rows", GOOD)
def test_keys_that_belong_together_are_taken(plan_of: PlanOf, rows: str) -> None:
    assert planned(plan_of, rows)


BAD = {
    'captions = "instance_prompt"': '1: captions = "instance_prompt" needs the key "caption". Add, for example: caption =',
    'caption = "x"': '1: caption has no meaning without captions = "instance_prompt".',
    'captions = "json"\ncaption_per = "file"': '2: caption_per has no meaning without captions = "textfile".',
    'captions = "backend"': '1: captions = "backend": the data backend "folder" has no captions of its own.',
    'captions = "csv"': '1: captions = "csv" needs the key "captions_file". Add, for example: captions_file = "captions.csv"',
    'captions_file = "x.csv"': '1: captions_file has no meaning without captions = "csv" or "parquet".',
    'file_column = "x"': '1: file_column has no meaning without captions = "csv" or "parquet".',
    'caption_column = "x"': '1: caption_column has no meaning without captions = "csv" or "parquet".',
    'captions = "csv"\ncaptions_file = "x.csv"': "2: {folder}/x.csv is not there. Relative paths start at",
    'captions = "csv"\ncaptions_file = "."': "2: {folder} is no file.",
    'resolution_type = "pixel"': "1: resolution_type has no meaning without a number in resolution, min_size,",
    "max_size = 480": "1: max_size says from where clips are reduced, and downsample_to, the size they are reduced to, is "
    "missing. Add, for example: downsample_to = 480",
    "downsample_to = 480": "1: downsample_to has no meaning without max_size. Add max_size, or remove it.",
    "min_size = 5\nmax_size = 4\ndownsample_to = 4": "1: min_size = 5 is more than max_size = 4.",
    "max_size = 4\ndownsample_to = 5": "2: downsample_to = 5 is more than max_size = 4.",
    'on_bad_file = "move"': '1: on_bad_file = "move" needs the key "quarantine", the folder to move bad files to.',
    'quarantine = "x"': '1: quarantine has no meaning without on_bad_file = "move".',
    'on_bad_file = "move"\nquarantine = "clips/bad"': "2: the quarantine {folder}/clips/bad and the dataset {folder}/clips "
    "lie in each other. Choose a folder outside the dataset.",
    'on_bad_file = "move"\nquarantine = "."': "2: the quarantine {folder} and the dataset",
    'on_bad_file = "move"\nquarantine = "config.toml"': "2: {folder}/config.toml is a file where a folder has to be.",
    "[data.video]\nwindows = 3": '2: windows has no meaning without window = "random". Remove it, or set window =',
    "[data.video]\nround_to = 4": '2: round_to has no meaning without bucket_by = "resolution_frames". Remove it, or',
    "[data.video]\nmax_frames = 8": "2: max_frames = 8 is less than frames = 9: no clip could have them. Set it to 9 or more",
    "[data.video]\nmin_frames = 13": "2: min_frames = 13 is more than frames = 9.",
    '[data.video]\nbucket_by = "resolution_frames"\nmax_frames = 5': "3: frames = 9 is more than max_frames = 5.",
    '[data.video]\nbucket_by = "resolution_frames"\nmax_frames = 20': "3: max_frames = 20: the family takes 4k+1 frames. "
    "Use 17 or 21.",
    '[data.video]\nfps = "source"\nrepeat_frames = true': '3: repeat_frames has no meaning with fps = "source"',
}


@pytest.mark.parametrize("rows", BAD)
def test_keys_that_do_not_belong_together_are_refused_at_their_line(plan_of: PlanOf, tmp_path: Path, rows: str) -> None:
    (problem,) = refused(plan_of, rows)
    assert problem.startswith(BAD[rows].format(folder=tmp_path))


MISTYPED = {
    'captions = "instanceprompt"': 'Did you mean "instance_prompt"?',
    'resolution_type = "pixels"': 'Did you mean "pixel"?',
    'crop = "centre"': 'Did you mean "center"?',
    'on_bad_file = "moves"': 'Did you mean "move"?',
    "max_frame = 3": "",
    "[data.video]\nmax_frame = 3": 'Did you mean "max_frames"?',
    '[data.video]\nbucket_by = "resolution-frames"': 'Did you mean "resolution_frames"?',
    '[data.video]\nwindow = "centre"': 'Did you mean "center"?',
    '[data.video]\nfps = "sauce"': "",
    "[data.video]\nfps = 0": "",
    "[data.video]\nframe_step = 0": "",
    "[data.video]\nwindows = 0": "",
    "min_size = 0": "",
    "resolution = 0": "",
    "resolution = []": "",
}


@pytest.mark.parametrize("rows", MISTYPED)
def test_a_mistyped_value_is_refused_with_what_was_probably_meant(plan_of: PlanOf, rows: str) -> None:
    (problem,) = refused(plan_of, rows)
    assert problem.startswith(f"{len(rows.splitlines())}: ")
    assert MISTYPED[rows] in problem


def test_all_problems_of_a_table_come_at_once(plan_of: PlanOf) -> None:
    found = refused(plan_of, 'caption = "x"\nquarantine = "x"\nmax_size = 3\n[data.video]\nwindows = 3\nround_to = 2')
    assert [problem.split(":")[0] for problem in found] == ["1", "2", "3", "5", "6"]


def test_files_elsewhere_cannot_be_moved(plan_of: PlanOf) -> None:
    with pytest.raises(
        ConfigError, match='on_bad_file = "move" is for folders of this machine; files of "folder" at memory'
    ):
        plan_of(data='use = "folder"\npath = "memory://clips"\non_bad_file = "move"\nquarantine = "bad"')


def test_captions_in_parquet_need_pyarrow_and_say_how_to_get_it(
    plan_of: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "captions.parquet").write_bytes(b"")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pyarrow" else find(name, *rest)
    )
    (problem,) = refused(plan_of, 'captions = "parquet"\ncaptions_file = "captions.parquet"')
    assert problem == (
        "1: captions = \"parquet\" is read by pyarrow, which is not installed. Install it: pip install 'vtrain[parquet]'"
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('bucket_by = "resolution_frames"', "with clips of 9 frames at least and at most"),
        (
            'bucket_by = "resolution_frames"\nframes = 13\nmin_frames = 9\nmax_frames = 17',
            "data.video.frames has no effect",
        ),
    ],
)
def test_lengths_that_are_probably_not_meant_are_pointed_out(plan_of: PlanOf, rows: str, words: str) -> None:
    (warning,) = plan_of(data=f'use = "folder"\npath = "clips"\n[data.video]\n{rows}').warnings
    assert words in warning
    assert plan_of(data='use = "folder"\npath = "clips"\n[data.video]\nframes = 13\nmin_frames = 9').warnings == ()


def test_a_warning_names_its_dataset_where_there_are_several(plan_of: PlanOf) -> None:
    more = '[[data]]\nuse = "folder"\npath = "more"\nid = "small"\nresolution = 32'
    (warning,) = plan_of(more=more).warnings
    assert warning.startswith("[[data]] small: resolution = 32")


def test_masks_are_resolved_with_their_place_in_the_file(plan_of: PlanOf) -> None:
    assert planned(plan_of, "").masks is None
    found = planned(plan_of, '[data.masks]\nfolder = "extra/masks/"').masks
    assert found is not None
    assert (found.folder, found.invert, found.missing) == ("extra/masks", False, "whole")
    assert int(found.where.rpartition(":")[2]) == DATA_LINE + 4
    found = planned(plan_of, '[data.masks]\nfolder = "masks"\ninvert = true\nmissing = "drop"').masks
    assert found is not None
    assert (found.invert, found.missing) == (True, "drop")


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("", "a folder in the dataset, such as"),
        ("/masks", "a folder in the dataset, such as"),
        ("../masks", "a folder in the dataset, such as"),
        (".", "a folder in the dataset, such as"),
        ("a//b", "a folder in the dataset, such as"),
        ("a/.masks", "files in folders whose names start with a dot are not read"),
    ],
)
def test_a_folder_of_masks_lies_in_the_dataset(plan_of: PlanOf, folder: str, why: str) -> None:
    (found,) = refused(plan_of, f'[data.masks]\nfolder = "{folder}"')
    assert found.startswith("2: ")
    assert why in found


def test_masks_need_their_folder_and_know_no_other_key(plan_of: PlanOf) -> None:
    (found,) = refused(plan_of, "[data.masks]\ninvert = true")
    assert "folder" in found
    (found,) = refused(plan_of, '[data.masks]\nfolder = "masks"\ninverted = true')
    assert found.startswith("3: ")
    assert '"invert"' in found


def test_a_dataset_knows_its_familys_extras_and_those_of_others(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtrain_toy.family import TOY

    other = replace(TOY, name="other", caption_extras=(CaptionExtra("camera", "text", "x"), *TOY.caption_extras[:1]))
    catalog = discover()
    parts = {**catalog.parts, ("family", "other"): Registered(other, "other", "other", "1")}
    catalog = replace(catalog, parts={key: part for key, part in parts.items() if key[1] in ("toy", "other")})
    plan = plan_of(data='use = "folder"\npath = "clips"\ncaptions = "json"')
    assert [extra.name for extra in plan.datasets[0].extras] == ["mood", "pace"]
    assert plan.datasets[0].foreign_extras == {}
    (dataset,) = make_plan(plan.config, catalog=catalog).datasets
    assert dataset.foreign_extras == {"camera": "other"}
    ignoring = plan_of(data='use = "folder"\npath = "clips"\ncaptions = "json"\nignore_extras = ["camera", "pace"]')
    (dataset,) = make_plan(ignoring.config, catalog=catalog).datasets
    assert [extra.name for extra in dataset.extras] == ["mood"]
    assert dataset.foreign_extras == {}


def test_extras_are_ignored_where_there_are_some(plan_of: PlanOf) -> None:
    assert refused(plan_of, 'ignore_extras = ["pace"]\ncaptions = "textfile"') == [
        '1: ignore_extras has no meaning without a place of captions that has extras, which "textfile" is not. Remove it.'
    ]


def test_a_family_that_reads_other_extras_than_its_spec_says_is_a_fault_of_the_plugin(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtrain_toy.family import ToyFamily

    monkeypatch.setattr(ToyFamily, "caption_extras", ())
    with pytest.raises(PluginError, match='its spec declares the caption extras "mood", "pace", and the family none'):
        plan_of()
