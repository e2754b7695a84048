"""What a run survives, what ends it, and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from vtrain.cli.app import main
from vtrain.contract import TrainingError
from vtrain.train.loop import Loop
from vtrain.train.readings import Measured, Reading, Unread, check_finite, rows
from vtrain.validate.generate import Validator

Run = Callable[..., subprocess.CompletedProcess[str]]
VALIDATION = """
[validation]
every = "3 steps"
size = "64x64"
frames = 9
steps = 4
prompts = { one = "gradient number 1" }
"""

DIVERGES = "1e-3\nweight_decay = 1e38"
"""A learning rate that is one, and a decay that makes weights infinite."""


def test_a_loss_that_is_not_finite_stops_and_names_the_samples_and_saves_nothing_of_it(folder, within: Run) -> None:
    done = within("run", folder.write(steps=40, save=5, lr=DIVERGES, log_every=10), check=2)
    assert "not finite; samples: clips/clip_" in done.stderr
    broken = re.search(r"step (\d+): ", done.stderr)
    assert broken is not None
    assert [row["step"] for row in folder.rows()] == list(range(1, int(broken[1]))), "finite ones are kept"
    assert "Traceback" not in done.stderr
    assert not list((folder.output / "checkpoints").glob("step-*"))


def reading(flow: list[float], loss: float) -> Reading:
    return Reading(5, 10, loss, flow, {}, [0.5] * len(flow), tuple(f"clip {n}" for n in range(len(flow))))


class Second:
    """Of two processes the second, its peer's numbers being its own."""

    first, count = False, 2

    def gathered(self, values: list[Any]) -> list[Any]:
        return values


def test_what_was_finite_before_is_kept_and_one_process_alone_reports_the_error() -> None:
    unread = [
        Unread(step, (Measured(step, [0.5], ("clip",), torch.tensor(loss), torch.tensor([loss]), {}),), 1e-3, None)
        for step, loss in ((1, 1.5), (2, math.nan))
    ]
    processes: Any = Second()
    found, error = rows(unread, processes, 10.0, 0.1, 0)
    assert [(row.step, row.loss) for row in found] == [(1, 1.5)]
    assert error is not None
    assert "step 2: the loss is not finite; samples: clip (noise level 0.5)" in str(error.error)
    assert error.error.reported
    processes.first = True
    assert rows(unread[:1], processes, 10.0, 0.1, 0)[1] is None
    again = rows(unread, processes, 10.0, 0.1, 0)[1]
    assert again is not None
    assert not again.error.reported


def test_the_clip_whose_own_loss_is_not_finite_is_the_one_named() -> None:
    with pytest.raises(TrainingError, match=r"step 5: the loss is not finite; samples: clip 1 \(noise level 0\.5\)\."):
        check_finite(5, [reading([1.0, math.nan, 2.0], math.nan)], None)


def test_the_step_before_is_named_too_when_nobody_looked_at_its_gradient() -> None:
    with pytest.raises(TrainingError, match=r"Or the step before broke the weights; its samples: clip 0, clip 1\."):
        check_finite(6, [reading([math.nan], math.nan)], None, [reading([1.0, 1.0], 1.0)])


