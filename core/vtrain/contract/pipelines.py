"""A pipeline folder of diffusers around a trained denoiser: the checkpoint's other parts, copied, and an index that names them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from vtrain.contract.checkpoints import CheckpointSource, read_json
from vtrain.contract.errors import ModelError, Problem

if TYPE_CHECKING:
    from vtrain.contract.protocols import Denoiser

INDEX = "model_index.json"

ExportFormat = Literal["pipeline", "merged", "lora", "comfyui"]
"""pipeline: all parts, the denoiser trained. merged: the trained denoiser alone. lora: a LoRA file in diffusers' keys; comfyui: in
ComfyUI's."""


@runtime_checkable
class SupportsReference(Protocol):
    """A family whose original library reads what is exported: `vtrain export` writes for it, and proves each export by it."""

    def parts_bytes(self) -> int:
        """Of what `save_parts` writes. Raises ModelError where the model folder is no whole pipeline."""
        ...

    def save_parts(self, folder: Path) -> None:
        """Write what the original pipeline needs beside the denoiser into `folder`. Raises ModelError, OSError."""
        ...

    def open_reference(self, like: Denoiser, folder: Path, export: ExportFormat) -> Denoiser:
        """*torch* The denoiser as the original library's own loader reads it from an export in `folder`: fp32, on the CPU.

        like: a denoiser of the family, whose weights may be on the meta device. "lora", "comfyui": with the LoRA file in `folder`
        loaded on the model folder's weights. Raises ModelError where the loader refuses it, or takes it only in part.
        """
        ...


def pipeline_parts(
    source: CheckpointSource, source_of: Callable[[str], CheckpointSource]
) -> Iterator[tuple[str, Path, object]]:
    """(name, folder, entry for the index) of each part beside the denoiser. source_of: where a part is, which may be elsewhere.

    Raises ModelError for a checkpoint that is a transformer alone.
    """
    index = read_index(source)
    for name, entry in index.items():
        if name == "transformer" or not _is_part(entry):
            continue
        owner = source_of(name)
        listed = (
            index if owner is source else read_json(owner.folder / INDEX) if (owner.folder / INDEX).is_file() else {}
        )
        folder = owner.part(name) if name in owner.components else owner.folder / name
        yield name, folder, listed.get(name) or _class_of(folder, entry)


def read_index(source: CheckpointSource) -> Mapping[str, object]:
    """model_index.json. Raises ModelError where there is none."""
    if not (source.folder / INDEX).is_file():
        what = f"this model folder has no {INDEX}: it is a transformer alone, and a pipeline needs its other parts."
        raise ModelError(Problem(str(source.folder), what, "Export the transformer alone: --format merged."))
    return read_json(source.folder / INDEX)


def write_pipeline(
    folder: Path, source: CheckpointSource, source_of: Callable[[str], CheckpointSource] | None = None
) -> None:
    """Copy all parts but the denoiser, and write the index. Raises ModelError, OSError."""
    index = dict(read_index(source))
    for name, part, entry in pipeline_parts(source, source_of or (lambda _: source)):
        shutil.copytree(part, folder / name)  # links of the hub's cache become files
        index[name] = entry
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _is_part(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(each, str) for each in entry)


def _class_of(folder: Path, entry: object) -> object:
    """The entry of a part that lies in a folder of its own, by its config."""
    config = folder / "config.json"
    name = read_json(config).get("_class_name") if config.is_file() else None
    return [entry[0], name] if isinstance(entry, list) and isinstance(name, str) else entry
