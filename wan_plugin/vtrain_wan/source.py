"""Where a checkpoint is: a folder on disk, or a repository of the hub that its cache keeps. No torch."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

from vtrain.contract import ModelError, Problem, weight_files

CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "vae/config.json",
)
"""What a plan reads, all small."""

STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
"""The parts with weights, and what their files are called."""


class CheckpointSource:
    """A checkpoint in diffusers layout. name: an absolute folder, or a hub id. revision: of a hub id."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name = name
        self.revision = revision

    @property
    def on_hub(self) -> bool:
        return not Path(self.name).is_absolute()

    @cached_property
    def folder(self) -> Path:
        """The folder with at least the configs, from the hub's local cache if it has them. Raises ModelError."""
        if not self.on_hub:
            if not Path(self.name).is_dir():
                raise ModelError(Problem(self.name, "there is no such model folder.", "Correct [model] path."))
            return Path(self.name)
        patterns = ("*.json", "*/*.json", "tokenizer/*")
        # The cache first: a hub that cannot be reached is waited for, about 28 s.
        cached = self._snapshot(patterns, self.revision, offline=True)
        if cached is not None and self._has_configs(cached):
            return cached
        return self._download(patterns, self.revision)

    def part(self, name: str) -> Path:
        """The sub-folder `name` with all its files, fetched from the hub if the cache lacks some. Raises ModelError."""
        folder = self.folder / name
        if self.on_hub and name in STEMS and self.incomplete(folder, STEMS[name]):
            # The commit of the configs, so that a branch that has moved on since does not mix two models.
            self._download((f"{name}/*.json", f"{name}/*.safetensors"), self.folder.name)
            if self.incomplete(folder, STEMS[name]):  # without a connection the hub's client takes what there is
                raise ModelError(self._unreachable(f"weights of {name} are missing in the cache"))
        return folder

    @staticmethod
    def incomplete(folder: Path, stem: str) -> bool:
        """Whether a weight file is missing."""
        try:
            return bool(weight_files(folder, stem).missing)
        except ValueError:
            return True

    def may_fetch(self) -> bool:
        """Whether files that are missing now can still come from the hub."""
        if not self.on_hub:
            return False
        from huggingface_hub import constants

        return not constants.HF_HUB_OFFLINE

    def describe(self) -> str:
        """The name, and which commit of it."""
        return f"{self.name} (commit {self.folder.name})" if self.on_hub else self.name

    @staticmethod
    def _has_configs(folder: Path) -> bool:
        alone = (folder / "config.json").is_file() and not (folder / "model_index.json").exists()
        return alone or all((folder / name).is_file() for name in CONFIGS)

    def _snapshot(self, patterns: tuple[str, ...], revision: str | None, *, offline: bool) -> Path | None:
        """The snapshot's folder; offline: what the cache has of it, complete or not, None if nothing."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(self.name, revision=revision, allow_patterns=list(patterns), local_files_only=offline)
            )
        except IncompleteSnapshotError as error:
            if not offline:
                raise
            return Path(error.snapshot_path)
        except LocalEntryNotFoundError:
            if not offline:
                raise
            return None

    def _download(self, patterns: tuple[str, ...], revision: str | None) -> Path:
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's, as this hub version has it

        try:
            found = self._snapshot(patterns, revision, offline=False)
        except (OSError, ValueError, HTTPError) as error:
            raise ModelError(self._unreachable(str(error))) from error
        if found is None:
            raise AssertionError("an online snapshot is a folder or an error")
        return found

    def _unreachable(self, why: str) -> Problem:
        revision = f" --revision {self.revision}" if self.revision else ""
        endpoint = os.environ.get("HF_ENDPOINT")
        return Problem(
            self.name,
            f"this is no folder here, and it cannot be had from the hub{f' at {endpoint}' if endpoint else ''}: "
            f"{why.strip().splitlines()[0]}",
            f"Correct [model] path, or, where there is a connection: hf download {self.name}{revision}",
        )