def test_a_broken_gradient_behind_a_finite_loss_is_not_saved(
    folder, within: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of step 5 is broken where no norm is taken; the checkpoint of step 5 comes before any bad loss."""
    real = Loop.norm

    def broken(self: Loop, number: int) -> torch.Tensor | None:
        if number == 4:
            gradient = self.parameters[0].grad
            assert gradient is not None
            gradient[0] = math.nan
        return real(self, number)

    monkeypatch.setattr(Loop, "norm", broken)
    done = within("run", folder.write(steps=20, save=5, log_every=10), check=2)
    assert "step 5: the weights are not finite" in done.stderr
    assert not list((folder.output / "checkpoints").glob("step-*"))


def test_a_term_that_is_not_finite_names_its_micro_batch() -> None:
    with pytest.raises(TrainingError, match=r"samples: clip 0 \(noise level 0.5\), clip 1 \(noise level 0.5\)\."):
        check_finite(5, [reading([1.0, 2.0], math.inf)], None)


def test_a_gradient_that_is_not_finite_is_told_apart() -> None:
    with pytest.raises(TrainingError, match="the gradient is not finite"):
        check_finite(5, [reading([1.0], 1.0)], math.inf)
    check_finite(5, [reading([1.0], 1.0)], 3.0)


def test_validation_writes_a_playable_video_and_a_sheet(folder, within: Run) -> None:
    import av

    printed = within("run", folder.write(more=VALIDATION + "at_start = true\n", steps=4)).stdout
    for step in (0, 3, 4):
        made = folder.output / "samples" / f"step-{step:06d}"
        assert sorted(path.name for path in made.iterdir()) == ["one.mp4", "sheet.png"]
        assert f"wrote {made / 'one.mp4'}" in printed
        with av.open(str(made / "one.mp4")) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            assert (stream.codec_context.name, stream.width, stream.height, len(frames)) == ("h264", 64, 64, 9)
            assert stream.average_rate == 8


def test_a_failing_validation_is_told_and_training_goes_on(folder, within: Run) -> None:
    folder.write(more=VALIDATION, steps=6)
    (folder.output / "samples").mkdir(parents=True)
    for step in (3, 6):
        (folder.output / "samples" / f"step-{step:06d}").write_text("in the way", encoding="utf-8")
    printed = within("run", folder.config, check=3).stdout
    assert "WARNING: validation at step 3 failed" in printed
    assert "step 6 of 6: all steps are done" in printed
    assert [line.partition(" failed: ")[0].removeprefix("WARNING: ") for line in printed.splitlines()[-3:]] == [
        "validation at step 6", "validation at step 3", "the same command makes the videos of step 6 again",
    ]  # fmt: skip


def test_a_signal_has_the_exit_code_also_where_the_last_validation_failed(
    folder, within: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("no codec")

    monkeypatch.setattr(Validator, "solving", fail)
    printed = within("run", folder.write(more=VALIDATION, steps=6), check=128 + signal.SIGTERM).stdout
    assert printed.splitlines()[-1] == "WARNING: validation at step 3 failed: ValueError: no codec"


def test_a_failing_tracker_is_told_once_and_training_goes_on(folder, within: Run) -> None:
    folder.write(steps=6)
    folder.output.mkdir()
    (folder.output / "tensorboard").write_text("in the way", encoding="utf-8")
    printed = within("run", folder.config).stdout
    assert printed.count("WARNING: tracker tensorboard") == 1
    assert "step 6 of 6: all steps are done" in printed
    assert len(folder.rows()) == 6


def test_a_full_disk_in_the_middle_is_told_and_the_last_good_checkpoint_stays(
    folder, within: Run, tmp_path: Path
) -> None:
    """A kernel limit on file size stands for the full disk: at the second checkpoint the weights do not fit."""
    folder.write(steps=6, save=3)
    wrapper = tmp_path / "limited.py"
    wrapper.write_text(
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from vtrain.train import checkpoint\n"
        "real = checkpoint.write\n"
        "def limited(parent, step, *rest, **how):\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    soft = 20_000 if step == 6 else resource.RLIM_INFINITY\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        return real(parent, step, *rest, **how)\n"
        "    finally:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "checkpoint.write = limited\n"
        "from vtrain.cli.app import main\n"
        f"sys.argv = ['vtrain', 'run', {str(folder.config)!r}]\n"
        "main()\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, wrapper], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "step-000006: the checkpoint could not be written" in done.stderr
    assert "The newest sound checkpoint is" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (folder.output / "checkpoints").iterdir()] == ["step-000003"]
    assert within("run", folder.config).stdout.count("saved") == 1


SMALL = """
mount -t tmpfs -o size=8m small "$1" || exit 9
FILLS=4 "$2" -c "$3" run "$4"; echo "exit code $?"
rm "$1/ballast"
FILLS=0 "$2" -c "$3" run "$4"; echo "exit code $?"
cp -r "$1" "$5"
"""
FILLS = """
import os
from contextlib import suppress
from vtrain.train import checkpoint
real = checkpoint.write
def write(parent, step, *rest, **how):
    ballast = parent.parent / "ballast"
    if step == int(os.environ["FILLS"]):
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    return real(parent, step, *rest, **how)
checkpoint.write = write
from vtrain.cli.app import main
main()
"""


@pytest.mark.slow
def test_a_disk_that_was_full_and_has_room_again_ends_in_the_same_run(
    folder, another, within: Run, tmp_path: Path
) -> None:
    """A file system of its own, which something else fills when three checkpoints are there. Slow: two starts."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets no process mount")
    straight = another()
    settings = {"steps": 6, "save": 1, "log_every": 1}
    within("run", straight.write(**settings))
    text = folder.write(**settings).read_text(encoding="utf-8")
    folder.config.write_text(text + 'keep = "all"\n', encoding="utf-8")
    folder.output.mkdir()
    given = [folder.output, sys.executable, FILLS, folder.config, tmp_path / "copy"]
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", SMALL, "sh", *map(str, given)],
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("exit code")] == [
        "exit code 2",
        "exit code 0",
    ], said
    assert said.count("the checkpoint could not be written") == 3, said
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert "(step 3)" in done.stdout
    folder.output.rmdir()
    (tmp_path / "copy").rename(folder.output)
    assert folder.rows() == straight.rows()
    got, expected = folder.tensors(6), straight.tensors(6)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


STOP_WHILE_FILLING = """
import os, signal
from vtrain.data.caching.fill import _ArtifactFilling
real = _ArtifactFilling._encode
def encode(*given):
    real(*given)
    os.kill(os.getpid(), signal.SIGINT)
_ArtifactFilling._encode = encode
from vtrain.cli.app import main
main()
"""


