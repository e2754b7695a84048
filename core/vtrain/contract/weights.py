"""Weights of one part of a checkpoint, as diffusers and transformers lay them out: safetensors, in one file or in shards.

Headers are read without torch, tensors into a module. For families and regularizers whose models are on disk.
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from vtrain.contract.errors import ModelError, Problem
from vtrain.contract.protocols import DType, HashFile

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

_SHOWN = 5
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


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a safetensors file. dtype: as safetensors names it. begin, end: of its bytes, after the header."""

    dtype: str
    shape: Shape
    begin: int
    end: int


def parse_header(text: bytes) -> tuple[dict[str, StoredTensor], Mapping[str, str]]:
    """A safetensors header, without the 8 bytes of its length: tensors in the order of their bytes, and the metadata.

    Raises ValueError for what is none.
    """
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        tensors = [
            (name, StoredTensor(each["dtype"], tuple(map(int, each["shape"])), *map(int, each["data_offsets"])))
            for name, each in header.items()
        ]
        return dict(sorted(tensors, key=lambda named: named[1].begin)), metadata
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("its header is none of safetensors") from error


def stored_tensors(path: Path) -> Mapping[str, StoredTensor]:
    """Of a safetensors file. Raises ValueError, in words that follow "this weight file", if it is not whole or not one."""
    state = path.stat()
    return _tensors_of(path, state.st_size, (state.st_ino, state.st_mtime_ns, state.st_ctime_ns))


@lru_cache(maxsize=128)  # a plan asks a dozen times: whether files are whole, which shapes, whether they fit
def _tensors_of(path: Path, size: int, state: tuple[int, ...]) -> Mapping[str, StoredTensor]:
    """state: what another file in the same place has otherwise."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"is truncated: it has {size} bytes and its header does not end in them")
        try:
            tensors, _ = parse_header(file.read(length))
        except ValueError as error:
            raise ValueError("is not a safetensors file") from error
    end = max((tensor.end for tensor in tensors.values()), default=0)
    if size < 8 + length + end:
        raise ValueError(f"is truncated: its header promises {8 + length + end} bytes and it has {size}")
    return tensors


def stored_metadata(path: Path) -> Mapping[str, str]:
    """What a safetensors file says of itself. Raises ValueError as `stored_tensors`."""
    stored_tensors(path)
    with path.open("rb") as file:
        _, metadata = parse_header(file.read(int.from_bytes(file.read(8), "little")))
    return metadata if isinstance(metadata, Mapping) else {}


def weight_problems(folder: Path, stem: str, *, may_be_fetched: bool = False) -> list[Problem]:
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
            problems += _quantised(path, stored_tensors(path))
        except (OSError, ValueError) as error:
            problems.append(Problem(str(path), f"this weight file {error}.", "Download it again."))
    return problems


_QUANTISED = re.compile(r"F8_|F4$|F6_|I8$|U8$")
"""safetensors' names of types in which weights are stored quantised: without their scales, or as if they had none."""


def _quantised(path: Path, tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    """Weights that somebody has quantised: read as they are they would be others, without a word."""
    found = [name for name, tensor in tensors.items() if _QUANTISED.match(tensor.dtype) and len(tensor.shape) > 1]
    if not found:
        return []
    kinds = ", ".join(sorted({tensors[name].dtype for name in found}))
    what = f"{len(found)} of its weights are stored quantised ({kinds}), such as {found[0]}."
    remedy = "Take the model's own weights, in bf16 or fp32; precision.base quantises them when they are loaded."
    return [Problem(str(path), what, remedy)]


def stored_shapes(folder: Path, stem: str) -> dict[str, Shape]:
    """Name and shape of each stored weight. Raises ModelError for missing or broken files."""
    problems = weight_problems(folder, stem)
    if problems:
        raise ModelError(problems)
    files = weight_files(folder, stem).present
    return {name: tensor.shape for path in files for name, tensor in stored_tensors(path).items()}


def stored_numbers(folder: Path, stem: str, names: Collection[str]) -> dict[str, tuple[float, ...]]:
    """The numbers of those of `names` that are stored, each flattened: for small tensors, such as a codec's statistics.

    Raises ModelError for missing or broken files, and for a storage type that holds no floating-point numbers.
    """
    problems = weight_problems(folder, stem)
    if problems:
        raise ModelError(problems)
    numbers: dict[str, tuple[float, ...]] = {}
    for path in weight_files(folder, stem).present:
        for name, tensor in stored_tensors(path).items():
            if name in names:
                numbers[name] = _numbers(path, name, tensor)
    return numbers


def stored_numbers_of(path: Path, name: str) -> tuple[float, ...]:
    """The numbers of one small tensor of a safetensors file. Raises ModelError for a storage type of other numbers."""
    return _numbers(path, name, stored_tensors(path)[name])


def _numbers(path: Path, name: str, tensor: StoredTensor) -> tuple[float, ...]:
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little") + tensor.begin)
        data = file.read(tensor.end - tensor.begin)
    if tensor.dtype == "BF16":  # the upper half of an fp32 number
        data = b"".join(b"\0\0" + data[start : start + 2] for start in range(0, len(data), 2))
    form = {"F64": "d", "F32": "f", "BF16": "f", "F16": "e"}.get(tensor.dtype)
    if form is None:
        what = f"{name} is stored as {tensor.dtype}, and numbers of F64, F32, BF16 or F16 are read."
        raise ModelError(Problem(str(path), what, "Take the model's own weights."))
    return tuple(number for (number,) in struct.iter_unpack(f"<{form}", data))


def misfits(
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    unsqueezed: Collection[str] = (),
    ignored: Collection[str] = (),
) -> list[str]:
    """How stored weights differ from what the model has, one line for each weight, missing ones first.

    unsqueezed: names that some checkpoints store with a leading 1 more, which is no difference. ignored: patterns (`re.search`)
    of names that the model's class reads over, as its `_keys_to_ignore_on_load_unexpected` has them.
    """
    missing = [f"{name} is missing" for name in expected if name not in found]
    odd = [f"{name} is unexpected" for name in found if name not in expected and not is_ignored(name, ignored)]
    wrong = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape and not (name in unsqueezed and found[name] == (1, *shape))
    ]
    return missing + wrong + odd


