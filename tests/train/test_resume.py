"""A run that is killed and resumed is the same run, bit for bit; and what a resume allows to change."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vtrain.contract import CheckpointError
from vtrain.run.prepare import planned
from vtrain.train import resume
from vtrain.train.resume import RunState, Start, find_start
from vtrain.train.settings import Change, Setting, compare, counted_once, settings

Run = Callable[..., subprocess.CompletedProcess[str]]
Begin = Callable[..., subprocess.Popen[str]]
SMOOTH = '\n[[regularizer]]\nuse = "toy-smooth"\nblock = 1\nweight = 0.1\n'


def wait(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until it is true or the process has ended; no more than 200 s, of which a start takes most on a busy machine."""
    end = time.monotonic() + 200
    while not true() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.long
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_killed_and_resumed_run_is_the_same_run_bit_for_bit(
    folder, another, vtrain: Run, within: Run, start: Begin, train: str
) -> None:
    """Kill -9 somewhere after the first checkpoint, within an accumulation or not: weights, optimizer and numbers agree.

    Full training is resumed in a process of its own, in which nothing is left of an earlier run.
    """
    settings = {"train": train, "steps": 40, "save": 5, "accumulate": 2, "log_every": 4, "more": SMOOTH}
    straight = another()
    within("run", straight.write(**settings))
    process = start("run", folder.write(**settings))
    wait((folder.output / "checkpoints" / "step-000005").exists, process)
    process.kill()
    process.wait()
    saved = sorted(path.name for path in (folder.output / "checkpoints").glob("step-??????"))
    assert saved
    assert saved[-1] != "step-000040", "the run was over before it could be killed"
    resumed = vtrain("run", folder.config) if train == "full" else within("run", folder.config)
    assert "resuming from" in resumed.stdout
    assert folder.rows() == straight.rows()
    assert [row["step"] for row in folder.rows()] == list(range(1, 41))
    expected, got = straight.tensors(40), folder.tensors(40)
    assert expected.keys() == got.keys()
    assert any("regularizers" in name for name in got)
    assert any("optimizer" in name for name in got)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_ends_cleanly_and_the_run_goes_on_from_there(
    folder, another, within: Run, start: Begin, number: signal.Signals, code: int
) -> None:
    """SIGTERM: below, in the background."""
    # So many that a busy machine sends the signal before they are done.
    settings = {"steps": 30000, "save": 30000, "log_every": 5}
    process = start("run", folder.write(**settings))
    wait((folder.output / "metrics.jsonl").exists, process)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == code, printed
    assert "stopped as asked; the same command resumes" in printed
    assert "Traceback" not in printed
    saved = list((folder.output / "checkpoints").iterdir())
    assert len(saved) == 1
    done = int(saved[0].name.removeprefix("step-"))
    assert 0 < done < 30000
    assert len(folder.rows()) == done
    shorter = {**settings, "steps": done + 3}
    folder.write(**shorter)
    printed = within("run", folder.config).stdout
    assert f"changed since the checkpoint: train.steps: 30000 -> {done + 3}" in printed
    assert [row["step"] for row in folder.rows()] == list(range(1, done + 4))


def test_a_run_whose_output_nobody_reads_any_more_saves_and_ends(folder, start: Begin) -> None:
    """As `vtrain run config.toml | head` does."""
    process = start("run", folder.write(steps=30000, save=30000, log_every=5))
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step "))
    process.stdout.close()
    process.stdout = None
    assert process.wait(60) == 128 + signal.SIGPIPE
    (saved,) = (folder.output / "checkpoints").iterdir()
    assert 0 < int(saved.name.removeprefix("step-")) < 300


def test_a_run_whose_output_nobody_reads_from_the_start_trains_nothing(folder, start: Begin) -> None:
    process = start("run", "--json", folder.write(steps=300, save=1000))
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert not (folder.output / "checkpoints").exists()


def test_a_run_in_the_background_of_a_script_ignores_ctrl_c_and_saves_at_sigterm(folder, start: Begin) -> None:
    process = start("run", folder.write(steps=3000, save=10_000, log_every=1), background=True)
    steps = folder.output / "metrics.jsonl"
    wait(steps.exists, process)
    process.send_signal(signal.SIGINT)
    seen = steps.read_bytes().count(b"\n")
    wait(lambda: steps.read_bytes().count(b"\n") >= seen + 3, process)  # who hears it, ends a step later
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143, printed
    done = len(folder.rows())
    assert done >= seen + 3
    assert [path.name for path in (folder.output / "checkpoints").iterdir()] == [f"step-{done:06d}"]


