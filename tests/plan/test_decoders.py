"""Where torchcodec is asked for: what it is, or why it cannot be used and what to do."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from vtrain.contract import ConfigError
from vtrain.data.scanning.scan import NotLoadable, find_torchcodec, unusable, with_decoders

WITHOUT_FFMPEG = """RuntimeError: Could not load libtorchcodec. Likely causes:
          1. FFmpeg is not properly installed in your environment. We support
             versions 4, 5, 6, 7, and 8, and we attempt to load libtorchcodec
             for each of those versions.
FFmpeg version 8:
OSError: libavutil.so.60: cannot open shared object file: No such file or directory
FFmpeg version 7:
OSError: libavutil.so.59: cannot open shared object file: No such file or directory
"""
"""Of torchcodec 0.13.0 on a machine without ffmpeg, without the tracebacks' other lines."""

WITHOUT_CUDA = """RuntimeError: Could not load libtorchcodec. Likely causes:
FFmpeg version 8:
OSError: libnvrtc.so.13: cannot open shared object file: No such file or directory
FFmpeg version 5:
OSError: libnvrtc.so.13: cannot open shared object file: No such file or directory
"""
"""Of torchcodec 0.14.0 on a machine with ffmpeg 5 and without CUDA."""


@pytest.mark.parametrize(
    ("error", "what", "remedy"),
    [
        (
            WITHOUT_FFMPEG,
            "ffmpeg's shared libraries, of a version from 4 to 8, are not there",
            "apt-get install ffmpeg",
        ),
        (WITHOUT_CUDA, "its build wants libnvrtc.so.13, which is not there", "Install version 0.13"),
        ("ModuleNotFoundError: No module named 'torchcodec'", "is not installed", "pip install 'vtrain[torchcodec]'"),
        ("OSError: undefined symbol: _ZN3c10", "does not load: OSError: undefined symbol: _ZN3c10", "Install version"),
    ],
)
def test_what_keeps_torchcodec_from_loading_is_told_with_the_remedy(error, what, remedy) -> None:
    found = unusable(error)
    assert what in found.what
    assert remedy in found.remedy
    assert 'data.decoder = "pyav"' in found.remedy


@pytest.fixture
def another_torchcodec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Processes that are started now import a module of this text as torchcodec, whether it is installed or not."""

    def install(text: str) -> None:
        (tmp_path / "torchcodec.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install


def test_a_dataset_that_asks_for_a_torchcodec_that_does_not_load_is_a_problem_at_its_line(
    plan_of, another_torchcodec
) -> None:
    another_torchcodec(f"raise RuntimeError({WITHOUT_FFMPEG!r})")
    with pytest.raises(ConfigError) as caught:
        with_decoders(plan_of(data='use = "folder"\npath = "clips"\ndecoder = "torchcodec"'))
    (problem,) = caught.value.problems
    assert problem.where.endswith("config.toml:9")
    assert problem.what.startswith("torchcodec does not load: ffmpeg's shared libraries")


def test_a_torchcodec_that_crashes_or_is_of_another_version_is_told(another_torchcodec) -> None:
    another_torchcodec("import os; os.abort()")
    assert isinstance(crashed := find_torchcodec(), NotLoadable)
    assert crashed.what == "torchcodec does not load: exit status -6"
    another_torchcodec("__version__, ffmpeg_major_version = '0.14.1+cpu', 7")
    assert isinstance(newer := find_torchcodec(), NotLoadable)
    assert newer.what == "torchcodec is there in version 0.14.1, and only 0.13 was compared with ffmpeg."


def test_a_dataset_bears_name_and_version_of_what_decodes_it(plan_of, another_torchcodec) -> None:
    another_torchcodec("__version__, ffmpeg_major_version = '0.13.0+cpu', 7")
    plan = plan_of(data='use = "folder"\npath = "clips"\ndecoder = "torchcodec"')
    assert plan.datasets[0].decoder == "", "a plan starts no process"
    (dataset,) = with_decoders(plan).datasets
    assert dataset.decoder == "torchcodec 0.13.0, ffmpeg 7"
    (dataset,) = with_decoders(plan_of()).datasets
    assert dataset.decoder == ""


@pytest.mark.skipif(importlib.util.find_spec("torchcodec") is not None, reason="torchcodec is installed here")
def test_without_torchcodec_that_is_found_out_in_a_process_of_its_own() -> None:
    found = find_torchcodec()
    assert isinstance(found, NotLoadable)
    assert found.what == "torchcodec is not installed."
