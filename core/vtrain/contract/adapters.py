"""A LoRA file of any tool, from its header: which modules it adapts, at which rank and scale. Nothing here imports torch.

Files name the same modules in many ways: "transformer.blocks.0.attn1.to_q.lora_A.weight" (diffusers), "base_model.model.blocks..."
(peft), "diffusion_model.blocks.0.self_attn.q.lora_down.weight" (ComfyUI, by the authors' names), "lora_unet_blocks_0_self_attn_q
.lora_down.weight" (kohya). Their scale stands in metadata, in a tensor "<module>.alpha", beside them in adapter_config.json, or
nowhere: then alpha is the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from vtrain.contract.errors import ModelError, Problem
from vtrain.contract.lora_files import LORA_FILE, renamed_module
from vtrain.contract.weights import Shape, StoredTensor, stored_metadata, stored_numbers_of, stored_tensors

PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
"""What peft's own `save_pretrained` writes."""

Matrix = Literal["A", "B", "magnitude", "alpha"]

ENDS: Mapping[str, Matrix] = {
    "lora_A.weight": "A", "lora_A.default.weight": "A", "lora_down.weight": "A", "lora.down.weight": "A",
    "lora_B.weight": "B", "lora_B.default.weight": "B", "lora_up.weight": "B", "lora.up.weight": "B",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude", "dora_scale": "magnitude", "alpha": "alpha",
}  # fmt: skip
"""How the names of an adapter's tensors end -> what they are: A (rank, in), B (out, rank), DoRA's magnitudes (out), the scale's
alpha."""

PREFIXES = ("transformer.", "base_model.model.", "diffusion_model.", "model.diffusion_model.", "model.", "unet.", "")
"""Before a module's name; the last fits all."""

FLOATS = ("F64", "F32", "BF16", "F16")
"""Types in which an adapter's weights are stored."""

KOHYA = "lora_unet_"
"""Before a module's name of kohya's, whose dots are underscores."""


@runtime_checkable
class SupportsAdapterNames(Protocol):
    """A family that knows its denoiser's weights before it is loaded: a plan then refuses an adapter that cannot fit."""

    def weight_shapes(self) -> Mapping[str, Shape]:
        """Name and shape of every weight, as in the `state_dict` of the denoiser's module."""
        ...

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """As `SupportsLora.lora_targets` of its denoiser; () for a family without adapters."""
        ...

    @property
    def original_names(self) -> Mapping[str, str]:
        """As `SupportsOriginalNames` of its denoiser; {} where it has no others."""
        ...


