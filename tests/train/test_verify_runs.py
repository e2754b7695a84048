"""`vtrain verify` on runs of every kind: what they were is trained again to the same bits, or it is said why not."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtrain import api
from vtrain.contract import Logged
from vtrain.train import step

Run = Callable[..., subprocess.CompletedProcess[str]]
SMOOTH = '\n[[regularizer]]\nuse = "toy-smooth"\nblock = 1\nweight = 0.1\n'


def checkpoint(folder: Any, step: int) -> Path:
    return folder.output / "checkpoints" / f"step-{step:06d}"


def all_bits(found: Any) -> list[tuple[int, int]]:
    """The steps that were trained again, all bit for bit."""
    assert found.findings == ()
    assert all(each.bits for each in found.retrained)
    return [(each.first, each.last) for each in found.retrained]


@pytest.mark.slow
@pytest.mark.parametrize("train", ["full", "lora"])
def test_runs_with_averages_regularizers_and_accumulation_are_sound(folder, within: Run, train: str) -> None:
    """Slow: all is trained twice. Validation, trackers and the cache are the run's alone."""
    more = (
        SMOOTH
        + '\n[ema]\ndecay = 0.9\nvalidation = "both"\n[validation]\nevery = "2 steps"\n[validation.prompts]\na = "a cat"\n'
    )
    folder.write(train=train, accumulate=2, save=2, steps=5, more=more)
    within("run", folder.config)
    found = api.verify(folder.output, all=True)
    assert found.verdict == "sound"
    assert all_bits(found) == [(0, 2), (2, 4), (4, 5)]


@pytest.mark.slow
def test_a_run_whose_settings_changed_at_a_resume_is_sound_as_long_as_that_checkpoint_is_there(
    folder, within: Run
) -> None:
    """Slow: all is trained twice."""
    within("run", folder.write(steps=3))
    within("run", folder.write(steps=9, lr=5e-4))
    assert all_bits(api.verify(folder.output, all=True)) == [(0, 3), (3, 6), (6, 9)]
    shutil.rmtree(checkpoint(folder, 3))
    found = api.verify(folder.output, all=True)
    assert found.verdict == "sound as far as compared"
    told = "steps 1 to 6 from step 0: settings were others before step 3, and its checkpoint is not there any more"
    assert found.not_compared == (told,)
    assert all_bits(found) == [(6, 9)]


@pytest.mark.slow
def test_a_run_that_went_back_to_an_earlier_checkpoint_is_sound(folder, within: Run) -> None:
    """Slow: all is trained twice. What was left behind is no part of the chain."""
    within("run", folder.write(steps=9))
    text = folder.write(steps=9, lr=5e-4).read_text(encoding="utf-8")
    folder.config.write_text(text.replace("seed = 7", 'seed = 7\nresume = "step-000003"'), encoding="utf-8")
    within("run", folder.config)
    records = json.loads((checkpoint(folder, 6) / "records.json").read_text(encoding="utf-8"))
    assert records["before"]["step"] == 3
    found = api.verify(folder.output, all=True)
    assert found.verdict == "sound"
    assert all_bits(found) == [(0, 3), (3, 6), (6, 9)]


@pytest.mark.slow
def test_a_run_that_began_from_another_runs_checkpoint_is_sound_as_long_as_that_is_there(
    folder, another, within: Run
) -> None:
    """Slow: two runs, and one twice more."""
    within("run", folder.write(steps=3))
    other = another()
    text = other.write(steps=9).read_text(encoding="utf-8")
    start = checkpoint(folder, 3).as_posix()
    other.config.write_text(text.replace("seed = 7", f'seed = 7\nresume = "{start}"'), encoding="utf-8")
    within("run", other.config)
    found = api.verify(other.output, all=True)
    assert found.verdict == "sound"
    assert all_bits(found) == [(3, 6), (6, 9)]
    shutil.rmtree(start)
    found = api.verify(other.output, all=True)
    assert found.not_compared == (
        f"steps 4 to 6 from step-000003: {start}, a checkpoint of another run, is not there any more",
    )
    assert all_bits(found) == [(6, 9)]


@pytest.mark.slow
def test_steps_behind_the_last_checkpoint_are_trained_again_with_all(folder, within: Run, one_decoder: None) -> None:
    """Slow: a run that was left in its middle, and two verifications."""
    folder.write(steps=9, log_every=1)
    with api.run(folder.config) as session:
        for event in session:
            if isinstance(event, Logged) and event.steps[-1].step == 5:
                break
    found = api.verify(folder.output)
    assert found.not_asked == ("steps 4 to 5 from step-000003, behind the last checkpoint",)
    assert all_bits(api.verify(folder.output, all=True)) == [(0, 3), (3, 5)]
    file = folder.output / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    row = json.loads(lines[4])
    file.write_text("".join(lines[:4]) + json.dumps({**row, "grad_norm": 1.5}) + "\n", encoding="utf-8")
    (finding,) = api.verify(folder.output, all=True).findings
    assert str(finding).startswith("metrics.jsonl: step 5: grad_norm is 1.5, and ")