def test_changes_that_may_be_made_are_applied_and_shown(folder, within: Run) -> None:
    folder.write(steps=3)
    within("run", folder.config)
    folder.write(steps=6, lr=5e-4, log_every=1)
    printed = within("run", folder.config).stdout
    assert "changed since the checkpoint: optimizer.lr: 0.001 -> 0.0005" in printed
    assert "changed since the checkpoint: train.steps: 3 -> 6" in printed
    assert max(row["lr"] for row in folder.rows()[3:]) <= 5e-4


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ({"train": "lora"}, {"train": "lora", "rank": 8}, "model.lora.rank: was 4 and is now 8"),
        ({}, {"train": "lora"}, 'model.train: was "full" and is now "lora"'),
        ({"batch_size": 2}, {"batch_size": 1}, "train.batch_size: was 2 and is now 1"),
        ({}, {"more": SMOOTH}, 'regularizer[0].use: was absent and is now "toy-smooth"'),
    ],
)
def test_changes_that_would_make_it_another_run_are_refused(
    folder, within: Run, before: dict, after: dict, key: str
) -> None:
    within("run", folder.write(steps=3, **before))
    kept = folder.tensors(3)
    done = within("run", folder.write(steps=6, **after), check=2)
    assert key in done.stderr
    assert "Traceback" not in done.stderr
    assert kept.keys() == folder.tensors(3).keys()


LORA_TABLE = 'use = "toy"\ntrain = "lora"\n[model.lora]\n'
CLIPS = 'use = "folder"\npath = "clips"\n'


@pytest.mark.parametrize(
    ("before", "after", "keys"),
    [
        ({}, {"run": 'output_dir = "out"\nseed = 8'}, ["run.seed"]),
        ({"model": LORA_TABLE}, {"model": LORA_TABLE + "rank = 4"}, ["model.lora.rank"]),
        (
            {"model": LORA_TABLE + "alpha = 8.0"},
            {"model": LORA_TABLE + "rank = 4"},
            ["model.lora.alpha", "model.lora.rank"],
        ),
        (
            {"model": LORA_TABLE},
            {"model": LORA_TABLE + "rank = 4\nalpha = 8.0"},
            ["model.lora.alpha", "model.lora.rank"],
        ),
        ({}, {"model": LORA_TABLE + "rank = 8\ndropout = 0.5"}, ["model.train"]),
        ({"model": LORA_TABLE + "rank = 8"}, {}, ["model.train"]),
        ({}, {"model": LORA_TABLE, "precision": 'base = "fp32"'}, ["model.train"]),
        ({"model": LORA_TABLE}, {"model": LORA_TABLE, "precision": 'base = "fp32"'}, ["precision.base"]),
        ({}, {"more": SMOOTH}, ["regularizer[0].use"]),
        ({"more": SMOOTH}, {}, ["regularizer[0].use"]),
        ({}, {"data": CLIPS + "[data.video]\nframes = 5"}, ["data[0].video.frames"]),
        (
            {},
            {"data": CLIPS + "[data.video]\nframes = 5\nmin_frames = 1"},
            ["data[0].video.frames", "data[0].video.min_frames"],
        ),
        ({}, {"data": 'use = "folder"\npath = "others"'}, ["data[0].path"]),
        ({}, {"data": 'use = "folder"\npath = "others"\nid = "b"'}, ["data[0].id", "data[0].path"]),
    ],
)
def test_one_changed_key_is_counted_once(
    plan_of: Callable[..., Any], before: dict[str, str], after: dict[str, str], keys: list[str]
) -> None:
    """And two keys that the file changes are two, though one follows from the other where the file does not say it."""
    old = {key: setting.value for key, setting in settings(plan_of(**before)).items()}
    plan = plan_of(**after)
    told = counted_once(compare(old, settings(plan)), plan.config)
    # An option that may change is told beside the part that brings it.
    assert [each.key for each in told if each.key != "regularizer[0].weight"] == keys


def test_another_model_is_refused(folder, within: Run) -> None:
    within("run", folder.write(steps=3))
    text = folder.config.read_text().replace('use = "toy"', 'use = "toy"\nwidth = 48')
    folder.config.write_text(text)
    assert "model.width: was 32 and is now 48" in within("run", folder.config, check=2).stderr