@dataclass(frozen=True)
class AdaptedModule:
    """What a file has of one module. scale: by which B A is multiplied. magnitudes: DoRA's. inside, outside: in and out. kernel: of
    a convolution, () of a Linear."""

    rank: int
    scale: float
    inside: int
    outside: int
    magnitudes: bool
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA file. modules: name in the model -> what it has of it. keys: (module, matrix) -> name in the file.

    foreign: names in the file that are of no module of the model, or no weights of a LoRA. incomplete: modules that lack A or B.
    """

    path: Path
    modules: Mapping[str, AdaptedModule]
    keys: Mapping[tuple[str, Matrix], str]
    foreign: tuple[str, ...]
    incomplete: tuple[str, ...]


def adapter_path(given: Path) -> Path:
    """The LoRA file itself, of a file or a folder. Raises ModelError if there is none, or if there are several."""
    if given.is_file():
        if given.suffix != ".safetensors":
            what = "this is no safetensors file, and pickles are not read."
            raise ModelError(Problem(str(given), what, "Convert it to safetensors."))
        return given
    if not given.is_dir():
        raise ModelError(Problem(str(given), "there is no such file or folder.", "Correct model.lora.start."))
    for name in (LORA_FILE, PEFT_FILE):
        if (given / name).is_file():
            return given / name
    found = sorted(given.glob("*.safetensors"))
    if len(found) != 1:
        there = f"{len(found)} safetensors files are here, and none is called" if found else "here is no"
        what = f"{there} {LORA_FILE} or {PEFT_FILE}."
        raise ModelError(Problem(str(given), what, "Name the LoRA file itself in model.lora.start."))
    return found[0]


def read_adapter(
    path: Path, shapes: Mapping[str, Shape] | None = None, original_names: Mapping[str, str] | None = None
) -> AdapterFile:
    """A LoRA file, as `adapter_path` gives it.

    shapes: of the model's weights; None: not known, and every module that the file names is taken for one of it.
    original_names: as SupportsOriginalNames has them. Raises ModelError for what is no safetensors file.
    """
    try:
        tensors, metadata = stored_tensors(path), stored_metadata(path)
    except (OSError, ValueError) as error:
        raise ModelError(Problem(str(path), f"this adapter {error}.", "Download it again.")) from error
    known = None if shapes is None else _names(shapes, original_names or {})
    keys: dict[tuple[str, Matrix], str] = {}
    foreign = []
    for key in tensors:
        found = _module_of(key, known)
        if found is None or found in keys:
            foreign.append(key)
        else:
            keys[found] = key
    names = list(dict.fromkeys(module for module, _ in keys))
    whole = [name for name in names if (name, "A") in keys and (name, "B") in keys]
    settings = _settings(path, metadata)
    modules = {name: _adapted(path, name, keys, tensors, settings) for name in whole}
    return AdapterFile(path, modules, keys, tuple(foreign), tuple(name for name in names if name not in whole))


def matches(module: str, target: str) -> bool:
    """Whether a target of [model.lora] is that module, as peft has it."""
    return module == target or module.endswith(f".{target}")


GROUPED = "{} is a convolution in groups of channels, which can have no adapter that is merged again."
"""What is wrong with such a target. peft puts an adapter on some, and cannot merge it."""


def in_groups(shape: Shape) -> bool:
    """Whether a weight is that of a convolution by channel: each output sees one input."""
    return len(shape) > 2 and shape[1] == 1 and shape[0] > 1


def layers(shapes: Mapping[str, Shape]) -> list[str]:
    """Modules with a weight that can have an adapter: Linear layers and convolutions, not norms."""
    ends = ".weight"
    return [name.removesuffix(ends) for name, shape in shapes.items() if name.endswith(ends) and len(shape) > 1]


def targets_of(modules: Sequence[str], among: Sequence[str]) -> list[str]:
    """The shortest ends of names that match `modules` and nothing else of `among`: what to write as targets."""
    wanted, found = set(modules), []
    while wanted:
        parts = sorted(wanted)[0].split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1) if not parts[start].isdigit()]
        # The last end is the whole name, which matches itself alone.
        best = next(end for end in ends if all(name in modules for name in among if matches(name, end)))
        found.append(best)
        wanted -= {name for name in wanted if matches(name, best)}
    return sorted(found)


def _names(shapes: Mapping[str, Shape], original_names: Mapping[str, str]) -> dict[str, str]:
    """Every name by which a file may call a module -> the model's own."""
    own = layers(shapes)
    theirs = {renamed_module(name, original_names): name for name in own}
    plain = {**theirs, **{name: name for name in own}}
    return {**{KOHYA + name.replace(".", "_"): module for name, module in plain.items()}, **plain}


def _module_of(key: str, known: Mapping[str, str] | None) -> tuple[str, Matrix] | None:
    ends = [end for end in ENDS if key.endswith(f".{end}")]
    if not ends:
        return None
    end = max(ends, key=len)
    name = key.removesuffix(f".{end}")
    inner = [name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)]
    if known is None:
        return inner[0], ENDS[end]
    found = next((known[each] for each in inner if each in known), None)
    return None if found is None else (found, ENDS[end])


@dataclass(frozen=True)
class _Settings:
    """What stands beside the tensors of the scale. alphas: of modules by name, beside the one of all."""

    alpha: float | None
    rslora: bool
    alphas: Mapping[str, float]


