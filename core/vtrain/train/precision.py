"""A frozen base in int8, fp8 or int4, by optimum-quanto: the Linear and Conv2d layers of the blocks, one block after the other.

What lies outside of blocks, norms, biases and modulation tables stay in bf16, and so does a convolution that gets an adapter.
The adapter is put on afterwards: it renames the modules that it wraps, and its own weights are fp32.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtrain.contract import Denoiser
from vtrain.contract.precision import StorageType
from vtrain.plan.precision import adapted, kept_words


def quantise(denoiser: Denoiser, storage: StorageType, targets: Sequence[str], device: str, *, there: bool) -> str:
    """In place; the whole denoiser is on `device` afterwards. Gives what of its blocks could not be quantised, in words.

    The denoiser is loaded in bf16 on the CPU. targets: names of the modules that will get an adapter. there: quantise each block
    on `device` instead of on the CPU; either way the device never holds more than the quantised model and one block of bf16.
    """
    kept: dict[str, str] = {}
    paths = {id(module): name for name, module in denoiser.module.named_modules()}
    for block in denoiser.blocks:
        if there:
            block.to(device)
        quantise_block(block, paths[id(block)], storage, tuple(targets), kept)
    denoiser.module.to(device)  # never with a type: weights that are quantised raise
    return kept_words(kept, storage)


def quantise_block(
    block: nn.Module, path: str, storage: StorageType, targets: tuple[str, ...], kept: dict[str, str]
) -> None:
    """path: its name in the model. kept: layers that stay as they are are added, by name -> why."""
    from optimum.quanto import freeze, qtypes, quantize

    chosen = []
    for name, layer in block.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        full = f"{path}.{name}" if path else name
        if fault := _fault(layer, full, storage, targets):
            kept[full] = fault
        else:
            chosen.append(name)
    if not chosen:
        return
    with torch.no_grad():
        quantize(block, weights=qtypes[storage.quanto], include=chosen)
        freeze(block)  # until then quanto quantises at each forward, and keeps the weights as they were
    for name in chosen:
        layer = block.get_submodule(name)
        layer.requires_grad_(False)
        layer.register_forward_pre_hook(_fitted)


def _fault(layer: nn.Linear | nn.Conv2d, name: str, storage: StorageType, targets: tuple[str, ...]) -> str:
    shape = tuple(layer.weight.shape)
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"it is a {type(layer).__name__}, which quanto would make a plain one"
    if layer.weight.dtype is not torch.bfloat16:
        return "the model keeps it in fp32"
    return adapted(name, shape, targets) or storage.fault(shape)


def _fitted(layer: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    """The input of a quantised layer as its kernels take it.

    Autocast knows nothing of them, so fp32 is made bf16 here; and torch's int8 product on a CPU is wrong, or ends the process,
    for a Linear's input that is not contiguous, such as attention's transposed one before to_out.
    """
    (value,) = given
    weight = layer.weight
    assert isinstance(weight, Tensor)
    value = value.to(weight.dtype)
    return (value.contiguous() if isinstance(layer, nn.Linear) else value,)


def held_bytes(weight: Tensor) -> int:
    """What a weight takes in memory: of a quantised one its packed numbers and its scales, whichever of quanto's kinds it is."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()
    return sum(held_bytes(getattr(weight, name)) for name in names)
