"""The figures that are made of the judge's answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from vtrain.run.prepare import planned
from vtrain.train.parameters import lora_state
from vtrain_sanavideo import tiny


def answer(evaluate: ModuleType, judge: ModuleType, world: ModuleType, words: tuple[str, ...], read: tuple) -> object:
    asked, verdict = world.Words(*words), judge.Verdict(*read)
    return evaluate.Answer(asked.caption, 1, world.held_out(asked), verdict, verdict.hits(asked))


def test_accuracy_is_per_attribute_and_for_all_three(
    evaluate: ModuleType, judge: ModuleType, world: ModuleType
) -> None:
    found = [
        answer(evaluate, judge, world, ("red", "circle", "up"), ("red", "circle", "up")),
        answer(evaluate, judge, world, ("red", "circle", "left"), ("red", "square", "left")),
        answer(evaluate, judge, world, ("blue", "square", "up"), ("blue", None, None)),
        answer(evaluate, judge, world, ("blue", "square", "left"), (None, None, None)),
    ]
    assert evaluate.accuracy(found) == evaluate.Accuracy(prompts=4, colour=0.75, shape=0.25, direction=0.5, all=0.25)
    report = evaluate.report(found)
    assert report["held-out combinations"]["prompts"] == 2
    assert report["trained combinations"] == {"prompts": 2, "colour": 1, "shape": 0.5, "direction": 0.5, "all": 0.5}
    assert report["answers"][1]["read"]["shape"] == "square"


def test_the_probability_by_chance_is_the_binomial_tail(evaluate: ModuleType) -> None:
    assert evaluate.by_chance(0, 10, 0.3) == pytest.approx(1)
    assert evaluate.by_chance(10, 10, 0.5) == pytest.approx(0.5**10)
    assert evaluate.by_chance(2, 3, 0.25) == pytest.approx(3 * 0.25**2 * 0.75 + 0.25**3)


def test_every_known_combination_is_asked_for(world: ModuleType) -> None:
    assert len({words.caption for words in world.combinations()}) == 32


CONFIG = """
[run]
output_dir = "out"
[model]
use = "sanavideo"
path = "model"
train = "lora"
text_precision = "fp32"
[precision]
mixed = "no"
[[data]]
use = "folder"
path = "clips"
resolution = "64x64"
[data.video]
frames = 9
fps = 8
[train]
steps = 1
[optimizer]
lr = 1e-2
"""


def test_a_checkpoint_of_lora_is_judged_with_its_adapter(
    evaluate: ModuleType, world: ModuleType, run_here: Callable[[Path], None], tmp_path: Path
) -> None:
    tiny.build(tmp_path / "model")
    world.write_clips(tmp_path / "clips", world.clips(1, seed=0))
    config = tmp_path / "config.toml"
    config.write_text(CONFIG, encoding="utf-8")
    run_here(config)
    checkpoint = tmp_path / "out" / "checkpoints" / "step-000001"
    saved = load_file(checkpoint / "pytorch_lora_weights.safetensors")
    judged = lora_state(evaluate.denoiser(planned(config), checkpoint).module)
    assert {f"transformer.{name}": value.tolist() for name, value in judged.items()} == {
        name: value.tolist() for name, value in saved.items()
    }
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)