def is_ignored(name: str, patterns: Collection[str]) -> bool:
    """Whether a stored weight that the model has not may be there, as `misfits` takes it."""
    return any(re.search(pattern, name) for pattern in patterns)


def misfit_problem(folder: Path, lines: Sequence[str]) -> Problem:
    """One problem for weights that do not fit the config beside them."""
    more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return Problem(
        str(folder),
        f"the weights do not fit the config: {'; '.join(lines[:_SHOWN])}{more}.",
        "Take weights and config.json from the same model.",
    )


def misfit_problems(
    folder: Path,
    stem: str,
    expected: Mapping[str, Shape],
    *,
    unsqueezed: Collection[str] = (),
    ignored: Collection[str] = (),
    some: bool = False,
) -> list[Problem]:
    """Whether stored weights fit a config, from their headers: without loading any, so that a plan can tell.

    expected: the shapes that the config asks for; some: of a few weights alone, those that bear its numbers, each by the end of
    its name, and others are no matter. unsqueezed, ignored: as `misfits` takes them. Files that are missing or broken are for
    `weight_problems` to report, and not reported here.
    """
    if weight_problems(folder, stem):
        return []
    stored = stored_shapes(folder, stem)
    if some:
        found = {end: name for name in stored for end in expected if f".{name}".endswith(f".{end}")}
        expected = {found.get(end, end): shape for end, shape in expected.items()}
        stored = {name: stored[name] for name in found.values()}
    lines = misfits(expected, stored, unsqueezed, ignored)
    return [misfit_problem(folder, lines)] if lines else []


@cache
def torch_type(name: DType) -> torch.dtype:
    """The storage type of that name."""
    import torch

    return torch.float32 if name == "fp32" else torch.bfloat16


def fill_module(
    module: nn.Module, folder: Path, stem: str, dtype: DType, device: str, unsqueezed: Collection[str] = ()
) -> None:
    """Give `module`, whose parameters are on the meta device, its weights, tensor by tensor, each in memory of its own.

    dtype: of all but what the module's class names in `_keep_in_fp32_modules`, which is fp32 as from_pretrained has it.
    unsqueezed: as `misfits` takes it; a leading 1 is dropped. What the class names in `_keys_to_ignore_on_load_unexpected` is
    not read, as from_pretrained has it. Raises ModelError for missing, unexpected, misshapen or truncated weights. Buffers are
    left as they are.
    """
    from safetensors import safe_open

    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    ignored: Collection[str] = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    lines = misfits(expected, stored_shapes(folder, stem), unsqueezed, ignored)
    if lines:
        raise ModelError(misfit_problem(folder, lines))
    precise = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    state: dict[str, torch.Tensor] = {}
    for path in weight_files(folder, stem).present:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in expected.keys() & file.keys():
                stored = file.get_tensor(name)
                if stored.shape != expected[name]:
                    logger.info("%s: %s is stored as %s; its leading 1 is dropped", folder, name, list(stored.shape))
                    stored = stored[0]
                chosen = torch_type("fp32" if precise.intersection(name.split(".")) else dtype)
                state[name] = stored.to(device=device, dtype=chosen, copy=True)
    module.load_state_dict(state, strict=True, assign=True)
