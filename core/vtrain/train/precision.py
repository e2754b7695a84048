"""A frozen base in int8, fp8 or int4, by optimum-quanto: the Linear and Conv2d layers of the blocks, one block after the other.

What lies outside of blocks, norms, biases and modulation tables stay in bf16, and so does a convolution that gets an adapter.
The adapter is put on afterwards: it renames the modules that it wraps, and its own weights are fp32.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

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


_AT_ONCE = 16
"""Numbers of a row that torch's int8 product on a CPU reads at once: of a row that they do not divide it reads past the end."""


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
    torch_kernels()
    with torch.no_grad():
        quantize(block, weights=qtypes[storage.quanto], include=chosen)
        freeze(block)  # until then quanto quantises at each forward, and keeps the weights as they were
    for name in chosen:
        layer = block.get_submodule(name)
        layer.requires_grad_(False)
        layer.register_forward_pre_hook(_fitted)
        if storage.name == "int8" and isinstance(layer, nn.Linear) and layer.in_features % _AT_ONCE:
            layer.register_forward_pre_hook(_widened)


def torch_kernels() -> None:
    """Have quanto compute by torch alone, in this process, where it would by kernels of its own (optimum-quanto 0.2.7).

    All of them are compiled at first use, into its own folder, and who installs a wheel need not have a compiler. And its fp8
    product for cards (Marlin) forgets a Linear's bias: a weight becomes one for it on its way to a card of CUDA 8.0 or later, if
    its sides fit and the extension is known.
    """
    from optimum.quanto.library.extensions import extension

    for each in extension._extensions.values():
        each._lib = SimpleNamespace(unpack=unpacked)  # what quanto calls on CPUs, MPS and cards
    extension._extensions.pop("quanto_cuda", None)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """The numbers of `bits` bits that lie in bytes (n, ...), low bits first: (n x 8 / bits, ...), uint8. quanto packs rows that
    are half of all apart into one byte."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


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


def _widened(_layer: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    """fp32 on a CPU: quanto makes it bf16 again, and multiplies by the numbers that the weight stands for."""
    (value,) = given
    return (value.float() if value.is_cpu else value,)


def held_bytes(weight: Tensor) -> int:
    """What a weight takes in memory: of a quantised one its packed numbers and its scales, whichever of quanto's kinds it is."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()
    return sum(held_bytes(getattr(weight, name)) for name in names)
