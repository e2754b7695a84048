"""Rules of what parts give in a run: a run asks for them at each step or checkpoint, and the conformance kit before it.

A rule gives the fault as text that follows the part's name, "" where there is none. Shapes and types alone are looked at:
nothing is read from the device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

from vtrain.contract.device import Device
from vtrain.contract.records import LossTerm

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def corrupt_fault(found: object, clean: Tensor) -> str:
    """Of what Sampler.corrupt gave for `clean` (B, C, f, h, w): (noisy, target), both of its shape, in fp32, bf16 or fp16."""
    if isinstance(found, tuple) and len(found) == 2 and all(_is_like(each, clean.shape) for each in found):
        return ""
    gave = ", ".join(map(_described, found)) if isinstance(found, tuple) else _described(found)
    return f"its corrupt gave ({gave}) where (noisy, target) of {tuple(clean.shape)} were asked for"


def prediction_fault(found: object, noisy: Tensor) -> str:
    """Of what Denoiser.predict gave for `noisy`: of its shape, in fp32, bf16 or fp16, and in the graph where there is one."""
    import torch

    if not _is_like(found, noisy.shape):
        return f"its predict gave {_described(found)} where {tuple(noisy.shape)} of fp32, bf16 or fp16 was asked for"
    if isinstance(found, torch.Tensor) and torch.is_grad_enabled() and not found.requires_grad:
        return "its predict gave a tensor outside the graph, from which no weight learns"
    return ""


def term_fault(found: object) -> str:
    """Of what a regularizer's module gave: a LossTerm with a loss and metrics that are such."""
    if fault := loss_fault(found):
        return fault
    assert isinstance(found, LossTerm)
    for key, value in found.metrics.items():
        if fault := metric_fault(key, value):
            return fault
    return ""


def loss_fault(found: object) -> str:
    """Of a regularizer's LossTerm: a value that is a single number in fp32, bf16 or fp16, in the graph where there is one."""
    import torch

    if not isinstance(found, LossTerm):
        return f"its loss module gave {_described(found)}, not a LossTerm"
    if not _is_like(found.value, ()):
        return f"its loss is {_described(found.value)}, not a tensor of a single number in fp32, bf16 or fp16"
    if torch.is_grad_enabled() and not found.value.requires_grad:
        why = "outside the graph, so that nothing learns from it; where it has nothing to do, SupportsPauses says so"
        return f"its loss is {why}"
    return ""


def metric_fault(key: str, value: object) -> str:
    """Of a metric of a LossTerm: a detached tensor of a single number."""
    import torch

    if isinstance(value, torch.Tensor) and not value.ndim and not value.requires_grad:
        return ""
    kept = " in the graph" if isinstance(value, torch.Tensor) and value.requires_grad else ""
    return f'its metric "{key}" is {_described(value)}{kept}, not a detached tensor of a single number'


SET_BY_THE_RUN = ("params", "param_names", "lr", "initial_lr")
"""Keys of a group that the run gives: a checkpoint never brings them."""

Built = Sequence[Mapping[str, object]]
"""The groups of an optimizer as `build` gave them, each a copy: what is other later on, the optimizer keeps there itself."""


def built_groups(optimizer: torch.optim.Optimizer, own: Collection[str]) -> Built:
    """To be taken before the first step and before a checkpoint is loaded. own: settings that the configuration file gives."""
    fixed = {*SET_BY_THE_RUN, *own}
    return [
        {key: deepcopy(value) for key, value in group.items() if key not in fixed} for group in optimizer.param_groups
    ]


def kept_in_groups(optimizer: torch.optim.Optimizer, own: Collection[str], built: Built) -> Built:
    """What each group has beyond what `build` put there, or otherwise: counts (schedule-free's k, prodigy's d), flags, tensors."""
    fixed = {*SET_BY_THE_RUN, *own}
    return [
        {
            key: value
            for key, value in group.items()
            if key not in fixed and not (key in before and _alike(value, before[key]))
        }
        for group, before in zip(optimizer.param_groups, built, strict=True)
    ]


