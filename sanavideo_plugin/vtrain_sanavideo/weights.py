"""safetensors files of one part of a checkpoint: their headers, without torch, and their tensors, into a module."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vtrain.contract import DType, HashFile, ModelError, Problem
from vtrain_sanavideo.geometry import SCALE_SHIFT_TABLE, Shape, misfits

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

SHOWN = 5
"""How many of many misfits a message names."""


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a part's weights. present: in order; missing: named by the index, or expected, and not there."""

    present: tuple[Path, ...]
    missing: tuple[Path, ...]


def weight_files(folder: Path, stem: str) -> WeightFiles:
    """Find `stem`.safetensors, or what `stem`.safetensors.index.json lists. Raises ValueError for a broken index."""
    index = folder / f"{stem}.safetensors.index.json"
    whole = folder / f"{stem}.safetensors"
    if whole.is_file() or not index.is_file():
        return WeightFiles((whole,), ()) if whole.is_file() else WeightFiles((), (whole,))
    content = json.loads(index.read_text(encoding="utf-8"))
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no weight_map")
    shards = [folder / str(name) for name in sorted(set(names.values()))]
    present = tuple(shard for shard in shards if shard.is_file())
    return WeightFiles(present, tuple(shard for shard in shards if shard not in present))


def content_hash(path: Path, hash_file: HashFile) -> str:
    """Of a file. The hub's cache keeps large files under their sha256, so those need no reading."""
    blob = path.resolve()
    known = blob.parent.name == "blobs" and len(blob.name) == 64
    return blob.name if known else hash_file(path)


def weight_hashes(folder: Path, stem: str, hash_file: HashFile) -> dict[str, str]:
    """Name -> content hash of each file that is there. Raises ValueError for a broken index."""
    return {path.name: content_hash(path, hash_file) for path in weight_files(folder, stem).present}


def read_header(path: Path) -> dict[str, Shape]:
    """Name and shape of each tensor of a safetensors file. Raises ValueError if the file is not whole or not one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"is truncated: it has {size} bytes and its header does not end in them")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError("is not a safetensors file") from error
    if size < 8 + length + end:
        raise ValueError(f"is truncated: its header speaks of {8 + length + end} bytes and it has {size}")
    return shapes


def file_problems(folder: Path, stem: str, *, may_be_fetched: bool = False) -> list[Problem]:
    """What is wrong with a part's weight files. may_be_fetched: files that are not there yet are no problem."""
    try:
        files = weight_files(folder, stem)
    except (OSError, ValueError) as error:
        return [Problem(str(folder), f"the index of the weights cannot be read: {error}.", "Download it again.")]
    problems = [
        Problem(str(path), "this weight file is missing.", "Download the model again, or correct the path.")
        for path in (() if may_be_fetched else files.missing)
    ]
    for path in files.present:
        try:
            read_header(path)
        except (OSError, ValueError) as error:
            problems.append(Problem(str(path), f"this weight file {error}.", "Download it again."))
    return problems


def stored_shapes(folder: Path, stem: str) -> dict[str, Shape]:
    """Name and shape of each stored weight. Raises ModelError for missing or broken files."""
    problems = file_problems(folder, stem)
    if problems:
        raise ModelError(problems)
    return {name: shape for path in weight_files(folder, stem).present for name, shape in read_header(path).items()}


def misfit_problem(folder: Path, lines: Sequence[str]) -> Problem:
    """One problem for weights that do not fit the config beside them."""
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return Problem(
        str(folder),
        f"the weights do not fit the config: {'; '.join(lines[:SHOWN])}{more}.",
        "Take weights and config.json from the same model.",
    )


def torch_type(name: DType) -> torch.dtype:
    """The storage type of that name."""
    import torch

    return torch.float32 if name == "fp32" else torch.bfloat16


def fill(module: nn.Module, folder: Path, stem: str, dtype: DType, device: str) -> None:
    """Give `module`, whose parameters are on the meta device, its weights, tensor by tensor, each in memory of its own.

    Raises ModelError for missing, unexpected, misshapen or truncated weights. Buffers are left as they are.
    """
    from safetensors import safe_open

    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    lines = misfits(expected, stored_shapes(folder, stem))
    if lines:
        raise ModelError(misfit_problem(folder, lines))
    state: dict[str, torch.Tensor] = {}
    for path in weight_files(folder, stem).present:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                state[name] = file.get_tensor(name).to(device=device, dtype=torch_type(dtype), copy=True)
    table = state.get(SCALE_SHIFT_TABLE)
    if table is not None and table.shape == (1, *expected[SCALE_SHIFT_TABLE]):
        logger.info("%s: %s is stored as %s; its leading 1 is dropped", folder, SCALE_SHIFT_TABLE, list(table.shape))
        state[SCALE_SHIFT_TABLE] = table[0]
    module.load_state_dict(state, strict=True, assign=True)
