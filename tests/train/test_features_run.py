"""Whole runs with a regularizer that has an encoder of its own, wherever its features come from."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

COLOURS = '\n[[regularizer]]\nuse = "toy-colours"\nblock = 1\nteacher = "{teacher}"\n{more}'


@pytest.fixture
def own(folder, toy_clips: Path):
    """A folder with clips and a cache of its own."""
    (folder.path / "clips").unlink()
    shutil.copytree(toy_clips / "clips", folder.path / "clips")
    return type(folder)(folder.path, folder.path / "cache")


def colours(own, teacher: str, more: str = "", **values: object) -> Path:
    return own.write(COLOURS.format(teacher=teacher, more=more), **{"steps": 4, "log_every": 1, "save": 4} | values)


def trained(own, within: Run, teacher: str, more: str = "") -> tuple[str, list[dict]]:
    shutil.rmtree(own.output, ignore_errors=True)
    out = within("run", colours(own, teacher, more)).stdout
    return out, own.rows()


def test_a_run_is_the_same_with_cached_features_and_with_source_frames_at_each_step(own, within: Run) -> None:
    out, cached = trained(own, within, "cached")
    assert "features (toy-colours): 0 of 5 cached, 5 to do" in out
    assert "cached features (toy-colours)  5 clips, " in out
    assert "encoder of toy-colours  no: its features are cached" in out
    out, source = trained(own, within, "source")
    assert "features (toy-colours)" not in out
    assert "encoder of toy-colours  yes: it runs at each step" in out
    assert len(cached) == len(source) == 4
    for one, other in zip(cached, source, strict=True):
        assert one["terms"]["toy-colours/colours"] > 0
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_run_that_decodes_its_latents_says_that_the_codec_stays(own, within: Run) -> None:
    out, rows = trained(own, within, "decoded")
    assert "video codec             yes, what decodes alone" in out
    assert all(row["terms"]["toy-colours/colours"] > 0 for row in rows)


def test_features_are_read_as_long_as_they_are_used(own, within: Run) -> None:
    out, rows = trained(own, within, "source", "stop = 2\n")
    assert ["toy-colours/colours" in row["terms"] for row in rows] == [True, True, False, False]
    assert "all steps are done" in out


def test_status_prune_and_verify_know_features(own, within: Run) -> None:
    config = colours(own, "cached")
    within("cache", "fill", config)
    found = json.loads(within("cache", "status", config, "--json").stdout)
    assert (found["features"]["wanted"], found["features"]["present"]["count"]) == (5, 5)
    assert found["mask"]["wanted"] == 0
    assert "features" in within("cache", "status", config).stdout
    assert "6 text, 5 video, 5 features entries read, 16 sound" in within("cache", "verify", config).stdout
    assert "no entry is unused" in within("cache", "prune", config, "--yes").stdout
    config.write_text(config.read_text() + "channels = 9\n")
    filled = within("cache", "fill", config).stdout
    assert "video: 5 of 5 cached" in filled
    assert "features (toy-colours): 0 of 5 cached, 5 to do" in filled
    assert "deleted 5 files" in within("cache", "prune", config, "--yes").stdout
    assert len(list((own.cache / "features").rglob("*.safetensors"))) == 5