def _settings(path: Path, metadata: Mapping[str, str]) -> _Settings:
    found: dict[str, object] = {}
    for text in (metadata.get("lora_adapter_metadata"), _beside(path)):
        try:
            content = json.loads(text) if text else None
        except ValueError as error:
            raise ModelError(
                Problem(str(path), f"what this adapter says of itself cannot be read: {error}.")
            ) from error
        if isinstance(content, dict):
            found = {key.removeprefix("transformer."): value for key, value in content.items()} | found
    alpha, patterns = found.get("lora_alpha"), found.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ModelError(Problem(str(path), f"alpha_pattern of this adapter is {patterns!r}, and no table.", OTHER))
    alphas = {_pattern(path, name): _alpha(path, f'alpha_pattern "{name}"', value) for name, value in patterns.items()}
    whole = None if alpha is None else _alpha(path, "lora_alpha", alpha)
    return _Settings(whole, found.get("use_rslora") is True, alphas)


OTHER = "Take another file."
"""The remedy where a file cannot be right."""


_END = r"(.*\.)?({})$"
"""peft's regular expression for the end of a module's name."""


def _pattern(path: Path, name: str) -> str:
    """A key of alpha_pattern, which peft takes for a regular expression. Raises ModelError for what is none."""
    try:
        re.compile(_END.format(name))
    except re.error as error:
        what = f'alpha_pattern "{name}" of this adapter is no regular expression: {error.msg}.'
        raise ModelError(Problem(str(path), what, OTHER)) from error
    return name


def _alpha(path: Path, name: str, value: object) -> float:
    """An alpha, finite and above 0. Raises ModelError for anything else: a scale of 0 would be no adapter at all."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(Problem(str(path), f"{name} of this adapter is {value!r}, and not a number above 0.", OTHER))
    return float(value)


def _beside(path: Path) -> str:
    """adapter_config.json of peft, which holds the scale of a file without metadata. Raises ModelError."""
    file = path.with_name(PEFT_SETTINGS)
    if path.name != PEFT_FILE or not file.is_file():
        return ""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(Problem(str(file), f"cannot be read: {error}.", OTHER)) from error


def _by_pattern(name: str, alphas: Mapping[str, float]) -> float | None:
    """The alpha of a module by peft's rule: keys are regular expressions for the end of the name; the first that fits counts."""
    return next((alpha for pattern, alpha in alphas.items() if re.match(_END.format(pattern), name)), None)


def _adapted(
    path: Path,
    name: str,
    keys: Mapping[tuple[str, Matrix], str],
    tensors: Mapping[str, StoredTensor],
    settings: _Settings,
) -> AdaptedModule:
    for matrix in ("A", "B", "magnitude"):
        key = keys.get((name, matrix))
        if key is not None and tensors[key].dtype not in FLOATS:
            what = f"{key} is stored as {tensors[key].dtype}: these are no weights of a LoRA, but quantised ones."
            raise ModelError(Problem(str(path), what, OTHER))
    first, second = tensors[keys[name, "A"]].shape, tensors[keys[name, "B"]].shape
    if len(first) < 2 or len(second) < 2 or first[0] != second[1]:
        what = f"A and B of {name} are {list(first)} and {list(second)}: these are no matrices of one rank."
        raise ModelError(Problem(str(path), what, OTHER))
    rank = first[0]
    own = keys.get((name, "alpha"))
    given = _by_pattern(name, settings.alphas)
    given = settings.alpha if given is None else given
    alpha = _stored_alpha(path, own) if own else float(rank) if given is None else given
    scale = alpha / (math.sqrt(rank) if settings.rslora and not own else rank)
    return AdaptedModule(rank, scale, first[1], second[0], (name, "magnitude") in keys, tuple(first[2:]))


def _stored_alpha(path: Path, key: str) -> float:
    numbers = stored_numbers_of(path, key)
    return _alpha(path, key, numbers[0] if len(numbers) == 1 else list(numbers))


def misfits_of(file: AdapterFile, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Modules of the file whose width or kernel is not the model's. A Linear's matrices may be stored as kernels of 1x1."""
    for name, found in file.modules.items():
        shape = shapes.get(f"{name}.weight")
        if shape is None:
            continue
        if (found.outside, found.inside) != shape[:2]:
            yield f"{name} is {found.inside} -> {found.outside} instead of {shape[1]} -> {shape[0]}"
        elif found.kernel != tuple(shape[2:]) and not (len(shape) == 2 and set(found.kernel) == {1}):
            yield f"{name} has a kernel of {_kernel(found.kernel)} instead of {_kernel(shape[2:])}"


def _kernel(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides)) or "1"
