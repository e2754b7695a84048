"""The TensorBoard tracker: what it wrote, read back with TensorBoard's own reader."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vtrain.contract import RunInfo
from vtrain_builtin.tensorboard import TENSORBOARD, TensorBoard, TensorBoardOptions, film_strip


def run_info(folder: Path, step: int = 0) -> RunInfo:
    return RunInfo(name="my run", output_dir=str(folder), config={"train": {"steps": 5}}, step=step)


def read(folder: Path) -> EventAccumulator:
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    reader.Reload()
    return reader


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A real mp4 of 9 frames, 96x64, that brightens from black to white."""
    file = tmp_path / "clip.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(9):
            picture = np.full((64, 96, 3), round(255 * number / 8), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return file


def test_scalars_are_read_back_with_their_steps(tmp_path: Path) -> None:
    tracker = TensorBoard(TensorBoardOptions())
    tracker.start(run_info(tmp_path), {})
    for step in (1, 2, 3):
        tracker.scalars(step, {"loss": 1 / step, "lr": 1e-4})
    tracker.finish()
    reader = read(tmp_path)
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3)
    ]
    assert [event.value for event in reader.Scalars("lr")] == pytest.approx([1e-4] * 3)


def test_the_configuration_is_logged_as_text(tmp_path: Path) -> None:
    tracker = TENSORBOARD.build(TensorBoardOptions())
    tracker.start(run_info(tmp_path), {})
    tracker.finish()
    text = read(tmp_path).Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"run": "my run"' in text
    assert '"steps": 5' in text


def test_a_resumed_run_hides_what_came_after_its_step(tmp_path: Path) -> None:
    for start, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (2, {3: 30.0, 4: 40.0})):
        tracker = TensorBoard(TensorBoardOptions())
        tracker.start(run_info(tmp_path, start), {})
        for step, value in values.items():
            tracker.scalars(step, {"loss": value})
        tracker.finish()
    assert {event.step: event.value for event in read(tmp_path).Scalars("loss")} == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}


def resumed(folder: Path, saved: object) -> list[str]:
    """What a tracker warns of that is started with what another had kept."""
    tracker = TensorBoard(TensorBoardOptions())
    tracker.start(run_info(folder, step=5), saved)  # type: ignore[arg-type]
    tracker.finish()
    said = list(tracker.warnings())
    assert list(tracker.warnings()) == [], "once"
    return said


def test_event_files_that_are_gone_or_cut_since_the_checkpoint_are_warned_of(tmp_path: Path) -> None:
    tracker = TensorBoard(TensorBoardOptions(flush_seconds=1e-6))
    tracker.start(run_info(tmp_path), {})
    tracker.scalars(1, {"loss": 1.0})
    saved = json.loads(json.dumps(tracker.state()))
    tracker.scalars(2, {"loss": 1.0})
    tracker.finish()
    assert list(tracker.warnings()) == []
    assert resumed(tmp_path, saved) == []
    (file,) = (tmp_path / "tensorboard" / name for name in saved["files"])
    file.write_bytes(file.read_bytes()[:20])
    words = (
        f"1 of 1 event files of earlier steps is gone from {tmp_path / 'tensorboard'}, or cut: its curves lack steps"
    )
    assert resumed(tmp_path, saved) == [words]
    file.unlink()
    assert resumed(tmp_path, saved) == [words]
    for odd in ([1], {"a": True}, {"../a": 1}, {"a": -1.5}):
        assert resumed(tmp_path, {"files": odd}) == ["what the checkpoint says of its event files cannot be read"]


def test_a_video_is_shown_as_a_strip_with_its_path(tmp_path: Path, clip: Path) -> None:
    tracker = TensorBoard(TensorBoardOptions(stills=3))
    tracker.start(run_info(tmp_path), {})
    tracker.videos(7, {"cat": clip})
    tracker.finish()
    reader = read(tmp_path)
    image = reader.Images("samples/cat")[0]
    assert (image.step, image.width, image.height) == (7, 3 * 96, 64)
    picture = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("L"))
    assert [round(float(picture[:, start : start + 96].mean()), -1) for start in (0, 96, 192)] == [0, 130, 260]
    assert str(clip) in reader.Tensors("samples/cat/file/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_strip_has_no_more_stills_than_frames(clip: Path) -> None:
    assert film_strip(clip, 64).shape == (64, 9 * 96, 3)
    assert film_strip(clip, 1).shape == (64, 96, 3)


def test_a_high_video_is_scaled_down(tmp_path: Path) -> None:
    file = tmp_path / "high.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 320, 480, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((480, 320, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    assert film_strip(file, 8).shape == (240, 160, 3)


def test_a_video_that_is_none_or_gone_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    (tmp_path / "no.mp4").write_bytes(b"not a video")
    tracker = TensorBoard(TensorBoardOptions())
    tracker.start(run_info(tmp_path), {})
    tracker.videos(1, {"no": tmp_path / "no.mp4", "gone": tmp_path / "gone.mp4"})
    tracker.scalars(1, {"loss": 2.0})
    tracker.finish()
    found = read(tmp_path)
    assert [event.value for event in found.Scalars("loss")] == [2.0]
    assert "samples/gone/file/text_summary" in found.Tags()["tensors"]
    for name in ("no", "gone"):
        (words,) = found.Tensors(f"samples/{name}/file/text_summary")
        assert b"cannot be read" in words.tensor_proto.string_val[0]


def test_numbers_before_start_are_an_error_and_finish_may_come_twice(tmp_path: Path) -> None:
    tracker = TensorBoard(TensorBoardOptions())
    with pytest.raises(RuntimeError, match="between start and finish"):
        tracker.scalars(1, {"loss": 1.0})
    tracker.start(run_info(tmp_path), {})
    tracker.finish()
    tracker.finish()


def test_nothing_heavy_is_imported_before_start() -> None:
    code = (
        "import sys; from vtrain_builtin.tensorboard import TENSORBOARD as spec; spec.build(spec.options());"
        "print(sorted({'torch', 'tensorboard', 'av', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