def test_a_flipped_byte_in_the_newest_checkpoint_is_named_and_the_one_before_is_used(
    folder, another, within: Run
) -> None:
    straight = another()
    within("run", straight.write(steps=9))
    within("run", folder.write(steps=6))
    victim = folder.output / "checkpoints" / "step-000006" / "optimizer.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    printed = within("run", folder.write(steps=9)).stdout
    assert "optimizer.safetensors is damaged" in printed
    assert "resuming from" in printed
    assert "3 later steps were cut from metrics.jsonl" in printed
    # Six steps were planned at first, so the rates of its first three steps are of that shorter cosine.
    assert [row["samples"] for row in folder.rows()] == [row["samples"] for row in straight.rows()]


def test_a_file_too_many_in_the_newest_checkpoint_is_named_and_the_one_before_is_used(folder, within: Run) -> None:
    within("run", folder.write(steps=6))
    (folder.output / "checkpoints" / "step-000006" / "denoiser (1).safetensors").write_bytes(b"")
    (folder.output / "checkpoints" / "step-000003" / ".DS_Store").write_bytes(b"")
    printed = within("run", folder.config).stdout
    assert "it holds denoiser (1).safetensors, which its MANIFEST.json does not list" in printed
    assert f"resuming from {folder.output / 'checkpoints' / 'step-000003'} (step 3)" in printed


def without_pieces(checkpoint: Path, *skipped: str) -> None:
    """Give it the manifest that vtrain wrote before it listed pieces; `skipped`: files that go from list and folder."""
    path = checkpoint / "MANIFEST.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["pieces"]
    for name in skipped:
        del manifest["files"][name]
        (checkpoint / name).unlink()
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def change_state(checkpoint: Path, change: Callable[[dict], object]) -> None:
    """Change what its state says, and the manifest with it."""
    file = checkpoint / "state.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    change(state)
    file.write_text(json.dumps(state), encoding="utf-8")
    reseal(checkpoint)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_checkpoint_from_before_pieces_were_listed_goes_on_to_the_same_run(
    folder, another, within: Run, train: str
) -> None:
    straight = another()
    within("run", straight.write(train=train, more=SMOOTH))
    shutil.copytree(straight.output, folder.output)
    shutil.rmtree(folder.output / "checkpoints" / "step-000006")
    older = folder.output / "checkpoints" / "step-000003"
    without_pieces(older, "samples.npz", "records.json")
    change_state(older, lambda state: [state.pop(key) for key in ("encoders", "folder")])
    printed = within("run", folder.write(train=train, more=SMOOTH)).stdout
    assert "resuming from" in printed
    assert "the checkpoint" not in printed, "nothing changed"
    assert "WARNING" not in printed
    expected, got = straight.tensors(6), folder.tensors(6)
    assert expected.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    assert folder.rows() == straight.rows()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("optimizer.json", "this checkpoint has no optimizer.json, which optimizer must have"),
        ("regularizers/toy-smooth.safetensors", "which regularizer toy-smooth must have"),
        ("state.json", "state.json: cannot be read"),
    ],
)
def test_an_older_checkpoint_without_a_file_that_it_must_have_is_an_error_that_names_it(
    folder, within: Run, name: str, reason: str
) -> None:
    within("run", folder.write(steps=3, more=SMOOTH))
    without_pieces(folder.output / "checkpoints" / "step-000003", name)
    done = within("run", folder.write(steps=4, more=SMOOTH), check=2)
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_of_before_keys_were_renamed_is_resumed_and_nothing_has_changed(folder, within: Run) -> None:
    """Of before: other names, [validation.prompts] as one value, regularizers by their name instead of their place."""
    gradient = "\n[train.gradient_clip]\nmax = 1.0\n[data.video]\nframe_step = 1\n"
    within("run", folder.write(steps=3, more=SMOOTH + gradient))

    def as_before(state: dict) -> None:
        old = {
            key.replace("train.gradient_clip", "train.clip")
            .replace("video.frame_step", "video.frame_interval")
            .replace("regularizer[0]", "regularizer.toy-smooth"): value
            for key, value in state["settings"].items()
        }
        assert {"train.clip.max", "data[0].video.frame_interval", "regularizer.toy-smooth.use"} <= old.keys()
        state["settings"] = old

    change_state(folder.output / "checkpoints" / "step-000003", as_before)
    printed = within("run", folder.write(steps=4, more=SMOOTH + gradient)).stdout
    assert "resuming from" in printed
    assert [line for line in printed.splitlines() if "changed since" in line] == [
        "changed since the checkpoint: train.steps: 3 -> 4"
    ]


