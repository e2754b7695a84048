"""Files of other trainers, JSON and YAML: each is one problem that says what it is."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from vtrain.contract import Problem

Problems = Callable[..., list[Problem]]

SIMPLETUNER = {
    "resume_from_checkpoint": "latest",
    "data_backend_config": "config/multidatabackend.json",
    "seed": 42,
    "output_dir": "output",
    "max_train_steps": 400,
    "model_type": "full",
    "model_family": "sanavideo",
    "train_batch_size": 1,
    "gradient_checkpointing": True,
    "resolution": 480,
    "validation_prompt": "a rabbit",
    "optimizer": "adamw_bf16",
    "learning_rate": 5e-05,
}
DATASETS = [
    {
        "id": "clips",
        "type": "local",
        "dataset_type": "video",
        "crop": False,
        "resolution": 480,
        "instance_data_dir": "clips",
        "caption_strategy": "textfile",
        "repeats": 0,
        "video": {"num_frames": 81, "min_frames": 81, "bucket_strategy": "aspect_ratio"},
    }
]


def toml(values: dict[str, object]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


TEXTS = {
    "a configuration of SimpleTuner": (
        json.dumps(SIMPLETUNER, indent=2),
        json.dumps(SIMPLETUNER),
        json.dumps({f"--{key}": value for key, value in SIMPLETUNER.items()}),
        json.dumps(SIMPLETUNER, indent=2)[:-1] + ',\n  "--user_prompt_library": "prompts.json",\n}',
        json.dumps(DATASETS, indent=2),
        json.dumps(DATASETS),
        toml(SIMPLETUNER),
        "[run]\n" + toml(SIMPLETUNER),
    ),
    "a dataset file of musubi-tuner": (
        "[general]\nresolution = [960, 544]\nbatch_size = 1\n[[datasets]]\nvideo_directory = 'a'\ntarget_frames = [25]\n",
    ),
    "a configuration of diffusion-pipe": (
        "output_dir = 'a'\ndataset = 'b.toml'\nepochs = 9\nmicro_batch_size_per_gpu = 1\npipeline_stages = 1\n[model]\n"
        "type = 'x'\ndtype = 'bfloat16'\n[adapter]\nrank = 32\n[optimizer]\ntype = 'adamw'\nlr = 2e-5\n",
        "resolutions = [512]\nframe_buckets = [1, 33]\n[[directory]]\npath = 'a'\nnum_repeats = 1\n",
    ),
    "a dataset file of finetrainers": (
        '{"datasets": [{"data_root": "a", "dataset_type": "video", "video_resolution_buckets": [[49, 512, 768]]}]}',
    ),
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in TEXTS.items() for text in texts])
def test_a_file_of_another_trainer_is_one_problem_that_names_it(problems: Problems, name: str, text: str) -> None:
    (found,) = problems(text)
    assert (found.where, found.what) == ("config.toml", f"this is {name}, not of vtrain.")
    page = "docs/simpletuner.md" if "SimpleTuner" in name else "docs/configuration.md"
    assert page in found.remedy


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ('{"nickname": "the prompt"}', "JSON"),
        ("[\n]", "JSON"),
        ("{,", "JSON"),
        ("---\n# a job\n\njob: extension\nconfig:\n  name: a\n", "YAML"),
        ("- name: a\n", "YAML"),
    ],
)
def test_another_language_is_told(problems: Problems, text: str, language: str) -> None:
    (found,) = problems(text)
    assert found.what == f"this is {language}, not TOML."


def test_a_few_foreign_keys_in_a_file_of_ours_are_told_one_by_one(problems: Problems, good: dict[str, str]) -> None:
    good["train"] += "max_train_steps = 3\ntrain_batch_size = 2\nlearning_rate = 1.0\n"
    keys = ["train.max_train_steps", "train.train_batch_size", "train.learning_rate"]
    assert [each.what for each in problems(good)] == [f"unknown key {key}." for key in keys]


@pytest.mark.parametrize("text", ["# a: b\n[run]\nname: 'a'\n", "\n\nname: 'a'\n[run]\n", "\n\nname: 'a'\nseed = 1\n"])
def test_toml_with_a_fault_stays_toml(problems: Problems, text: str) -> None:
    (found,) = problems(text)
    assert found.where == "config.toml:3"
    assert found.what.startswith("not TOML: Expected '=' after a key")