def test_ctrl_c_while_caches_fill_keeps_what_is_whole_and_says_so(folder, within: Run, tmp_path: Path) -> None:
    folder.write(steps=2)
    folder.config.write_text(folder.config.read_text().replace(folder.cache.as_posix(), "own-cache"))
    done = subprocess.run(
        [sys.executable, "-c", STOP_WHILE_FILLING, "run", folder.config],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 130
    assert "interrupted; what is cached or saved is whole" in done.stdout
    assert len(list((tmp_path / "own-cache" / "video").rglob("*.safetensors"))) == 1
    assert "video: 1 of 5 cached, 4 to read or encode" in within("run", folder.config).stdout


def test_the_first_line_comes_before_anything_is_imported_or_read(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write()
    monkeypatch.setitem(sys.modules, "vtrain.cli.run", None)  # its import fails
    for command in (("run",), ("run", "--json")):
        monkeypatch.setattr("sys.argv", ["vtrain", *command, str(folder.config)])
        with redirect_stdout(StringIO()) as out, pytest.raises(ImportError):
            main()
        said = f"{folder.config}: loading torch, then looking at every file\n"
        assert out.getvalue() == ("" if "--json" in command else said)


def test_plan_json_holds_the_resolved_run_and_every_part_with_its_version(folder, within: Run) -> None:
    within("run", folder.write(steps=2))
    plan = json.loads((folder.output / "plan.json").read_text(encoding="utf-8"))
    assert plan["steps"] == 2
    assert plan["samples_per_step"] == 2
    assert {(part["kind"], part["name"]) for part in plan["parts"]} >= {("family", "toy"), ("sampler", "flow")}
    assert all(part["version"] for part in plan["parts"])
    assert plan["settings"]["train.caption_dropout"] == 0.3
    assert plan["fingerprints"]["video"]
    assert (folder.output / "config.toml").read_text() == folder.config.read_text()


FAIL_INSIDE = """
import vtrain_toy.denoiser, vtrain_toy.plugin
from vtrain.train import loop
real = loop.Loop.optimizer_step
def fail_later(self, number, fed):
    if number == 3:
        vtrain_toy.denoiser.PATCH = 0
    return real(self, number, fed)
loop.Loop.optimizer_step = fail_later
from vtrain.cli.app import main
main()
"""


def test_a_bug_inside_a_plugin_keeps_its_traceback_and_names_plugin_version_and_step(folder) -> None:
    folder.write(more='\n[[regularizer]]\nuse = "toy-smooth"\nblock = 1\n')
    done = subprocess.run(
        [sys.executable, "-c", FAIL_INSIDE, "run", folder.config],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "at step 4" in done.stderr
    assert "in vtrain-toy 0.1.0 (family toy, regularizer toy-smooth), module vtrain_toy.denoiser" in done.stderr


def test_a_second_run_with_warm_caches_encodes_nothing(folder, within: Run) -> None:
    within("run", folder.write(steps=2))
    folder.config.write_text(folder.config.read_text().replace('output_dir = "out"', 'output_dir = "again"'))
    printed = within("run", folder.config).stdout
    assert "text: 6 of 6 cached\n" in printed
    assert "video: 5 of 5 cached\n" in printed


def test_gradient_checkpointing_changes_no_number(folder, another, within: Run) -> None:
    other = another()
    within("run", folder.write(steps=4))
    other.write(steps=4)
    other.config.write_text(
        other.config.read_text().replace('mixed = "no"', 'mixed = "no"\ngradient_checkpointing = false')
    )
    within("run", other.config)
    assert [row["loss"] for row in folder.rows()] == [row["loss"] for row in other.rows()]


def test_bf16_autocast_trains_close_to_fp32_and_not_equal_to_it(folder, another, within: Run) -> None:
    other = another()
    within("run", folder.write(steps=4))
    other.write(steps=4)
    other.config.write_text(other.config.read_text().replace('mixed = "no"', 'mixed = "bf16"'))
    within("run", other.config)
    fp32, bf16 = ([row["loss"] for row in run.rows()] for run in (folder, other))
    assert bf16 == pytest.approx(fp32, rel=0.02)
    assert bf16 != fp32
    assert all(tensor.dtype == torch.float32 for name, tensor in other.tensors(4).items() if "denoiser" in name)


def test_a_clip_that_cannot_be_decoded_is_left_out_by_name_and_the_rest_is_trained_on(
    folder, within: Run, tmp_path: Path
) -> None:
    clips = tmp_path / "some"
    clips.mkdir()
    for source in sorted((tmp_path / "clips").iterdir()):
        (clips / source.name).write_bytes(source.read_bytes())
    whole = (clips / "clip_0.mp4").read_bytes()
    (clips / "clip_0.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (clips / "clip_2.mp4").write_bytes(b"")
    (clips / "notes.pdf").write_bytes(b"%PDF")
    (clips / "clip_4.txt").unlink()
    folder.write(steps=2, batch_size=1)
    folder.config.write_text(folder.config.read_text().replace('"clips"', '"some"'))
    printed = within("run", folder.config).stdout
    for name in ("clip_0.mp4", "clip_2.mp4", "notes.pdf", "clip_4.mp4"):
        assert name in printed, printed
    assert {sample for row in folder.rows() for sample in row["samples"]} <= {"some/clip_1.mp4", "some/clip_3.mp4"}
