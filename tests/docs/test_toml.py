"""Every TOML block of the pages is a configuration file that loads, or a fragment of one."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vtrain.config import load
from vtrain.config.record import Config
from vtrain.contract import ConfigError
from vtrain.plan.make import make_plan
from vtrain.registry import discover
from vtrain_wan import tiny

EXAMPLES = ("sanavideo-2b-full.toml", "sanavideo-2b-lora.toml")
Read = Callable[..., Config]


@pytest.fixture
def read(as_file: Callable[[Any], str], tmp_path: Path) -> Read:
    """The Config of a block."""

    def reading(block: Any) -> Config:
        path = tmp_path / "block.toml"
        path.write_text(as_file(block), encoding="utf-8")
        return load(path, discover())

    return reading


def test_a_toml_block_loads(
    toml_block: Any,
    read: Read,
    tmp_path: Path,
    installed_from: Callable[[Path, Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = installed_from(toml_block.page, tmp_path)
    monkeypatch.syspath_prepend(str(files))
    if toml_block.file == "pyproject.toml":
        entries = tomllib.loads(toml_block.text)["project"]["entry-points"]["vtrain.v1"]
        assert all((files / f"{module}.py").exists() for module in entries.values())
    else:
        read(toml_block)


def test_the_pages_have_toml_blocks_of_both_sorts(every_block: tuple[Any, ...]) -> None:
    toml = [block for block in every_block if block.language == "toml"]
    assert len([block for block in toml if "fragment" in block.words]) >= 3
    assert len([block for block in toml if not block.words]) >= 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("fragment",), "[emas]\ndecay = 0.9"),
        (("fragment",), "[train]\nbatchsize = 2"),
        (("fragment",), '[[regularizer]]\nuse = "crepe"'),
        (("fragment",), "[run]\nresume = 3"),
        ((), '[run]\nresume = "latest"'),
    ],
)
def test_a_planted_wrong_block_does_not_load(
    make_block: Callable[..., Any], read: Read, words: tuple[str, ...], text: str
) -> None:
    with pytest.raises(ConfigError):
        read(make_block("toml", text, *words))


def test_a_planted_good_fragment_loads(make_block: Callable[..., Any], read: Read) -> None:
    assert read(make_block("toml", "[train]\nbatch_size = 7", "fragment")).train.batch_size == 7


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_loads_with_its_hub_id(root: Path, name: str) -> None:
    config = load(root / "examples" / name, discover())
    assert dict(config.model.options)["path"] == "Efficient-Large-Model/SANA-Video_2B_480p_diffusers"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_planned_on_a_checkpoint_that_is_there(
    root: Path, prepared: Path, tmp_path: Path, name: str
) -> None:
    text = (root / "examples" / name).read_text(encoding="utf-8")
    hub = '"Efficient-Large-Model/SANA-Video_2B_480p_diffusers"'
    assert text.count(hub) == 1
    path = tmp_path / name
    path.write_text(text.replace(hub, f'"{prepared / "demo-output" / "tiny-checkpoint"}"'), encoding="utf-8")
    plan = make_plan(load(path, discover()))
    assert len(plan.datasets[0].sizes) == 11
    assert (plan.datasets[0].frames, plan.datasets[0].fps) == (81, 16)
    assert plan.validation is not None
    assert str(plan.validation.shape) == "832x480@81"
    assert (plan.validation.guidance, plan.validation.steps, plan.validation.fps) == (6.0, 50, 16)


def test_the_example_of_wan_is_planned_as_it_stands_and_loads_with_its_hub_id(root: Path, tmp_path: Path) -> None:
    text, hub = (
        (root / "examples" / "wan21-1.3b-lora.toml").read_text(encoding="utf-8"),
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    )
    assert text.count(f'path = "{hub}"') == 1
    path = tmp_path / "wan.toml"
    path.write_text(text.replace(hub, str(tiny.build(tmp_path / "tiny"))), encoding="utf-8")
    plan = make_plan(load(path, discover()))
    assert (len(plan.datasets[0].sizes), plan.datasets[0].frames, plan.datasets[0].fps) == (7, 81, 16)
    assert plan.validation is not None
    assert str(plan.validation.shape) == "832x480@81"
    assert dict(load(root / "examples" / "wan21-1.3b-lora.toml", discover()).model.options)["path"] == hub


def test_the_full_example_has_the_numbers_of_the_official_recipe(root: Path) -> None:
    config = load(root / "examples" / "sanavideo-2b-full.toml", discover())
    optimizer = dict(config.optimizer.options)
    assert (optimizer["lr"], optimizer["betas"], optimizer["eps"]) == (5e-5, (0.9, 0.999), 1e-10)
    assert optimizer["weight_decay"] == 0
    assert config.train.gradient_clip is not None
    assert (config.train.gradient_clip.method, config.train.gradient_clip.max) == ("norm", 0.1)
    assert str(config.lr_schedule.warmup) == "500 steps"
    assert config.train.caption_dropout == 0.1


def test_a_fragment_keeps_what_it_does_not_name(make_block: Callable[..., Any], as_file: Callable[[Any], str]) -> None:
    block = make_block("toml", '[model]\ntrain = "lora"', "fragment")
    assert tomllib.loads(as_file(block))["model"] == {"use": "sanavideo", "path": "owner/name", "train": "lora"}
    assert tomllib.loads(as_file(replace(block, words=())))["model"] == {"train": "lora"}
