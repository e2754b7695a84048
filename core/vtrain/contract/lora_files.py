"""Adapters on disk: in diffusers' keys, and the names that ComfyUI looks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtrain.contract.errors import ModelError, Problem

if TYPE_CHECKING:
    from torch import Tensor

LORA_FILE = "pytorch_lora_weights.safetensors"
"""Where diffusers looks for an adapter in a folder."""

_COMFYUI = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
"""peft's ends of names -> ComfyUI's."""


def save_lora_file(
    folder: Path, state: Mapping[str, Tensor], settings: Mapping[str, object], loader: Any, part: str = "transformer"
) -> None:
    """Write folder/pytorch_lora_weights.safetensors, as `load_lora_weights` of a pipeline of diffusers reads it.

    state: weights by peft's names. settings: peft's own (r, lora_alpha, target_modules ...), which go into the file's metadata:
    without lora_alpha there, tools take alpha = r. loader: the pipeline's LoraLoaderMixin. part: of the pipeline that is adapted.
    Raises ValueError if r or lora_alpha is not given.
    """
    if absent := {"r", "lora_alpha"} - settings.keys():
        raise ValueError(f"settings of an adapter without {', '.join(sorted(absent))}")
    layers = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    given = {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": dict(settings)}
    loader.save_lora_weights(folder, **given)


def load_lora_file(folder: Path, title: str, part: str = "transformer") -> dict[str, Tensor]:
    """What `save_lora_file` wrote, by peft's names. title: of what it adapts, for messages.

    Raises ModelError for a missing or broken file, or one of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / LORA_FILE
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(Problem(str(path), f"the adapter cannot be read: {error}.")) from error
    if odd := sorted(name for name in stored if not name.startswith(f"{part}.")):
        raise ModelError(Problem(str(path), f"this is no adapter of a {title}: it has {odd[0]}."))
    return {name.removeprefix(f"{part}."): value.clone() for name, value in stored.items()}


def renamed_module(name: str, renames: Mapping[str, str]) -> str:
    """A module's name as the model's authors call it; renames: as `comfyui_names` takes them."""
    keys = sorted(renames, key=len, reverse=True)
    if not keys:
        return name
    pattern = re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, keys))})(?![^.])")
    return pattern.sub(lambda match: renames[match[0]], name)


def comfyui_names(names: Iterable[str], renames: Mapping[str, str]) -> dict[str, str]:
    """peft's name -> ComfyUI's name, of each weight of an adapter.

    ComfyUI calls modules as the model's authors do, not as diffusers does: renames has the difference, such as
    {"attn1": "self_attn", "to_out.0": "o"}; each key stands for whole parts of a dotted name, and of keys that overlap the longest
    is taken. "blocks.0.attn1.to_out.0.lora_A.weight" is then "diffusion_model.blocks.0.self_attn.o.lora_down.weight". The scale
    (alpha) of each module is "<name without .lora_down.weight>.alpha" there.

    Raises ValueError for names that are no LoRA weight's, and for two that would become one.
    """
    found: dict[str, str] = {}
    for name in names:
        end = next((end for end in _COMFYUI if name.endswith(f".{end}")), None)
        if end is None:
            raise ValueError(f"{name} is no weight of a LoRA adapter: it ends neither in {' nor in '.join(_COMFYUI)}")
        module = renamed_module(name.removesuffix(f".{end}"), renames)
        found[name] = f"diffusion_model.{module}.{_COMFYUI[end]}"
    if twice := sorted(new for new in found.values() if list(found.values()).count(new) > 1):
        raise ValueError(f"two weights would both be called {twice[0]}")
    return found
