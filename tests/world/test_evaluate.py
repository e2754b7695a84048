"""The figures that are made of the judge's answers."""

from __future__ import annotations

from types import ModuleType

import pytest


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
