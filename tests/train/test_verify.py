"""`vtrain verify` finds what was changed in a run, however carefully."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vtrain import api
from vtrain.contract import CheckpointError
from vtrain.run import retrain, verify
from vtrain.run.lines import Chain, Link
from vtrain.run.output import hold

Run = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Project:
    """A run of 9 steps with checkpoints after each third, its clips beside it."""

    path: Path

    @property
    def output(self) -> Path:
        return self.path / "out"

    def checkpoint(self, step: int) -> Path:
        return self.output / "checkpoints" / f"step-{step:06d}"

    def lines(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / name).read_text(encoding="utf-8").splitlines()]

    def write(self, lines: list[dict[str, Any]], name: str = "metrics.jsonl") -> None:
        (self.output / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def json(self, step: int, name: str, change: Callable[[dict], object]) -> None:
        """Change a file of a checkpoint, and its manifest with it."""
        change_json(self.checkpoint(step) / name, change)
        reseal(self.checkpoint(step))

    def forge(self, begin: int = 3) -> None:
        """Make all checkpoints say what metrics.jsonl and events.jsonl say now, and their hashes and links fit."""
        before = None
        for step in range(begin, 10, 3):
            folder = self.checkpoint(step)

            def said(records: dict, link: Link | None = before) -> None:
                for name, file in records["files"].items():
                    chain = Chain()
                    for line in self.lines(name)[: file["lines"]]:
                        chain.add(line)
                    file["sha256"] = chain.written().sha256
                if link is not None:
                    records["before"] = link.model_dump()

            self.json(step, "records.json", said)
            before = Link.to(step, folder)


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def reseal(folder: Path) -> None:
    """Make the manifest say what the files are now."""

    def seal(manifest: dict) -> None:
        for name, entry in manifest["files"].items():
            raw = (folder / name).read_bytes()
            entry |= {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    change_json(folder / "MANIFEST.json", seal)


def change_tensor(file: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Change the largest tensor of a file; gives its name."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = max(tensors, key=lambda each: tensors[each].numel())
    save_file({**tensors, name: change(tensors[name].clone())}, file, metadata)
    return name


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, toy_clips: Path) -> Path:
    """The folder of a run that nobody changed; made by `project`."""
    folder = tmp_path_factory.mktemp("verify")
    shutil.copytree(toy_clips / "clips", folder / "clips")
    return folder


@pytest.fixture
def project(sound: Path, tmp_path: Path, toy_clips: Path, within: Run, folder: Any) -> Project:
    """A copy of the sound run, to be changed: project and clips are at another place than they were."""
    if not (sound / "out").exists():
        whole = type(folder)(sound, toy_clips / "cache")
        within("run", whole.write(steps=9))
    target = tmp_path / "copy"
    shutil.copytree(sound, target)
    return Project(target)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Callable[[Project], list[str]]:
    """What is found without training anything."""
    monkeypatch.setattr(verify, "check_training", lambda run, report, everything: None)
    return lambda project: [str(each) for each in api.verify(project.output).findings]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "certificate.json")
    }


# -- nothing was changed -------------------------------------------------------------------------------------------------


def test_a_run_that_nobody_changed_is_sound_and_is_not_written_to(
    project: Project, within: Run, toy_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before, cache = tree(project.path), tree(toy_clips / "cache")
    printed = within("verify", project.output).stdout.splitlines()[1:]
    assert printed[0] == (
        "chain: metrics.jsonl (9 lines) and events.jsonl (10 lines) say what 3 checkpoints say they said, and each names the one "
        "before it"
    )
    assert printed[5:9] == [
        "training 3 of 9 steps again, on cpu",
        "not trained again: steps 1 to 3 from step 0 (--all does)",
        "not trained again: steps 4 to 6 from step-000003 (--all does)",
        "trained again: steps 7 to 9 from step-000006: 3 rows of metrics.jsonl and 224 tensors are the same, bit for bit",
    ]
    assert printed[9] == "verdict: sound"
    assert tree(project.path) == before
    assert tree(toy_clips / "cache") == cache
    assert list(scratch.iterdir()) == []
    said = json.loads((project.output / "certificate.json").read_text(encoding="utf-8"))
    assert said["verdict"] == "sound"
    assert said["retrained"] == [
        {"first": 6, "last": 9, "rows": 3, "tensors": 224, "files": 6, "bits": True, "difference": 0.0}
    ]
    assert said["compared"]["samples"] == said["compared"]["captions"] == 5
    assert said["versions"]["torch"] == torch.__version__
    manifest = (project.checkpoint(9) / "MANIFEST.json").read_bytes()
    assert said["hashes"]["checkpoints"]["step-000009"] == hashlib.sha256(manifest).hexdigest()


# -- metrics and events --------------------------------------------------------------------------------------------------


def test_a_metric_that_was_changed_is_found_in_any_line(
    project: Project, files: Callable[[Project], list[str]]
) -> None:
    whole = project.lines()
    for number in range(9):
        lines = [dict(line) for line in whole]
        lines[number]["loss"] += 1e-9
        project.write(lines)
        first = number // 3 * 3 + 1
        at = f"step-00000{first + 2}"
        expected = f"lines {first} to {first + 2} (steps {first} to {first + 2}) do not say what they said at {at}"
        assert files(project) == [f"metrics.jsonl: {expected}"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda lines: [*lines[:4], *lines[5:]], "metrics.jsonl: line 5 is of step 6, after step 4"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "metrics.jsonl: line 2 is of step 1, after step 2"),
        (lambda lines: lines[:8], "metrics.jsonl: it has 8 lines, and had 9 at step-000009"),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], "metrics.jsonl: line 4 is of step 3, after step 3"),
        (lambda lines: [*lines[:8], {**lines[8], "more": 1}], "metrics.jsonl: lines 7 to 9 (steps 7 to 9) do not say"),
        (lambda lines: [], "metrics.jsonl: it has 0 lines, and had 3 at step-000003"),
    ],
)
def test_rows_that_were_removed_swapped_or_repeated_are_found(
    project: Project, files: Callable[[Project], list[str]], change: Callable[[list], list], expected: str
) -> None:
    project.write(change(project.lines()))
    found = files(project)
    assert found[0].startswith(expected)


def test_an_event_that_was_changed_or_removed_is_found(project: Project, files: Callable[[Project], list[str]]) -> None:
    whole = project.lines("events.jsonl")
    project.write([*whole[:1], *whole[2:]], "events.jsonl")
    assert files(project)[0].startswith("events.jsonl: lines 1 to 6 do not say what they said at step-000003")
    saved = next(number for number, line in enumerate(whole) if line["event"] == "saved")
    project.write(
        [{**line, "time": 0} if number == saved else line for number, line in enumerate(whole)], "events.jsonl"
    )
    assert files(project) == ["events.jsonl: lines 7 to 7 do not say what they said at step-000006"]
    (project.output / "events.jsonl").unlink()
    assert "events.jsonl: it is not there" in files(project)


def test_a_key_that_comes_twice_and_a_line_that_is_none_are_found(
    project: Project, files: Callable[[Project], list[str]]
) -> None:
    """Readers differ in which of two they take."""
    file = project.output / "metrics.jsonl"
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole.replace('{"step": 2,', '{"loss": 0.0, "step": 2,', 1), encoding="utf-8")
    assert files(project)[0] == "metrics.jsonl: line 2 is no line of this file"
    file.write_text(f"[1]\n{whole}", encoding="utf-8")
    assert files(project)[0] == "metrics.jsonl: line 1 is no line of this file"


# -- checkpoints ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_changed_or_exchanged_is_found(
    project: Project, files: Callable[[Project], list[str]]
) -> None:
    """A byte; the same with a manifest that fits; the last one replaced by a copy of another; one that was put between."""
    name = "denoiser.safetensors"
    kept = tree(project.output)

    def restored() -> None:
        shutil.rmtree(project.output / "checkpoints")
        for each, raw in kept.items():
            path = project.output / each
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)

    (file,) = (path for path in project.checkpoint(3).rglob("*.safetensors") if "optimizer" not in path.name)
    name = file.relative_to(project.checkpoint(3)).as_posix()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert files(project) == [f"step-000003: it is not sound: {name} is damaged: its content is not what was written"]
    reseal(project.checkpoint(3))
    expected = "step-000003/MANIFEST.json: it is not the one that step-000006 followed: its hash is another"
    assert files(project) == [expected]
    restored()
    shutil.rmtree(project.checkpoint(9))
    shutil.copytree(project.checkpoint(6), project.checkpoint(9))
    found = files(project)
    assert "step-000009/state.json: step is 6, and the folder is that of step 9" in found
    project.json(9, "state.json", lambda state: state.update(step=9, micro_batch=18))
    expected = "step-000009/records.json: it followed step-000003: step-000006 is not of this chain"
    assert expected in files(project)
    restored()
    shutil.copytree(project.checkpoint(3), project.checkpoint(4))
    project.json(4, "state.json", lambda state: state.update(step=4, micro_batch=8))
    assert "step-000006/records.json: it followed step-000003: step-000004 is not of this chain" in files(project)


def test_checkpoints_of_an_older_vtrain_are_verified_as_far_as_they_say_something(project: Project) -> None:
    def older(records: dict) -> None:
        del records["before"]

    for step in (3, 6, 9):
        project.json(step, "records.json", older)
        project.json(step, "state.json", lambda state: [state.pop(key) for key in ("machine", "versions")])
    found = api.verify(project.output)
    assert found.verdict == "sound as far as compared"
    assert found.not_compared == ("the checkpoint before step-000006, step-000009: an older vtrain did not name it",)
    assert found.retrained[0].bits


# -- configuration -------------------------------------------------------------------------------------------------------


def test_a_configuration_that_was_changed_is_found(project: Project, files: Callable[[Project], list[str]]) -> None:
    config, own = project.output / "config.toml", project.checkpoint(6) / "config.toml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("lr = 0.001", "lr = 0.002"), encoding="utf-8")
    assert files(project) == [
        "config.toml: it is not the file that the run was started with (plan.json)",
        "config.toml: it is not the one in step-000009",
    ]
    config.write_text(text, encoding="utf-8")
    own.write_text(text.replace("lr = 0.001", "lr = 0.002"), encoding="utf-8")
    reseal(project.checkpoint(6))
    expected = "step-000006/config.toml: optimizer.lr is 0.002, and the run was trained with 0.001 (state.json)"
    assert expected in files(project)
    own.write_text(text.replace("seed = 7", ""), encoding="utf-8")
    assert "step-000006/config.toml: run.seed is 42, and the run was trained with 7 (state.json)" in files(project)
    own.write_text("[run", encoding="utf-8")
    assert any(each.startswith("step-000006/config.toml: it cannot be read") for each in files(project))


def test_a_plan_or_a_state_that_was_changed_is_found(project: Project, files: Callable[[Project], list[str]]) -> None:
    plan = project.output / "plan.json"
    whole = plan.read_bytes()
    changes: list[tuple[Callable[[dict], object], str]] = [
        (
            lambda found: found["settings"].update({"run.seed": 8}),
            "plan.json: run.seed is 8, and the run was started with 7",
        ),
        (lambda found: found.update(steps=10), "plan.json: steps is 10, and the run was started with 9 (events.jsonl)"),
        (
            lambda found: found["fingerprints"].update(video="x"),
            "plan.json: the fingerprint of video is not the one of",
        ),
        (
            lambda found: found["parts"][0].update(version="9"),
            "plan.json: family toy is of vtrain-toy 9, and the run was",
        ),
        (lambda found: found.pop("settings"), "config.toml or plan.json: it is not as vtrain writes it"),
    ]
    for change, expected in changes:
        change_json(plan, change)
        assert files(project)[0].startswith(expected)
        plan.write_bytes(whole)
    project.json(9, "state.json", lambda state: state["settings"].update({"optimizer.lr": 5e-4}))
    found = files(project)
    assert "step-000009/config.toml: optimizer.lr is 0.001, and the run was trained with 0.0005 (state.json)" in found


# -- data ----------------------------------------------------------------------------------------------------------------


def same_stamp(path: Path, data: bytes) -> None:
    """Other bytes of the same length, at the same time of change."""
    state = path.stat()
    assert len(data) == state.st_size
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_clip_or_caption_that_was_changed_is_found_though_its_size_and_time_are_the_same(
    project: Project, within: Run
) -> None:
    clip, caption = project.path / "clips" / "clip_2.mp4", project.path / "clips" / "clip_0.txt"
    data = bytearray(clip.read_bytes())
    data[data.index(b"mdat") + 60] ^= 1
    same_stamp(clip, bytes(data))
    same_stamp(caption, b"gradient number 9")
    (project.path / "clips" / "clip_4.mp4").unlink()
    done = within("verify", project.output, check=2)
    assert "FOUND: data: 1 sample not there any more, or not to be read: clips/clip_4.mp4" in done.stdout
    assert "FOUND: data: 1 sample with other bytes: clips/clip_2.mp4" in done.stdout
    assert "FOUND: data: 1 sample with other captions: clips/clip_0.mp4" in done.stdout
    assert "not compared: training: 3 steps were not trained again, on another model or other data" in done.stdout
    assert "verdict: not sound" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_data_that_is_not_there_any_more_is_not_compared(project: Project, within: Run) -> None:
    (project.path / "clips").rename(project.path / "elsewhere")
    change = project.checkpoint(9) / "state.json"
    folder = json.loads(change.read_text(encoding="utf-8"))["folder"]
    (Path(folder) / "clips").rename(Path(folder) / "elsewhere")
    try:
        done = within("verify", project.output)
    finally:
        (Path(folder) / "elsewhere").rename(Path(folder) / "clips")
    assert "not compared: data" in done.stdout
    assert "verdict: sound as far as compared" in done.stdout


# -- forged so that every hash fits ----------------------------------------------------------------------------------------


def test_weights_that_were_changed_with_a_manifest_that_fits_are_found_by_training_again(
    project: Project, within: Run
) -> None:
    """Of the last checkpoint, which no other names: one bit of a weight, and a moment of the optimizer."""
    folder = project.checkpoint(9)
    (weights,) = (path for path in folder.rglob("*.safetensors") if "optimizer" not in path.name)

    def flip(value: torch.Tensor) -> torch.Tensor:
        value.view(torch.int32).view(-1)[5] ^= 1
        return value

    one = change_tensor(weights, flip)
    other = change_tensor(folder / "optimizer.safetensors", lambda value: value * 1.5)
    reseal(folder)
    done = within("verify", project.output, check=2)
    found = json.loads((project.output / "certificate.json").read_text(encoding="utf-8"))["findings"]
    assert [each["where"] for each in found] == [
        f"step-000009/{weights.relative_to(folder)}",
        "step-000009/optimizer.safetensors",
    ]
    assert found[0]["what"].startswith(f"{one}: by ")
    assert found[1]["what"].startswith(f"{other}: by ")
    assert "verdict: not sound" in done.stdout


def test_a_metric_that_was_changed_with_all_hashes_that_fit_is_found_by_training_again(
    project: Project, within: Run
) -> None:
    lines = project.lines()
    lines[7]["loss"] *= 0.999
    project.write(lines)
    project.forge()
    done = within("verify", project.output, "--json", check=2)
    (found,) = json.loads(done.stdout)["findings"]
    assert found["where"] == "metrics.jsonl"
    assert found["what"].startswith("step 8: loss is ")
    assert found["what"].endswith("; 1 of 3 steps differ")


@pytest.mark.slow
def test_files_that_cannot_be_read_are_found_though_their_manifest_fits(project: Project, within: Run) -> None:
    """Slow: several verifications. Cut off, of another shape, a state that is none, samples that are none; at both ends of the
    steps that are trained again."""
    kept = {step: tree(project.checkpoint(step)) for step in (6, 9)}
    (name,) = (each for each in kept[9] if each.endswith(".safetensors") and "optimizer" not in each)
    broken: dict[str, Callable[[Path], object]] = {
        name: lambda file: change_tensor(file, lambda value: value[..., :-1].contiguous()),
        "optimizer.safetensors": lambda file: file.write_bytes(file.read_bytes()[:-8]),
        "optimizer.json": lambda file: file.write_text("[]", encoding="utf-8"),
        "samples.npz": lambda file: file.write_bytes(b"PK"),
        "readings.json": lambda file: file.write_text("{}", encoding="utf-8"),
        "state.json": lambda file: change_json(file, lambda state: state.update(step="9")),
        "records.json": lambda file: file.write_text("[", encoding="utf-8"),
        "config.toml": lambda file: file.write_bytes(b"\xff"),
    }
    for step, each in ((step, each) for step in (6, 9) for each in broken):
        broken[each](project.checkpoint(step) / each)
        reseal(project.checkpoint(step))
        done = within("verify", project.output, check=2)
        assert "FOUND: " in done.stdout, (step, each)
        assert f"step-00000{step}" in done.stdout
        for path, raw in kept[step].items():
            (project.checkpoint(step) / path).write_bytes(raw)


@pytest.mark.slow
def test_all_finds_a_metric_before_the_oldest_checkpoint_though_all_hashes_fit(project: Project, within: Run) -> None:
    """Slow: every step is trained again."""
    lines = project.lines()
    lines[1]["clip_losses"][0] *= 1.001
    project.write(lines)
    shutil.rmtree(project.checkpoint(3))
    project.forge(begin=6)
    assert "verdict: sound" in within("verify", project.output).stdout.splitlines()
    done = within("verify", project.output, "--all", check=2)
    assert "FOUND: metrics.jsonl: step 2: clip_losses is " in done.stdout
    assert "trained again: steps 7 to 9 from step-000006: 3 rows" in done.stdout


# -- another machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1 + 1e-6, "sound as far as compared"), pytest.param(3.0, "not sound", marks=pytest.mark.slow)],
)
def test_what_another_torch_made_is_compared_within_a_tolerance(project: Project, factor: float, verdict: str) -> None:
    (file,) = (path for path in project.checkpoint(9).rglob("*.safetensors") if "optimizer" not in path.name)
    change_tensor(file, lambda value: value * factor)
    project.json(9, "state.json", lambda state: state["machine"].update(torch="2.0.0"))
    found = api.verify(project.output)
    assert found.verdict == verdict
    if not found.findings:
        assert f"torch was 2.0.0, and is {torch.__version__}" in found.not_compared[0]
        assert file.name in found.not_compared[0]


# -- where it cannot be done ---------------------------------------------------------------------------------------------


def test_a_run_that_trains_now_is_refused(project: Project, within: Run) -> None:
    with hold(project.output):
        done = within("verify", project.output, check=2)
    assert "a run, or another vtrain verify, has this output folder: process" in done.stderr
    assert "Verify it when that has ended." in done.stderr
    assert not (project.output / "certificate.json").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        api.verify(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="neither a run's output folder nor one of its checkpoints"):
        api.verify(tmp_path)
    shutil.rmtree(project.output / "checkpoints")
    with pytest.raises(CheckpointError, match="this run has saved no checkpoint"):
        api.verify(project.output)


def test_one_of_its_checkpoints_is_verified_as_the_last(
    project: Project, files: Callable[[Project], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = api.verify(project.checkpoint(6))
    assert found.run == project.output
    assert found.compared["metrics.jsonl lines"] == 6
    assert set(found.hashes["checkpoints"]) == {"step-000003", "step-000006"}


def test_toml_that_is_written_is_read_as_it_was() -> None:
    import tomli

    tree = {
        "a": 'text "quoted" \\ \x7f \n\t é 𝄞', "b": [1, -2.5, float("inf"), True, []], "c-d": {"x.y": {"z": [{"a": 1}]}},
        "è": 1e-8,
    }  # fmt: skip
    assert tomli.loads(retrain.document(tree)) == tree
