"""A page that leads from an empty folder to a trained model is followed to the letter, with nothing of ours but wheels installed.

Slow (two minutes): it builds wheels, runs the whole conformance kit on a family, and trains 600 steps.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

pytestmark = pytest.mark.slow

OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
"""pip takes what is there: 0 is how its variable says that nothing is isolated."""


class Reader:
    """Does what a page says, block by block, as its reader would. environment: of wheels alone. folder: where he starts."""

    def __init__(self, environment: Any, folder: Path) -> None:
        self._environment, self.folder = environment, folder
        self._said = ""

    def follow(self, block: Any) -> None:
        if block.language == "sh":
            for line in block.text.splitlines():
                self._command(shlex.split(line))
        elif block.file:
            (self.folder / block.file).write_text(block.text, encoding="utf-8")
        elif "output" in block.words:
            lines = [re.escape(line).replace(r"\.\.\.", ".*") for line in block.text.splitlines()]
            pattern = "\n".join(r"(?:.*\n)*?.*" if line == ".*" else line for line in lines)
            assert re.fullmatch(pattern, self._said.rstrip()), f"{block}:\n{self._said}"

    def _command(self, words: list[str]) -> None:
        if words[0] == "cd":
            self.folder = self.folder / words[1]
            return
        self._said = self._environment.run(*words, cwd=self.folder, **OFFLINE)


def test_a_family_from_nothing(
    root: Path, every_block: tuple[Any, ...], environment: Callable[..., Any], tmp_path: Path
) -> None:
    reader = Reader(environment(), tmp_path)
    blocks = [block for block in every_block if block.page == root / "docs/plugins/first-family.md"]
    assert {"sh", "python", "toml", "text"} == {block.language for block in blocks}
    for block in blocks:
        reader.follow(block)
    rows = [json.loads(line) for line in (reader.folder / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 600
    colours = {name: middle(reader.folder / f"run/samples/step-000600/{name}.mp4") for name in ("red", "blue")}
    # Red and blue differ by far more in the clips: by 170 of 255.
    assert colours["red"][0] > colours["red"][2] + 20, colours
    assert colours["blue"][2] > colours["blue"][0] + 20, colours


def middle(video: Path) -> np.ndarray:
    """Mean colour of the middle of a video's frames: red, green, blue."""
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    mean: np.ndarray = np.stack(frames)[:, 10:22, 10:22].mean((0, 1, 2))
    return mean
