"""Runs with [ema]: what is saved, resumed, shown, and what is said of it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vtrain import api
from vtrain.contract import Event, Generating, Noted, Stepped, TrainingError, Validated, Validating

Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.usefixtures("one_decoder")
EMA = "\n[ema]\ndecay = 0.9\n"


def events_of(config: Path) -> list[Event]:
    with api.run(config) as session:
        return list(session)


def notes(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Noted))


def weights(folder: Any, step: int, *below: str) -> dict[str, Tensor]:
    """Those that a checkpoint has, without the optimizer's."""
    at = folder.output.joinpath("checkpoints", f"step-{step:06d}", *below)
    found = [file for file in at.glob("*.safetensors") if "optimizer" not in file.name]
    assert len(found) == 1
    return load_file(found[0])


@pytest.mark.parametrize("more", [pytest.param("", marks=pytest.mark.slow), "warmup = false\nupdate_every = 4\n"])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_resumed_run_has_the_average_of_the_uninterrupted_one_bit_for_bit(
    folder, another, train: str, more: str
) -> None:
    """Also where the checkpoint lies between two updates; and it is not the weights. Slow: the simpler case, at every step."""
    straight, settings = another(), {"train": train, "steps": 12, "save": 6, "more": EMA + more}
    events_of(straight.write(**settings))
    with api.run(folder.write(**settings)) as session:
        for event in session:
            if isinstance(event, Stepped) and event.step == 6:
                session.ask("stop")
    assert [path.name for path in (folder.output / "checkpoints").iterdir()] == ["step-000006"]
    assert "average" not in notes(events_of(folder.config))
    expected, got = straight.tensors(12), folder.tensors(12)
    assert any(name.startswith("ema/") for name in got)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in got)
    averaged, raw = weights(folder, 12, "ema"), weights(folder, 12)
    assert averaged.keys() == raw.keys()
    assert any(not torch.equal(averaged[name], raw[name]) for name in raw)