def _alike(one: object, other: object) -> bool:
    """Whether a group's entry is what it was, also in lists, tuples and tables. No device is read: there, nothing is alike."""
    import torch

    if isinstance(one, torch.Tensor):
        if not isinstance(other, torch.Tensor) or Device.of(one).accelerated or Device.of(other).accelerated:
            return False
        return one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return one == other


def lost_state(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    own: Collection[str],
    built: Built,
    *,
    stateful: bool,
) -> Iterator[str]:
    """What an optimizer keeps that no checkpoint brings back: a resumed run would be another run.

    own: settings of groups that the configuration file gives. built: of `built_groups`. stateful: it has made a step, and its
    spec has state_bytes > 0: where optimizer.state is empty then, tensors like its parameters in attributes of its own are its
    state.
    """
    import torch

    trained = {id(parameter): parameter for parameter in parameters}
    if type(optimizer).state_dict is not torch.optim.Optimizer.state_dict:
        keys = optimizer.state_dict().keys() - {"state", "param_groups"}
        yield from (f'"{key}" of its state_dict' for key in sorted(keys))
    for key, state in optimizer.state.items():
        if id(key) not in trained:
            yield f"optimizer.state of {key if isinstance(key, str) else f'a {type(key).__name__}'}"
            continue
        for name, value in state.items():
            if not isinstance(value, torch.Tensor | int | float | str | None):
                yield f'"{name}" of a parameter, a {type(value).__name__}'
    for group in kept_in_groups(optimizer, own, built):
        for name, value in group.items():
            if isinstance(value, torch.Tensor) and Device.of(value).accelerated:
                yield f'"{name}" of a group, a tensor on {value.device}'
            elif not isinstance(value, torch.Tensor | int | float | str | None):
                yield f'"{name}" of a group, a {type(value).__name__} that changes'
    if stateful and not any(optimizer.state.values()):
        yield from _in_attributes(optimizer, trained)


def state_fits(state: Mapping[str, object], parameter: Tensor) -> bool:
    """Whether what a checkpoint has can be of a parameter of this shape: of the tensors with as many dimensions, one has its
    lengths, or 1 in place of some (Adafactor's rows and columns). Others may be of other lengths: of a vector, an optimizer may
    keep a scale for each 256 numbers, or every fourth of them. Tensors of a single number say nothing.
    """
    import torch

    shapes = [each.shape for each in state.values() if isinstance(each, torch.Tensor) and each.numel() > 1]
    alike = [shape for shape in shapes if len(shape) == parameter.ndim]
    return not alike or any(
        all(one in (1, own) for one, own in zip(shape, parameter.shape, strict=True)) for shape in alike
    )


def _in_attributes(optimizer: torch.optim.Optimizer, trained: Mapping[int, Tensor]) -> Iterator[str]:
    """Attributes of its own with tensors that are shaped like parameters, and are none. trained: by their id."""
    shapes = {parameter.shape for parameter in trained.values() if parameter.ndim}
    for name, value in vars(optimizer).items():
        kept = (each for each in _tensors(value) if each.shape in shapes and id(each) not in trained)
        if name not in ("state", "param_groups", "defaults") and any(True for _ in kept):
            yield f'"{name}", an attribute with tensors that are shaped like weights'


def _tensors(value: object, depth: int = 3) -> Iterator[Tensor]:
    """Those in lists, tuples and tables, and in such that lie in them, down to `depth`."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each, depth - 1)


def _is_like(value: object, shape: tuple[int, ...]) -> bool:
    """Whether it is a tensor of this shape, of a type that is trained in: others train on without a word, cast or broadcast."""
    import torch

    types = (torch.float32, torch.bfloat16, torch.float16)
    return isinstance(value, torch.Tensor) and value.dtype in types and value.shape == shape


def _described(value: object) -> str:
    """ "float64 (2, 4, 3, 8, 8)" of a tensor, "a tuple" of what is none."""
    import torch

    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
