"""The rules of a family's fingerprints: when what is cached of its encoders is read again, and when it is made again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vtrain.contract import Caption, ClipShape, ConditionEncoderSpec, Family, HashFile, TextEncoderSpec, conditions_of
from vtrain.testing.sampler import digest, moving_picture, unproved
from vtrain.testing.subject import CAPTIONS, FamilySubject

ModelFolder = tuple[Path, Callable[[Path], Family]]
"""(a model folder, what builds the family on such a folder)."""


@dataclass(frozen=True)
class Encoder:
    """What is cached of: its fingerprint, and a function that opens it and gives what it makes of the kit's captions or pixels."""

    fingerprint: Callable[[HashFile], str]
    given: Callable[[ClipShape], list[Tensor]]


def encoders(family: Family) -> dict[str, Encoder]:
    """The text encoders, the codec and the encoders of conditions, by what they are."""
    found = {
        f"the text encoder {name}": Encoder(spec.fingerprint, texts(spec))
        for name, spec in family.text_encoders().items()
    }
    found["the video codec"] = Encoder(family.video_fingerprint, latents(family))
    for each in conditions_of(family):
        if each.encoder is not None:
            found[f"the encoder of {each.name}"] = Encoder(
                each.encoder.fingerprint, conditions(each.source, each.encoder)
            )
    return found


def texts(spec: TextEncoderSpec) -> Callable[[ClipShape], list[Tensor]]:
    def given(clip: ClipShape) -> list[Tensor]:
        with spec.open("cpu") as encoder, torch.no_grad():
            parts = encoder.encode((*CAPTIONS, Caption("")), "prompt").parts.values()
        return [tensor for part in parts for tensor in (part.embeds, part.mask) if tensor is not None]

    return given


def latents(family: Family) -> Callable[[ClipShape], list[Tensor]]:
    def given(clip: ClipShape) -> list[Tensor]:
        with family.open_video_codec("cpu") as codec, torch.no_grad():
            return [codec.encode(moving_picture(clip)).mean]

    return given


def conditions(source: str, spec: ConditionEncoderSpec) -> Callable[[ClipShape], list[Tensor]]:
    def given(clip: ClipShape) -> list[Tensor]:
        pixels = moving_picture(clip)
        with spec.open("cpu") as encoder, torch.no_grad():
            made = encoder.encode(pixels[:, :, :1] if source == "first_frame" else pixels, clip)
        return [made[key] for key in sorted(made)]

    return given


OTHER_WEIGHTS = frozenset({".bin", ".ckpt", ".pt", ".pth"})
"""Endings of files of weights that the kit does not change: they are pickled."""


def marks(family: Family) -> dict[str, str]:
    return {name: each.fingerprint(digest) for name, each in encoders(family).items()}


def change_weights(file: Path) -> None:
    """Every number of a safetensors file becomes a quarter larger."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(file, "pt") as stored:
        kept: Mapping[str, Any] | None = stored.metadata()
    state = {name: value * 1.25 if value.is_floating_point() else value for name, value in load_file(file).items()}
    save_file(state, file, metadata=None if kept is None else dict(kept))


class FileTests(FamilySubject):
    """Fingerprints, by which core knows whether a cached entry is still what the encoder would give.

    partly_used: safetensors files, as paths in the model folder, with weights that no encoder uses (a vision tower, an lm_head
    beside a text encoder): a fingerprint goes by the whole file. Name them with a comment that says why.
    """

    partly_used: frozenset[str] = frozenset()

    @pytest.fixture(scope="class")
    @classmethod
    def model_folder(cls) -> ModelFolder:
        """(the small model folder, a function that builds the family on such a folder). Override it."""
        unproved(
            "that fingerprints change with weights, and only then",
            "model_folder",
            "the model folder and a function that builds the family on a copy of it",
        )

    def test_fingerprints_are_stable_and_differ_from_each_other(self, family: Family) -> None:
        """Asked twice, a fingerprint is the same text; no two encoders have the same."""
        first, again = (list(marks(family).values()) for _ in range(2))
        assert first == again, "asked twice, they are not the same"
        assert len(set(first)) == len(first), "a change of one encoder would be taken for a change of another"

    def test_fingerprints_follow_the_files_they_hash(self, family: Family) -> None:
        """If a fingerprint asks for a file's hash, another hash gives another fingerprint."""
        for name, encoder in encoders(family).items():
            asked: list[Path] = []

            def changed(file: Path, asked: list[Path] = asked) -> str:
                asked.append(file)
                return "changed " + digest(file)

            after = encoder.fingerprint(changed)
            if asked:
                assert after != encoder.fingerprint(digest), f"{name} ignores the contents of {asked[0].name}"

    def test_a_copied_model_folder_has_the_same_fingerprints(self, model_folder: ModelFolder, tmp_path: Path) -> None:
        """Where a model folder lies is no part of a fingerprint: one that was copied or moved finds its caches again."""
        folder, build = model_folder
        copy = build(Path(shutil.copytree(folder, tmp_path / "a copy")))
        odd = [name for name, mark in marks(build(folder)).items() if marks(copy)[name] != mark]
        assert not odd, f"{', '.join(odd)} has another fingerprint in a copy of the folder"

    def test_fingerprints_change_with_weights_and_only_then(
        self, family: Family, clip: ClipShape, model_folder: ModelFolder, tmp_path: Path
    ) -> None:
        """With other weights in a safetensors file, those fingerprints change whose encoders give something else, and no others."""
        folder, build = model_folder
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        files = {file.relative_to(copy).as_posix(): file for file in sorted(copy.rglob("*.safetensors"))}
        absent = sorted(self.partly_used - files.keys())
        assert not absent, f"partly_used names what is no safetensors file of the model folder: {', '.join(absent)}"
        clip = clip._replace(frames=max(1, family.frame_rule.offset))  # a picture shows it, and is encoded soon
        given = {name: each.given(clip) for name, each in encoders(build(copy)).items()}
        before = marks(build(copy))
        for file_name, file in files.items():
            kept = file.read_bytes()
            change_weights(file)
            after, changed = marks(build(copy)), encoders(build(copy))
            for name, each in changed.items():
                same = all(torch.equal(one, two) for one, two in zip(each.given(clip), given[name], strict=True))
                where, kept_mark = f"with other weights in {file_name}, {name} gives", after[name] == before[name]
                assert same or not kept_mark, f"{where} something else and has the same fingerprint"
                sound = not same or kept_mark or file_name in self.partly_used
                assert sound, f"{where} the same and has another fingerprint (or name the file in partly_used)"
            file.write_bytes(kept)
        others = sorted(file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.suffix in OTHER_WEIGHTS)
        if others or not files:
            of = f" in {', '.join(others)}" if others else ""
            unproved(
                f"that fingerprints change with weights{of}",
                "safetensors file of them",
                "a test of your own that changes them",
            )