def reseal(folder: Path) -> None:
    """Make the manifest say what state.json is now."""
    manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
    raw = (folder / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_when_no_checkpoint_is_sound_nothing_is_started_over_them(folder, within: Run) -> None:
    within("run", folder.write(steps=3))
    (folder.output / "checkpoints" / "step-000003" / "MANIFEST.json").unlink()
    done = within("run", folder.config, check=2)
    assert "no checkpoint here is sound" in done.stderr
    assert "never finished" in done.stderr


def test_never_refuses_a_folder_that_holds_checkpoints(folder, within: Run) -> None:
    within("run", folder.write(steps=3))
    folder.write(steps=3)
    folder.config.write_text(folder.config.read_text().replace("seed = 7", 'seed = 7\nresume = "never"'))
    assert "holds checkpoints of an earlier run" in within("run", folder.config, check=2).stderr


def test_an_earlier_checkpoint_can_be_named_and_later_ones_are_left_behind(folder, within: Run) -> None:
    within("run", folder.write(steps=6))
    first = folder.rows()
    text = folder.config.read_text()
    folder.config.write_text(text.replace("seed = 7", 'seed = 7\nresume = "step-000009"'))
    refused = within("run", folder.config, check=2).stderr
    assert f"In {folder.output / 'checkpoints'} there are step-000003, step-000006." in refused
    named = folder.output / "checkpoints" / "step-000003"
    folder.config.write_text(text.replace("seed = 7", 'seed = 7\nresume = "step-000003"'))
    printed = within("run", folder.config).stdout
    assert f"resuming from {named} (step 3)" in printed
    assert "step-000006.left-behind-1" in printed
    assert folder.rows() == first
    assert sorted(p.name for p in (folder.output / "checkpoints").iterdir()) == [
        "step-000003",
        "step-000006",
        "step-000006.left-behind-1",
    ]


def test_a_checkpoint_that_does_not_exist_is_an_error_before_training(folder, within: Run) -> None:
    folder.write(steps=3)
    folder.config.write_text(folder.config.read_text().replace("seed = 7", 'seed = 7\nresume = "nowhere"'))
    done = within("run", folder.config, check=2)
    assert "no checkpoint folder" in done.stderr
    assert not folder.output.exists()


def test_a_state_that_cannot_be_is_refused_though_its_manifest_fits(folder, within: Run) -> None:
    within("run", folder.write(steps=3))
    named = folder.output / "checkpoints" / "step-000003"
    change_state(named, lambda state: state.update(step=-5))
    done = within("run", folder.write(steps=6), check=2)
    assert f"{named / 'state.json'}: step is -5: input should be greater than or equal to 0." in done.stderr
    assert "Traceback" not in done.stderr


def test_what_changed_in_the_data_and_the_records_is_told_and_the_run_goes_on(
    folder, within: Run, tmp_path: Path
) -> None:
    """A clip less, one more, one with other bytes, one with another caption; and a line less of metrics.jsonl."""
    clips = tmp_path / "own"
    shutil.copytree(tmp_path / "clips", clips)
    folder.write(steps=3)
    folder.config.write_text(folder.config.read_text().replace('"clips"', '"own"'))
    within("run", folder.config)
    (clips / "clip_4.mp4").unlink()
    shutil.copy(clips / "clip_1.mp4", clips / "clip_3.mp4")
    (clips / "clip_0.txt").write_text("another gradient", encoding="utf-8")
    shutil.copy(clips / "clip_2.mp4", clips / "clip_5.mp4")
    (clips / "clip_5.txt").write_text("one more", encoding="utf-8")
    metrics = folder.output / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[::2]))
    folder.config.write_text(folder.config.read_text().replace("steps = 3\n", "steps = 5\n", 1))
    printed = within("run", folder.config).stdout
    data = (
        "the data changed since the checkpoint: 1 sample added (own/clip_5.mp4); 1 sample removed (own/clip_4.mp4); "
        "1 sample with other bytes (own/clip_3.mp4); 1 sample with other captions (own/clip_0.mp4). "
        "Training continues with it as it is, in the new data's order"
    )
    assert data in printed
    assert "WARNING: metrics.jsonl lacks step 2" in printed
    assert [row["step"] for row in folder.rows()] == [1, 3, 4, 5]
    resumed = json.loads((folder.output / "plan.json").read_text(encoding="utf-8"))["resumed"]
    assert resumed["step"] == 3
    assert resumed["changes"] == [
        "changed since the checkpoint: train.steps: 3 -> 5", data, "metrics.jsonl lacks step 2",
    ]  # fmt: skip


