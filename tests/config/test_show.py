"""Every resolved value, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest

from vtrain.config import Config, ShownValue, show

Read = Callable[..., Config]


@pytest.fixture
def rows(read: Read, good: dict[str, str]) -> dict[str, ShownValue]:
    good["extra"] = "[validation]\nevery = '2 epochs'\nprompts.cat = 'a cat'\n[[tracker]]\nuse = 'paper'\n"
    return {row.key: row for row in show(read(good))}


@pytest.mark.parametrize(
    ("key", "value", "origin"),
    [
        ("run.seed", 42, "default"),
        ("model.use", "tiny", "config.toml:5"),
        ("model.train", "lora", "config.toml:7"),
        ("model.lora.rank", 16, "default"),
        ("model.motion_score", None, "default of tiny"),
        ("data[0].use", "folder", "config.toml:10"),
        ("data[0].video.frames", None, "default"),
        ("train.steps", 10, "config.toml:14"),
        ("sampler.use", "flow", "default of tiny"),
        ("sampler.shift", 3.0, "default of flow"),
        ("optimizer.use", "adamw", "default"),
        ("optimizer.lr", 1e-4, "config.toml:17"),
        ("optimizer.betas", [0.9, 0.999], "default of adamw"),
        ("checkpoint.every", "500 steps", "default"),
        ("validation.every", "2 epochs", "config.toml:20"),
        ("validation.prompts.cat", "a cat", "config.toml:21"),
        ("regularizer", None, "default"),
        ("tracker[0].use", "paper", "config.toml:23"),
    ],
)
def test_a_value_is_shown_with_its_origin(
    rows: dict[str, ShownValue], read: Read, key: str, value: object, origin: str
) -> None:
    row = rows[key]
    assert row.value == value
    assert row.origin.rsplit("/", 1)[-1] == origin


def test_an_absent_table_is_one_row(read: Read, good: dict[str, str]) -> None:
    rows = {row.key: row for row in show(read(good))}
    assert rows["validation"] == ShownValue("validation", None, "default", "tell")
    assert rows["tracker[0].use"] == ShownValue("tracker[0].use", "tensorboard", "default", "tell")


def test_all_rows_are_json(rows: dict[str, ShownValue]) -> None:
    text = json.dumps([asdict(row) for row in rows.values()])
    assert len(json.loads(text)) == len(rows)


def test_every_value_of_the_file_is_in_the_rows(read: Read, good: dict[str, str]) -> None:
    config = read(good)
    from_file = {row.origin for row in show(config) if row.origin.startswith(str(config.path))}
    said = [number for number, line in enumerate(config.text.splitlines(), 1) if "=" in line]
    assert from_file == {f"{config.path}:{number}" for number in said}
