"""Models in diffusers' layout: what is wrong with one is told from its files alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vtrain.contract import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    VOCABULARIES,
    CheckpointSource,
    Component,
    ModelError,
    PartConfig,
    PluginError,
    Problem,
    check_components,
    default_arguments,
    digest,
    meaning,
    misfit_problems,
    read_config,
    read_json,
    tokenizer_hashes,
)

COMPONENTS = {
    "transformer": Component(("DrumTransformer",), DIFFUSERS_STEM),
    "text_encoder": Component(("DrumEncoder", "OldDrumEncoder"), TRANSFORMERS_STEM),
    "tokenizer": Component(("DrumTokenizer",), config="tokenizer_config.json", one_of=VOCABULARIES),
    "image_encoder": Component(("DrumEyes",), TRANSFORMERS_STEM, optional=True),
}
INDEX = {
    "_class_name": "DrumPipeline",
    "transformer": ["diffusers", "DrumTransformer"],
    "text_encoder": ["transformers", "OldDrumEncoder"],
    "tokenizer": ["transformers", "DrumTokenizer"],
    "image_encoder": [None, None],
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound model of two weights."""
    folder = tmp_path / "model"
    for name, stem in (("transformer", DIFFUSERS_STEM), ("text_encoder", TRANSFORMERS_STEM)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text('{"width": 2, "_class_name": "Drum"}')
        save_file({"deep.weight": torch.zeros(3, 2)}, folder / name / f"{stem}.safetensors")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer" / "spiece.model").write_bytes(b"words")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


def found(folder: Path, *own: Callable[[Path], Iterable[Problem]]) -> list[str]:
    return [str(problem) for problem in check_components(CheckpointSource(str(folder), None, COMPONENTS), "Drum", *own)]


def test_a_sound_model_has_no_problem(model: Path) -> None:
    assert found(model) == []


def test_an_optional_component_is_looked_at_once_it_is_listed(model: Path) -> None:
    (model / "model_index.json").write_text(json.dumps(INDEX | {"image_encoder": ["transformers", "DrumEyes"]}))
    assert any("image_encoder: this folder is missing" in line for line in found(model))
    (model / "model_index.json").write_text(json.dumps(INDEX | {"image_encoder": ["transformers", "CatEyes"]}))
    assert any("image_encoder is a CatEyes, and this family works with DrumEyes" in line for line in found(model))


def test_all_that_is_wrong_is_told_at_once_and_what_the_family_finds_with_it(model: Path) -> None:
    index = {name: entry for name, entry in INDEX.items() if name != "text_encoder"}
    (model / "model_index.json").write_text(json.dumps(index))
    (model / "tokenizer" / "spiece.model").unlink()
    (model / "text_encoder" / "config.json").unlink()
    (model / "transformer" / f"{DIFFUSERS_STEM}.safetensors").write_bytes(b"short")

    def own(folder: Path) -> Iterable[Problem]:
        yield Problem(str(folder), "it sounds wrong.")
        read_json(folder / "text_encoder" / "config.json")

    lines = found(model, own)
    for words in (
        "text_encoder is not listed, and this family works with DrumEncoder or OldDrumEncoder",
        "Name a Drum checkpoint in [model] path",
        "neither tokenizer.json nor tokenizer.model nor spiece.model is here",
        "is truncated",
    ):
        assert any(words in line for line in lines), words
    assert sum("config.json: this file is missing" in line for line in lines) == 1


def test_a_component_alone_is_its_own_place(model: Path) -> None:
    source = CheckpointSource(str(model), None, COMPONENTS)
    assert source.place("transformer") == model / "transformer" == source.part("transformer")
    alone = CheckpointSource(str(model / "transformer"), None, COMPONENTS)
    assert alone.place("transformer") == model / "transformer" == alone.part("transformer")


class DrumConfig(PartConfig):
    width: int
    layers: int


def test_a_config_is_completed_by_its_classs_defaults_and_each_odd_key_is_a_problem(model: Path) -> None:
    path = model / "transformer" / "config.json"
    assert read_config(DrumConfig, path, {"layers": 4, "width": 9}) == DrumConfig(width=2, layers=4)
    path.write_text('{"width": "wide"}')
    with pytest.raises(ModelError) as raised:
        read_config(DrumConfig, path, remedy="Tune it.")
    assert [problem.what.split(":")[0] for problem in raised.value.problems] == ["width", "layers"]
    assert {(problem.where, problem.remedy) for problem in raised.value.problems} == {(str(path), "Tune it.")}


def test_what_a_config_means_is_the_same_however_it_is_written() -> None:
    short = {"b": 1, "_class_name": "Drum", "torch_dtype": "float32"}
    spelt = {"_diffusers_version": "9", "a": 2, "b": 1}
    assert digest(meaning(short, {"a": 2})) == digest(meaning(spelt, {"a": 2}))
    assert digest(meaning(short, {"a": 3})) != digest(meaning(spelt, {"a": 2}))
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest("a", "b") != digest("b", "a")


def test_a_tokenizer_is_the_vocabulary_that_is_read_and_its_settings(model: Path) -> None:
    folder = model / "tokenizer"

    def name(path: Path) -> str:
        return f"hash of {path.name}"

    assert tokenizer_hashes(folder, name).keys() == {"spiece.model", "tokenizer_config.json"}
    (folder / "tokenizer.json").write_text("{}")
    (folder / "readme.md").write_text("")
    assert tokenizer_hashes(folder, name).keys() == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"weight": (3, 2)}, ""),
        ({"deep.weight": (3, 4)}, "deep.weight is [3, 2] instead of [3, 4]"),
        ({"weight": (3, 4)}, "deep.weight is [3, 2] instead of [3, 4]"),
        ({"eep.weight": (3, 2)}, "eep.weight is missing"),
        ({"weight": (3, 2), "bias": (3,)}, "bias is missing"),
    ],
)
def test_weights_that_bear_a_configs_numbers_are_compared_by_the_end_of_their_names(
    model: Path, expected: dict[str, tuple[int, ...]], words: str
) -> None:
    problems = misfit_problems(model / "transformer", DIFFUSERS_STEM, expected, some=True)
    assert bool(problems) == bool(words)
    assert all(words in problem.what for problem in problems)


def test_all_weights_are_compared_where_all_shapes_are_known(model: Path) -> None:
    assert misfit_problems(model / "transformer", DIFFUSERS_STEM, {"deep.weight": (3, 2)}) == []
    (problem,) = misfit_problems(model / "transformer", DIFFUSERS_STEM, {"weight": (3, 2)})
    assert "weight is missing; deep.weight is unexpected" in problem.what
    (model / "transformer" / f"{DIFFUSERS_STEM}.safetensors").write_bytes(b"short")
    assert misfit_problems(model / "transformer", DIFFUSERS_STEM, {"weight": (3, 2)}) == []  # told as truncated


PACKAGE = """
class Drum(
    object
):
    def __init__(self, skin, /, size: int = 4, *, loud: bool = True, made=len("abc")) -> None:
        raise RuntimeError
"""


def test_defaults_are_read_from_an_installed_package_that_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "drums"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError")
    (package / "kit.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    assert default_arguments("drums", "kit.py", "Drum") == {"size": 4, "loud": True}
    assert "drums" not in sys.modules
    for file, owner in (("none.py", "Drum"), ("kit.py", "Cymbal")):
        with pytest.raises(PluginError, match="Install the version of drums that the plugin asks for"):
            default_arguments("drums", file, owner)
    with pytest.raises(PluginError, match=r"the installed no_such_drums has no kit\.py"):
        default_arguments("no_such_drums", "kit.py", "Drum")