def test_a_project_that_was_moved_goes_on_to_the_same_run(
    folder, within: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configuration, clips, cache, model and output together; the model's path is spelt another way there."""
    from vtrain_toy.family import TOY

    project, moved = tmp_path / "project", tmp_path / "elsewhere" / "deeper"
    project.mkdir()
    shutil.copytree(tmp_path / "clips", project / "clips")
    denoiser = TOY.build(TOY.options.model_validate({"init_seed": 1})).load_denoiser("cpu", "fp32")
    denoiser.save(project / "weights", denoiser.module.state_dict())
    here = type(folder)(project, Path("cache"))
    here.write(train="lora")
    here.config.write_text(here.config.read_text().replace('use = "toy"', 'use = "toy"\npath = "weights"'))
    monkeypatch.chdir(project)
    within("run", "config.toml")
    monkeypatch.chdir(tmp_path)
    expected, rows = here.tensors(6), here.rows()
    shutil.copytree(project, moved)
    shutil.rmtree(project)
    there = type(folder)(moved, Path("cache"))
    shutil.rmtree(there.output / "checkpoints" / "step-000006")
    there.config.write_text(there.config.read_text().replace('"weights"', '"clips/../weights"'))
    printed = within("run", there.config).stdout
    assert f"resuming from {there.output / 'checkpoints' / 'step-000003'} (step 3)" in printed
    assert "the checkpoint:" not in printed, "nothing changed"
    assert "WARNING" not in printed
    assert there.rows() == rows
    got = there.tensors(6)
    assert expected.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_places_that_lie_alike_in_a_project_that_was_moved_are_told_from_others(tmp_path: Path) -> None:
    """Also by the output folder alone, of a checkpoint that does not say where the configuration was."""
    config = SimpleNamespace(
        path=tmp_path / "b" / "config.toml", run=SimpleNamespace(output_dir=tmp_path / "b" / "out")
    )
    before = RunState(3, 3, {"run.output_dir": "/a/out"}, "", "")

    def alike(state: RunState, old: object, new: object) -> bool:
        return resume.Relocation.of(state, config).alike(Change("model.path", old, new, "refuse", location=True))  # type: ignore[arg-type]

    for state in (before, replace(before, folder="/a")):
        assert alike(state, "/a/model", str(tmp_path / "b" / "model"))
        assert alike(state, "/a/model", str(tmp_path / "b" / "clips" / ".." / "model"))
        assert not alike(state, "/a/model", str(tmp_path / "model"))
        assert not alike(state, "/a/model", "/a/model")
        assert not alike(state, "owner/name", "owner/name")
        assert not alike(state, None, str(tmp_path / "b" / "model"))


def test_one_place_spelt_two_ways_is_no_change(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)

    def changes(old: object, new: str) -> list[Change]:
        return compare({"model.path": old}, {"model.path": Setting(new, "refuse", location=True)})

    tiny = str(tmp_path / "tiny")
    for spelt in (f"{tmp_path}/r/../tiny", f"{tmp_path}//tiny/", f"{tmp_path}/link/tiny"):
        assert changes(spelt, tiny) == []
    for other in (f"{tmp_path}/tiny2", None, 5, "owner/tiny", f"{tiny}\0"):
        assert [each.old for each in changes(other, tiny)] == [other]


def test_a_removed_key_counts_only_where_it_was_not_what_holds_for_all_now() -> None:
    assert compare({"sampler.timestep_scale": 1000.0}, {}) == []
    (change,) = compare({"sampler.timestep_scale": 1.0}, {})
    assert (change.key, change.old, change.new, change.resume) == ("sampler.timestep_scale", 1.0, None, "refuse")
    own = {"sampler.timestep_scale": Setting(1000.0, "refuse")}
    assert compare({"sampler.timestep_scale": 1000.0}, own) == [], "a sampler that still has such an option"


def test_another_place_of_a_regularizers_encoder_is_taken_where_its_features_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = SimpleNamespace(regularizers=(("layersync", None), ("crepa", None)))
    change = Change("regularizer[1].encoder", "/a/dino", "facebook/dino", "refuse", location=True)
    monkeypatch.setattr(resume, "feature_marks", lambda plan: {"crepa": "a1"})

    def refused(features: dict[str, str]) -> str:
        state = RunState(3, 3, {}, "", "", features)
        return resume._refused(plan, state, change, resume.Relocation("/p", "/p"))  # type: ignore[arg-type]

    assert refused({"crepa": "a1"}) == ""
    assert refused({"crepa": "b2"}).endswith('is now "facebook/dino", where the encoder is another')
    assert refused({}) == 'was "/a/dino" and is now "facebook/dino"'


def test_another_place_of_the_model_is_taken_where_its_encoders_are_the_same(
    folder, within: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other encoders are refused there, and told at the same place. The denoiser's weights are the checkpoint's own."""
    from vtrain_toy.family import TOY, ToyFamily

    def start() -> Start:
        return find_start(planned(folder.config))

    within("run", folder.write(steps=3))
    denoiser = TOY.build(TOY.options.model_validate({})).load_denoiser("cpu", "fp32")
    denoiser.save(tmp_path / "weights", denoiser.module.state_dict())
    folder.config.write_text(folder.config.read_text().replace('use = "toy"', 'use = "toy"\npath = "weights"'))
    key = "changed since the checkpoint: model.path: absent -> "
    assert start().changes == (f'{key}"{tmp_path / "weights"}"',)
    with monkeypatch.context() as patch:
        patch.setattr(ToyFamily, "video_fingerprint", lambda family, hash_file: "another")
        patch.setattr(ToyFamily, "scheduler_config", lambda family: {"shift": 5})
        with pytest.raises(
            CheckpointError, match=r"video codec and the scheduler's configuration are others; this cannot"
        ):
            start()
    saved = folder.output / "checkpoints" / "step-000003"
    where = json.dumps(str(tmp_path / "weights"))
    change_state(saved, lambda state: state["settings"].update({"model.path": json.loads(where)}))
    with monkeypatch.context() as patch:
        patch.setattr(ToyFamily, "video_fingerprint", lambda family, hash_file: "another")
        patch.setattr("vtrain.train.resume.TRANSFORM_VERSION", 99)
        codec, transform = start().warnings
    assert (
        "the video codec, or an option that shapes it, changed since the checkpoint: clips are encoded again" in codec
    )
    assert "this vtrain cuts and scales clips otherwise" in transform
    change_state(saved, lambda state: [state["settings"].update({"model.path": None}), state.pop("encoders")])
    with pytest.raises(CheckpointError, match=r"model\.path: was absent and is now .*weights\"; this cannot change"):
        start()


def test_an_adapter_does_not_go_on_upon_other_weights_at_the_same_place(folder, within: Run, tmp_path: Path) -> None:
    from vtrain_toy.family import TOY

    def put_weights(seed: int) -> None:
        denoiser = TOY.build(TOY.options.model_validate({"init_seed": seed})).load_denoiser("cpu", "fp32")
        denoiser.save(tmp_path / "weights", denoiser.module.state_dict())

    put_weights(1)
    folder.write(train="lora", steps=3)
    folder.config.write_text(folder.config.read_text().replace('use = "toy"', 'use = "toy"\npath = "weights"'))
    within("run", folder.config)
    put_weights(2)
    folder.config.write_text(folder.config.read_text().replace("steps = 3\n", "steps = 6\n", 1))
    assert "its adapter was trained on other weights than" in within("run", folder.config, check=2).stderr
    put_weights(1)
    within("run", folder.config)


def test_a_default_written_out_is_no_change(folder, within: Run) -> None:
    within("run", folder.write(steps=3))
    text = (
        folder.config.read_text()
        .replace('mixed = "no"', 'mixed = "no"\nbase = "fp32"')
        .replace("steps = 3", "steps = 4", 1)
    )
    folder.config.write_text(text)
    printed = within("run", folder.config).stdout
    assert "precision.base" not in printed
    assert "resuming from" in printed


def test_fewer_steps_than_the_checkpoint_has_is_said_and_changes_nothing(folder, within: Run) -> None:
    within("run", folder.write(steps=6))
    before = folder.rows()
    printed = within("run", folder.write(steps=4)).stdout
    assert "nothing to do: train.steps is 4 and the checkpoint is at 6" in printed
    assert "6 of 4" not in printed
    assert folder.rows() == before


def test_a_finished_run_has_nothing_to_do(folder, within: Run) -> None:
    within("run", folder.write(steps=3))
    before = {path: path.stat().st_mtime_ns for path in (folder.output / "checkpoints").rglob("*")}
    assert "nothing to do: train.steps is 3 and the checkpoint is at 3" in within("run", folder.config).stdout
    assert before == {path: path.stat().st_mtime_ns for path in (folder.output / "checkpoints").rglob("*")}