@pytest.mark.slow
def test_a_run_of_two_processes_is_trained_again_in_one(folder, vtrain: Run, one_decoder: None) -> None:
    """Slow: torchrun. Micro-batches are the same in one process; of two the sum is the same in any order."""
    vtrain("run", folder.write(steps=4, save=2), processes=2)
    found = api.verify(folder.output, all=True)
    assert found.verdict == "sound"
    assert all_bits(found) == [(0, 2), (2, 4)]


@pytest.mark.slow
def test_without_the_cache_all_is_encoded_again_in_the_scratch_folder(folder, within: Run, one_decoder: None) -> None:
    """Slow: clips and captions are encoded twice."""
    cache = folder.path / "own-cache"
    text = folder.write(steps=4, save=2).read_text(encoding="utf-8")
    folder.config.write_text(text.replace(folder.cache.as_posix(), cache.as_posix()), encoding="utf-8")
    within("run", folder.config)
    shutil.rmtree(cache)
    found = api.verify(folder.output)
    assert found.verdict == "sound"
    assert not cache.exists()


@pytest.mark.slow
def test_runs_with_masks_and_cached_features_are_sound_and_a_changed_mask_is_found(
    folder, within: Run, toy_clips: Path, one_decoder: None
) -> None:
    """Slow: clips are encoded, too. One mask is black, so that its clip is none of the run's."""
    (folder.path / "clips").unlink()
    shutil.copytree(toy_clips / "clips", folder.path / "clips")
    own = type(folder)(folder.path, folder.path / "cache")
    masks = folder.path / "clips" / "masks"
    masks.mkdir()
    for number in range(3):
        picture = np.zeros((64, 96 if number == 1 else 64, 3), dtype=np.uint8)
        picture[:, : 32 * (number < 2)] = 255
        Image.fromarray(picture).save(masks / f"clip_{number}.png")
    more = '\n[[regularizer]]\nuse = "toy-colours"\nblock = 1\nteacher = "cached"\n'
    text = own.write(more, steps=4, save=2).read_text(encoding="utf-8")
    table = 'path = "clips"\non_bad_file = "move"\nquarantine = "bad"\n[data.masks]\nfolder = "masks"\n'
    own.config.write_text(text.replace('path = "clips"\n', table), encoding="utf-8")
    within("run", own.config)
    found = api.verify(own.output, all=True)
    assert found.verdict == "sound"
    assert all_bits(found) == [(0, 2), (2, 4)]
    assert found.compared["samples"] == 4
    Image.fromarray(np.full((64, 64, 3), 255, dtype=np.uint8)).save(masks / "clip_0.png")
    (finding,) = api.verify(own.output).findings
    assert str(finding) == "data: 1 sample with another mask: clips/clip_0.mp4"


@pytest.mark.slow
def test_what_memory_chose_is_trained_again_as_it_was(folder, within: Run, one_decoder: None) -> None:
    """Slow: all is trained twice. On another machine [memory] might choose otherwise."""
    within("run", folder.write('\n[memory]\nlimit = "8 GiB"\n', steps=4, save=2))
    found = api.verify(folder.output, all=True)
    assert found.verdict == "sound"
    assert all_bits(found) == [(0, 2), (2, 4)]


@pytest.mark.slow
def test_a_runs_folder_that_was_moved_alone_is_verified_with_the_data_where_it_was(folder, within: Run) -> None:
    """Slow: a run and a verification. The folder above the new place is there, and has no clips."""
    within("run", folder.write(steps=4, save=2))
    moved = folder.path / "archive" / "out"
    moved.parent.mkdir()
    folder.output.rename(moved)
    found = api.verify(moved)
    assert found.verdict == "sound"
    assert all_bits(found) == [(2, 4)]


@pytest.mark.slow
def test_one_checkpoint_alone_is_trained_again_from_step_0(folder, within: Run) -> None:
    """Slow: a run and a verification."""
    within("run", folder.write("keep = 1\n", steps=6))
    found = api.verify(folder.output)
    assert found.verdict == "sound"
    assert all_bits(found) == [(0, 6)]


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_trained_to_hinders_no_other(folder, within: Run) -> None:
    """Slow: all is trained twice."""
    within("run", folder.write(steps=9))
    (checkpoint(folder, 6) / "config.toml").write_text("[run", encoding="utf-8")
    found = api.verify(folder.output, all=True)
    assert found.verdict == "not sound"
    assert [(each.first, each.last) for each in found.retrained] == [(0, 3)]
    assert len(found.not_compared) == 2


@pytest.mark.slow
def test_a_step_that_was_skipped_has_no_row_and_is_skipped_again(
    folder, within: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow: a run and a verification. The loss of step 2 is not finite each time."""
    whole = step.Step.forward

    def forward(self: Any, given: Any) -> Any:
        found = whole(self, given)
        factor = math.nan if given.step == 1 else 1.0
        return step.StepOutput(found.loss * factor, found.flow * factor, found.metrics)

    monkeypatch.setattr(step.Step, "forward", forward)
    text = folder.write(steps=4, save=4).read_text(encoding="utf-8")
    folder.config.write_text(text.replace("[train]", "[train]\nskip_nonfinite = 2"), encoding="utf-8")
    within("run", folder.config)
    assert [row["step"] for row in folder.rows()] == [1, 3, 4]
    found = api.verify(folder.output)
    assert found.verdict == "sound"
    assert [each.rows for each in found.retrained] == [3]
