"""An adapter that starts from a file, that is put into its base, and whether it changes anything."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vtrain.contract import ConfigError, Denoiser, ModelError, Problem, SupportsLora
from vtrain.contract.adapters import OTHER, AdapterFile, read_adapter
from vtrain.contract.lora_files import LORA_FILE
from vtrain.plan.adapter import lora_scale, start_file
from vtrain.plan.records import Plan
from vtrain.train.parameters import ADAPTER, load_lora_state, lora_state


def start_adapter(plan: Plan, denoiser: Denoiser) -> str:
    """Put the LoRA of [model.lora] start into the adapter; gives "sha256 path" of it, "" where none is named.

    Raises ConfigError for one that does not fit, ModelError for one that cannot be read.
    """
    table = plan.config.model.table.lora
    if table is None or table.start is None:
        return ""
    file = start_file(table.start, plan.family)
    state = adapter_state(file, lora_scale(table), lora_state(denoiser.module))
    if odd := load_lora_state(denoiser.module, state):
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        what = f"{file.path} does not fit the adapter that is described here: {', '.join(odd[:3])}{more}."
        remedy = "Its rank, targets and dora are those of [model.lora]."
        raise ConfigError(Problem(plan.config.where("model", "lora", "start"), what, remedy))
    with file.path.open("rb") as content:
        return f"{hashlib.file_digest(content, 'sha256').hexdigest()} {file.path}"


def adapter_state(file: AdapterFile, scale: float, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's weights under peft's names, fp32, with the same effect at another scale: B is multiplied by what is between.

    own: the adapter's, whose shapes magnitudes take.
    """
    try:
        stored = load_file(file.path)
    except (OSError, SafetensorError) as error:
        raise ModelError(Problem(str(file.path), f"the adapter cannot be read: {error}.")) from error
    state: dict[str, Tensor] = {}
    for (module, matrix), key in file.keys.items():
        if matrix == "alpha":
            continue
        value = stored[key].float()
        if not bool(value.isfinite().all()):
            raise ModelError(Problem(str(file.path), f"{key} is not finite.", OTHER))
        if matrix == "B" and file.modules[module].scale != scale:
            value = value * (file.modules[module].scale / scale)
        name = f"{module}.lora_magnitude_vector" if matrix == "magnitude" else f"{module}.lora_{matrix}.weight"
        # Magnitudes have three shapes among tools, and a Linear's matrices may be kernels of 1x1.
        if name in own and own[name].numel() == value.numel():
            value = value.reshape(own[name].shape)
        state[name] = value.contiguous()
    return state


def read_back(lora: SupportsLora, folder: Path, settings: Mapping[str, object]) -> dict[str, Tensor]:
    """An adapter as a checkpoint has it, whose file says the scale that it was trained at. settings: `lora_settings`.

    Raises ModelError. Of a file in a format of its family's own the weights alone are looked at.
    """
    path, rank, alpha = folder / LORA_FILE, settings["r"], settings["lora_alpha"]
    assert isinstance(rank, int)
    assert isinstance(alpha, int | float)
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    if path.is_file():
        for name, found in read_adapter(path).modules.items():
            if not math.isclose(found.scale, scale, rel_tol=1e-6):
                what = f"it says that {name} is scaled by {found.scale:.4g}, and it was trained at {scale:.4g}."
                raise ModelError(Problem(str(path), what))
    return lora.load_lora(folder)


def changes_nothing(state: Mapping[str, Tensor]) -> bool:
    """Whether each B is zero. Where DoRA's magnitudes move B does, too."""
    seconds = [value for name, value in state.items() if ".lora_B." in name]
    return bool(seconds) and not any(bool(value.any()) for value in seconds)


def adapted_layers(module: nn.Module) -> list[Any]:
    """Those that have an adapter, as peft has them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def merged_state(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights of a denoiser under its own names, its adapter merged into them by peft.

    module: with weights in fp32, so that the sum is rounded once. dtype: of all but what its class keeps in fp32; None: as it is.
    """
    merge(module)
    own = {name: value.detach() for name, value in module.state_dict().items() if "lora_" not in name}
    state = {name.replace(".base_layer.", "."): value for name, value in own.items()}
    return {name: value.to(_stored_as(module, name, value, dtype)) for name, value in state.items()}


def merge(module: nn.Module) -> None:
    """Put the adapter into the weights that it is on, in place, by peft, where it is not yet."""
    for layer in adapted_layers(module):
        if not layer.merged:
            layer.merge(safe_merge=True, adapter_names=[ADAPTER])


def round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """The weights, in place, as `merged_state` would store them in `dtype`; they keep their type."""
    for name, value in module.state_dict().items():
        value.copy_(value.to(_stored_as(module, name, value, dtype)))


def _stored_as(module: nn.Module, name: str, value: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Type of a weight in a file in `dtype`: its own if its class keeps it in fp32, or if it is no fraction."""
    precise = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    own = dtype is None or precise.intersection(name.split(".")) or not value.is_floating_point()
    return value.dtype if dtype is None or own else dtype


def folded_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings of a LoRA file with rsLoRA's scale as an alpha: tools that know alpha / rank alone scale it right, too."""
    folded = dict(settings)
    if folded.pop("use_rslora", False):
        rank, alpha = folded["r"], folded["lora_alpha"]
        assert isinstance(rank, int)
        assert isinstance(alpha, int | float)
        folded["lora_alpha"] = alpha * rank**0.5
    return folded


def save_comfyui(folder: Path, state: Mapping[str, Tensor], names: Mapping[str, str], scale: float, file: str) -> None:
    """Write a LoRA in ComfyUI's keys. names: `comfyui_names` of the state; scale: of every module.

    The scale goes into B, and no `.alpha` says another: without one tools scale by 1, and diffusers 0.42 reads `.alpha` of a
    block's layers alone.
    """
    from safetensors.torch import save_file

    up = ".lora_up.weight"
    tensors = {names[name]: value * scale if names[name].endswith(up) else value for name, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / file)