@pytest.mark.parametrize("train", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_training_with_an_average_is_the_same_training(folder, another, train: str) -> None:
    plain = another()
    events_of(plain.write(train=train, more=folder.validation(one="gradient", two="another")))
    events_of(
        folder.write(train=train, more=folder.validation(one="gradient", two="another") + EMA + 'validation = "both"\n')
    )
    assert folder.rows() == plain.rows()
    mine = folder.tensors(6)
    assert all(torch.equal(mine[name], value) for name, value in plain.tensors(6).items())
    for name in ("one", "two"):  # also the videos of the weights in training
        path = f"samples/step-000006/{name}.mp4"
        assert (folder.output / path).read_bytes() == (plain.output / path).read_bytes()


@pytest.mark.parametrize(
    ("which", "names"),
    [("raw", ["one", "two"]), ("ema", ["one.ema", "two.ema"]), ("both", ["one", "one.ema", "two", "two.ema"])],
)
def test_videos_are_made_with_the_weights_that_were_asked_for(folder, which: str, names: list[str]) -> None:
    events = events_of(
        folder.write(lr=1e-2, more=folder.validation(one="gradient", two="another") + EMA + f'validation = "{which}"\n')
    )
    done = [event for event in events if isinstance(event, Validated)][-1]
    assert done.failures == ()
    assert list(done.files) == names
    assert [path.name for path in done.files.values()] == [f"{name}.mp4" for name in names]
    assert list(done.averaged) == [name for name in names if name.endswith(".ema")]
    assert done.sheet is not None
    videos = next(event.videos for event in events if isinstance(event, Validating))
    assert videos == len(names)
    assert {event.videos for event in events if isinstance(event, Generating)} == {videos}
    assert max(event.video for event in events if isinstance(event, Generating)) == videos
    if which == "both":
        assert done.files["one"].read_bytes() != done.files["one.ema"].read_bytes()


def test_an_average_that_is_switched_on_starts_from_the_checkpoints_weights_and_says_so(folder) -> None:
    events_of(folder.write(steps=3))
    start = weights(folder, 3)
    said = notes(events_of(folder.write(steps=4, more=EMA + "warmup = false\n")))
    assert "the checkpoint has no average (ema): it starts from the weights of step 3" in said
    assert json.loads((folder.output / "checkpoints/step-000004/ema.json").read_text()) == {"steps": 1, "taken": 1}
    end, found = weights(folder, 4), weights(folder, 4, "ema")
    for name, value in found.items():
        assert torch.allclose(value, torch.lerp(start[name], end[name], 0.1), rtol=1e-5, atol=1e-7)


def test_one_that_is_switched_off_ends_and_on_again_it_is_a_new_one(folder) -> None:
    events_of(folder.write(steps=2, more=EMA))
    said = notes(events_of(folder.write(steps=4)))
    assert "the checkpoint's average ends here" in said
    assert not (folder.output / "checkpoints/step-000004/ema.json").exists()
    assert not (folder.output / "checkpoints/step-000004/ema").exists()
    said = notes(events_of(folder.write(steps=5, more=EMA)))
    assert "it starts from the weights of step 4" in said
    assert json.loads((folder.output / "checkpoints/step-000005/ema.json").read_text())["steps"] == 1


def test_weights_that_break_the_run_reach_no_average_that_anybody_sees(folder) -> None:
    """The update itself looks at nothing: the run ends before a checkpoint, and the one before is whole."""
    broken = "lr = 1e-3\nweight_decay = 1e38"
    events_of(folder.write(steps=3, save=3, more=EMA))
    text = folder.write(
        steps=9, save=9, log_every=50, more=EMA + folder.validation("6 steps", one="gradient", two="another")
    )
    text.write_text(text.read_text().replace("lr = 0.001", broken))
    with pytest.raises(TrainingError):
        events_of(folder.config)
    assert [path.name for path in (folder.output / "checkpoints").iterdir()] == ["step-000003"]
    assert not (folder.output / "samples").exists()
    assert all(bool(value.isfinite().all()) for value in weights(folder, 3, "ema").values())


def test_an_average_that_is_of_another_model_is_refused_by_name(folder, within: Run) -> None:
    events_of(folder.write(steps=2, more=EMA))
    file = folder.output / "checkpoints/step-000002/ema.json"
    file.write_text('{"steps": 2, "taken": 3}')
    for manifest in file.parent.glob("MANIFEST.json"):
        content = json.loads(manifest.read_text())
        content["files"]["ema.json"] = {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        manifest.write_text(json.dumps(content))
    done = within("run", folder.write(steps=3, more=EMA), check=2)
    assert "ema.json: taken is 3, and steps 2." in done.stderr


def test_the_plan_says_how_long_the_average_is_and_where_it_lies(folder, within: Run) -> None:
    printed = within(
        "plan",
        folder.write(
            steps=2000,
            more=folder.validation(one="gradient", two="another") + '\n[ema]\nupdate_every = 5\nvalidation = "both"\n',
        ),
    ).stdout
    for words in (
        "decay 0.999, warm-up to step 8,990: at the end over about the last 223 of 2,000 steps, updated every 5 steps",
        "fp32 of all weights",
        "on the device",
        "each twice, with the weights in training and with the averaged ones",
    ):
        assert words in " ".join(printed.split()), words
    assert "ema.decay" not in printed


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("", "its warm-up never ends, and the average is over about the last 2 steps"),
        ("warmup = false", "99% of the average at the end is the weights that training began with"),
        ("warmup = false", "no warm-up: at the end over all 6 steps and the weights before them"),
        ("update_every = 50", "never updated in 6 steps"),
        ("update_every = 50", "ema.update_every is 50 steps and the run 6: the average stays at the first weights"),
        ('validation = "both"', "ema.validation has no effect: there is no [validation]"),
    ],
)
def test_what_does_not_go_with_the_run_is_a_warning(folder, within: Run, table: str, words: str) -> None:
    printed = within("plan", folder.write(more=f"\n[ema]\n{table}\n")).stdout
    assert words in " ".join(printed.split())


def test_a_nickname_whose_file_would_be_anothers_is_refused(folder, within: Run) -> None:
    more = folder.validation(**{"one": "gradient", "one.ema": "another"}) + EMA
    done = within("plan", folder.write(more=more), check=2)
    assert 'is the video of "one" with averaged weights (ema.validation), too.' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("line", ["decay = 1.0", "decay = -0.1", "update_every = 0", 'on = "gpu"', "use_ema = true"])
def test_nonsense_is_refused_with_its_line(folder, within: Run, line: str) -> None:
    done = within("plan", folder.write(more=f"\n[ema]\n{line}\n"), check=2)
    assert "config.toml:" in done.stderr
    assert "Traceback" not in done.stderr
