"""Steps that are not finite: the debug record, and steps that are skipped and counted."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vtrain.contract import TrainingError
from vtrain.train import failures, step
from vtrain.train.failures import block_of, write_failure
from vtrain.train.readings import Failure, Reading
from vtrain.train.step import StepInput

Run = Callable[..., subprocess.CompletedProcess[str]]

DIVERGES = "1e-3\nweight_decay = 1e38"


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """breaks(4, 5): the flow loss of these steps is NaN, whatever the weights are."""

    def at(*steps: int) -> None:
        whole = step.Step.forward

        def forward(self: Any, given: StepInput) -> Any:
            found = whole(self, given)
            if given.step + 1 not in steps:
                return found
            return step.StepOutput(found.loss * math.nan, found.flow * math.nan, found.metrics)

        monkeypatch.setattr(step.Step, "forward", forward)

    return at


def limited(folder: Any, limit: int, **values: Any) -> Path:
    file: Path = folder.write(**values)
    text = file.read_text(encoding="utf-8").replace("[train]", f"[train]\nskip_nonfinite = {limit}")
    file.write_text(text, encoding="utf-8")
    return file


def events(folder: Any, kind: str) -> list[dict[str, Any]]:
    lines = (folder.output / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == kind]


def test_a_broken_step_leaves_a_record_from_which_its_inputs_come_back_and_no_checkpoint(
    folder: Any, within: Run
) -> None:
    done = within("run", folder.write(steps=40, save=5, lr=DIVERGES, log_every=10), check=2)
    named = re.search(
        r"step (\d+): the loss is not finite; samples: clips/clip_\d\.mp4 \(noise level 0\.\d+\)", done.stderr
    )
    assert named is not None, done.stderr
    made = folder.output / "failures" / f"step-{int(named[1]):06d}"
    assert str(made) in done.stdout
    record = json.loads((made / "record.json").read_text(encoding="utf-8"))
    assert record["step"] == int(named[1])
    assert record["settings"]["optimizer.lr"] == 1e-3
    assert set(record["weights_not_finite"]) >= {f"denoiser_module.blocks.{n}" for n in range(3)}
    (broken,) = [each for each in record["micro_batches"] if each["file"]]
    assert broken["flow"] == ["nan", "nan"]
    tensors = load_file(made / broken["file"])
    assert {"clean", "noise", "sigma", "timestep", "text.text", "text.text.mask"} <= tensors.keys()
    assert tensors["sigma"].tolist() == pytest.approx(broken["sigmas"])
    assert not list((folder.output / "checkpoints").glob("step-*"))


def test_a_skipped_step_leaves_the_weights_as_they_were_and_the_data_goes_on(
    folder: Any, another: Callable[[], Any], within: Run, breaks: Callable[..., None]
) -> None:
    """A run that skips step 3 is that run with a rate of 0 there, but for the optimizer's own count of steps."""
    breaks(3)
    done = within("run", limited(folder, 2, save=2, lr="1e-3\nbetas = [0.0, 0.0]"))
    assert "step 3 skipped (1 of at most 2): the loss is not finite; samples: clips/clip_" in done.stdout
    assert [row["step"] for row in folder.rows()] == [1, 2, 4, 5, 6]
    (event,) = events(folder, "stepskipped")
    assert (event["step"], event["skipped"], event["limit"], len(event["samples"])) == (3, 1, 2, 2)
    assert all(value.isfinite().all() for value in folder.tensors(6).values())
    record = json.loads((folder.output / "failures" / "step-000003" / "record.json").read_text(encoding="utf-8"))
    assert record["weights_not_finite"] == {}
    assert record["gradient_norms"]["denoiser_module.blocks.0"] == "nan"
    plain = another()
    within("run", limited(plain, 2, steps=2, save=2, lr="1e-3\nbetas = [0.0, 0.0]"))
    assert plain.rows()[0]["samples"] == folder.rows()[0]["samples"]


def test_the_count_is_resumed_and_the_limit_ends_the_run(
    folder: Any, another: Callable[[], Any], within: Run, breaks: Callable[..., None]
) -> None:
    breaks(2, 5)
    within("run", limited(folder, 2, save=3))
    resumed = another()
    shutil.copytree(folder.output / "checkpoints" / "step-000003", resumed.output / "checkpoints" / "step-000003")
    within("run", limited(resumed, 2, save=3))
    assert [each["skipped"] for each in events(resumed, "stepskipped")] == [2]
    whole, other = folder.tensors(6), resumed.tensors(6)
    assert all(torch.equal(whole[name], other[name]) for name in whole)
    assert folder.rows()[2:] == resumed.rows()
    stopped = another()
    shutil.copytree(folder.output / "checkpoints" / "step-000003", stopped.output / "checkpoints" / "step-000003")
    done = within("run", limited(stopped, 1, save=3), check=2)
    assert "2 steps were not finite, and train.skip_nonfinite allows 1." in done.stderr
    assert (stopped.output / "failures" / "step-000005").is_dir()


def test_the_gradients_of_a_skipped_step_are_gone_where_the_optimizer_moves_copies(
    folder: Any, within: Run, breaks: Callable[..., None], card_in_ram: Any
) -> None:
    """offload.optimizer: what stayed in the parameters would be added to the next step's."""
    breaks(3)
    within("run", limited(folder, 1, more="\n[offload]\noptimizer = true\n"))
    assert card_in_ram.pinned
    assert [row["step"] for row in folder.rows()] == [1, 2, 4, 5, 6]
    assert all(value.isfinite().all() for value in folder.tensors(6).values())


def test_a_first_step_that_is_skipped_is_no_fault_of_the_optimizer(
    folder: Any, within: Run, breaks: Callable[..., None]
) -> None:
    breaks(1)
    assert "step 1 skipped" in within("run", limited(folder, 1)).stdout


def test_without_the_option_nothing_is_skipped(folder: Any, within: Run, breaks: Callable[..., None]) -> None:
    breaks(3)
    assert "step 3: the loss is not finite" in within("run", folder.write(), check=2).stderr


def failure(step: int, *micro: int) -> Failure:
    parts = [Reading(step, number, math.nan, [math.nan], {}, [0.5], (f"clip {number}",)) for number in micro]
    return Failure(step, TrainingError("broken"), parts, 1e-3, math.inf)


def test_a_record_is_limited_in_size_and_number_and_written_as_a_whole(
    tmp_path: Path, given: Callable[[int], StepInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(each.nbytes for _, each in failures._tensors(given(1)))
    monkeypatch.setattr(failures, "LARGEST", size)
    for number in range(1, 8):
        made = write_failure(tmp_path, failure(number, 1, 2), {}, lambda micro, step: given(1))
    record = json.loads((made / "record.json").read_text(encoding="utf-8"))
    assert record["left_out"] == [2]
    assert record["grad_norm"] == "inf"
    assert [each["file"] for each in record["micro_batches"]] == ["micro-000001.safetensors", None]
    assert sorted(path.name for path in made.parent.iterdir()) == [f"step-{n:06d}" for n in range(3, 8)]

    def torn(micro: int, step: int) -> StepInput:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_failure(tmp_path, failure(7, 1), {"other": 1}, torn)
    assert json.loads((made / "record.json").read_text(encoding="utf-8"))["settings"] == {}, "the whole one stays"


def test_parameters_are_counted_by_block() -> None:
    assert block_of("denoiser_module.transformer_blocks.3.attn1.to_q.weight") == "denoiser_module.transformer_blocks.3"
    assert block_of("denoiser_module.proj_out.weight") == "denoiser_module.proj_out"
