"""Other weights in the place of those in training, for a while: averages, or an optimizer's own evaluation weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def swapped(named: Iterable[tuple[str, Tensor]], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, each parameter holds what `values` has under its name, cast to its type; afterwards training's exact bits again,
    also after an exception.

    values: of any type and device, each asked for once, so that a mapping may make them one at a time. A name that it lacks
    keeps its weights. Raises ValueError, with nothing changed, where a shape is another.

    Everything is copied in place: compiled code, DDP and offload keep the addresses of parameters. A value of a parameter's own
    device and type is exchanged with it, which takes no memory beyond one parameter's: until the end it holds training's
    weights, and nobody may read or change it. For any other, training's weights wait in main memory, as many bytes as they
    have; the device holds no second set.
    """
    held: list[
        tuple[Tensor, Tensor, bool]
    ] = []  # a parameter, where its bits are, whether those are in the value itself
    with torch.no_grad():
        try:
            for name, parameter in named:
                if name in values:
                    held.append(_exchanged(name, parameter.detach(), values[name].detach()))
        except BaseException:
            _given_back(held)
            raise
    try:
        yield
    finally:
        with torch.no_grad():
            _given_back(held)


def _exchanged(name: str, weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Put the value into the weights. Nothing is changed where it raises: what can fail comes before the first copy."""
    if weights.shape != value.shape:
        raise ValueError(f"{name} is {tuple(weights.shape)}, and its value {tuple(value.shape)}")
    alike = (value.dtype, value.device) == (weights.dtype, weights.device)
    if alike:
        one = value.clone()
        value.copy_(weights)
        weights.copy_(one)
        return weights, value, True
    # A copy also where the weights lie in main memory already: `to` would give themselves.
    kept = weights.to("cpu", copy=True)
    weights.copy_(value)
    return weights, kept, False


def _given_back(held: list[tuple[Tensor, Tensor, bool]]) -> None:
    while held:
        weights, kept, exchanged = held.pop()  # each stash is let go as it is used
        if exchanged:
            one = weights.clone()
            weights.copy_(kept)
            kept.copy_(one)
        else:
            weights.copy_(kept)
