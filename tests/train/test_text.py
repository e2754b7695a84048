"""A whole run of a family whose text comes from two encoders in three parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vtrain_toy.duo import DuoFamily

VALIDATED = """
[validation]
every = "2 steps"
size = "64x64"
frames = 9
steps = 2
guidance = 3.0
negative_prompt = "blurry"
prompts = { red = "a red gradient" }
"""


@pytest.fixture
def duo(folder):
    """The folder, with the config of a run of four steps of the second toy family and a cache of its own."""
    text = folder.write(VALIDATED, steps=4, save=2).read_text()
    text = text.replace('use = "toy"', 'use = "toy-duo"').replace(folder.cache.as_posix(), "cache")
    folder.config.write_text(text)
    return folder


def cut_back(folder) -> None:
    """To the checkpoint of step 2, as if the run had been killed after it."""
    shutil.rmtree(folder.output / "checkpoints" / "step-000004")


def entries(folder) -> set[Path]:
    return set((folder.path / "cache" / "text").rglob("*.safetensors"))


def test_it_caches_trains_validates_and_resumes_to_the_same_weights(duo, within: Callable) -> None:
    printed = within("run", duo.config).stdout
    for encoder in ("words", "letters"):
        assert f"text ({encoder}): 8 of 8 cached" in printed
    assert len(entries(duo)) == 16, "five captions, the dropped one, the prompt and the negative one"
    assert [file.name for file in (duo.output / "samples" / "step-000004").glob("*.mp4")] == ["red.mp4"]
    assert {"text (words)", "text (letters)"} < json.loads((duo.output / "plan.json").read_text())[
        "fingerprints"
    ].keys()

    rows, straight = duo.rows(), duo.tensors(4)
    assert any(name.endswith("gist_in.weight") for name in straight)
    cut_back(duo)
    again = within("run", duo.config).stdout
    assert "resuming from" in again
    assert "changed since the checkpoint" not in again
    assert duo.rows() == rows
    for name, value in duo.tensors(4).items():
        assert torch.equal(value, straight[name]), name


def test_another_text_encoder_than_the_checkpoints_is_told_by_its_name_and_it_alone_is_run(
    duo, within: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    within("run", duo.config)
    cut_back(duo)
    before = entries(duo)
    monkeypatch.setattr(DuoFamily, "_letter_fingerprint", lambda self, hash_file: "another")
    said = " ".join(within("run", duo.config).stdout.split())
    assert 'the text encoder "letters", or an option that shapes it, changed since the checkpoint' in said
    assert 'text encoder "words"' not in said
    assert len(entries(duo) - before) == 8


def test_what_is_shown_of_a_file_names_the_encoders_entries(duo, within: Callable) -> None:
    within("cache", "fill", duo.config)
    shown = json.loads(within("data", "show", duo.config, "clip_0.mp4", "--no-sheet", "--json").stdout)
    assert [(entry["role"], entry["encoder"], entry["state"]) for entry in shown["text"]] == [
        ("prompt", "words", "sound"), ("prompt", "letters", "sound"),
        ("dropped", "words", "sound"), ("dropped", "letters", "sound"),
    ]  # fmt: skip
    printed = within("data", "show", duo.config, "clip_0.mp4", "--no-sheet").stdout
    for label in ("caption, words", "caption, letters", "dropped, words", "dropped, letters"):
        assert f"  {label} " in printed
    assert printed.count("gradient number 0") == 1
    found = json.loads(within("cache", "status", duo.config, "--json").stdout)
    assert (found["text"]["wanted"], found["text"]["present"]["count"], found["text"]["missing"]) == (16, 16, 0)
