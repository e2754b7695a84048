"""Rules between the keys of a file that no single type holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vtrain.config.reader import Reader
from vtrain.contract import Registered

Raw = Mapping[str, Any]

_FILE_NAME = re.compile(r"[^\s./\\:*?\"<>|\x00-\x1f][^/\\:*?\"<>|\x00-\x1f]{0,99}")


def check_length(reader: Reader, train: Raw) -> None:
    """[train] has exactly one of steps and epochs."""
    if "steps" in train and "epochs" in train:
        reader.report(("train", "epochs"), "[train] has both steps and epochs.", "Keep one of them.")
    elif "steps" not in train and "epochs" not in train:
        reader.report(("train",), "[train] says neither steps nor epochs.", "Add, for example: steps = 1000")


def check_lora(reader: Reader, model: Raw) -> None:
    """[model.lora] stands only where an adapter is trained."""
    if "lora" in model and model.get("train") == "full":
        remedy = 'Remove [model.lora], or set train = "lora".'
        reader.report(("model", "lora"), '[model.lora] describes an adapter, but train = "full" trains none.', remedy)


def check_schedule(reader: Reader, schedule: Raw) -> None:
    """`end` stands only where the learning rate goes somewhere."""
    if "end" in schedule and schedule.get("use", "constant") == "constant":
        remedy = 'Remove it, or set use = "linear" or "cosine".'
        reader.report(("lr_schedule", "end"), 'end has no meaning in [lr_schedule] with use = "constant".', remedy)


def check_datasets(reader: Reader, datasets: Sequence[Raw]) -> None:
    """At least one dataset is enabled, and no two share an id."""
    if datasets and all(raw.get("enabled") is False for raw in datasets):
        reader.report(("data",), "every [[data]] table has enabled = false.", "Enable one.")
    seen: dict[str, int] = {}
    for index, raw in enumerate(datasets):
        name = raw.get("id")
        if isinstance(name, str) and name in seen:
            reader.report(
                ("data", index, "id"), f'the id "{name}" is that of [[data]] number {seen[name] + 1} already.'
            )
        elif isinstance(name, str):
            seen[name] = index


def check_prompts(reader: Reader, validation: Raw) -> None:
    """Nicknames of prompts are file names that stay apart on every file system."""
    prompts = validation.get("prompts")
    seen: dict[str, str] = {}
    for name in prompts if isinstance(prompts, dict) else ():
        path = ("validation", "prompts", name)
        if not _FILE_NAME.fullmatch(name) or name.endswith((" ", ".")):
            remedy = 'It becomes one: no / \\ : * ? " < > |, no leading dot, at most 100 characters.'
            reader.report(path, f'the nickname "{name}" cannot be a file name.', remedy)
        elif name.lower() in seen:
            reader.report(
                path, f'the nicknames "{seen[name.lower()]}" and "{name}" differ only in case.', "Rename one."
            )
        seen[name.lower()] = name


def check_sampler(reader: Reader, family: Registered, fixed: str, use: object) -> None:
    """A family with a fixed schedule trains with its own sampler. fixed: its name."""
    if isinstance(use, str) and use != fixed:
        what = f'the family "{family.spec.name}" is trained and sampled with its own schedule, "{fixed}", and with no other.'
        reader.report(("sampler", "use"), what, f'Remove the key, or write use = "{fixed}".')
