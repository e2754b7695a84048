"""Weights for evaluation, of an optimizer that trains at others: for validation, averages and a checkpoint's averaged/."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtrain.contract import Event, SupportsEvalWeights
from vtrain.train.ema import swapped
from vtrain.train.parameters import DENOISER, adapter_names
from vtrain.train.piece import Copies, Keep, State
from vtrain.train.pieces import AdapterPiece, DenoiserPiece, on_cpu

if TYPE_CHECKING:
    from vtrain.train.sharding import Shares

AVERAGED = "averaged"
"""Folder of a checkpoint with the denoiser, or the adapter, as it is for evaluation."""

Named = list[tuple[str, Tensor]]


class EvalWeights(Mapping[str, Tensor]):
    """Name of a trained parameter -> its value for evaluation, on its device, made again each time that it is asked for."""

    def __init__(self, optimizer: SupportsEvalWeights, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """pairs: name -> the parameter, and the tensor that the optimizer moves, which may be its copy in main memory."""
        self._optimizer, self._pairs = optimizer, pairs

    def __getitem__(self, name: str) -> Tensor:
        weight, moved = self._pairs[name]
        return self._optimizer.eval_weight(moved).to(weight.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def of_denoiser(self) -> EvalWeights:
        """Those of the denoiser alone, under its own names."""
        own = {name.removeprefix(DENOISER): pair for name, pair in self._pairs.items() if name.startswith(DENOISER)}
        return EvalWeights(self._optimizer, own)


def eval_weights(optimizer: torch.optim.Optimizer, named: Named, moved: Named) -> EvalWeights | None:
    """None for an optimizer whose weights in training are those for evaluation, as nearly all are.

    moved: what the optimizer was given for `named`, in the same order.
    """
    if not isinstance(optimizer, SupportsEvalWeights):
        return None
    pairs = {name: (weight, own) for (name, weight), (_, own) in zip(named, moved, strict=True)}
    return EvalWeights(optimizer, pairs)


def validating_with(
    values: EvalWeights, named: Named, validate: Callable[[int], Iterator[Event]]
) -> Callable[[int], Iterator[Event]]:
    """The same validation, of the weights for evaluation; afterwards training's bits are where they were."""

    def validated(step: int) -> Iterator[Event]:
        with swapped(named, values):
            yield from validate(step)

    return validated


@dataclass(frozen=True)
class AveragedPiece:
    """The denoiser or its adapter as it is for evaluation, in the same format as beside it. Training is resumed without it.

    shares: where `named` are this process's shares.
    """

    of: DenoiserPiece | AdapterPiece
    values: EvalWeights
    named: Named
    shares: Shares | None = None
    name: ClassVar[str] = "averaged weights"
    files: ClassVar[tuple[str, ...]] = ()

    @property
    def bytes(self) -> int:
        return self.of.bytes

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        if not keep and self.shares is None:
            return State()
        live = self.of.live()
        trained = self._trained(live)
        found: dict[str, Tensor] = {}
        for key, value in live.items():  # one made at a time
            found |= on_cpu({key: self._value(trained[key]) if key in trained else value}, keep=keep, copy=copy)
        return State(found)

    def _trained(self, live: Mapping[str, Tensor]) -> dict[str, str]:
        """Key of the state -> name of the trained parameter that it is."""
        if self.shares is None:
            # A state's tensors are the parameters' own memory, whatever they are called there.
            names = {parameter.data_ptr(): name for name, parameter in self.named}
            return {key: names[value.data_ptr()] for key, value in live.items() if value.data_ptr() in names}
        adapter = isinstance(self.of, AdapterPiece)
        own = adapter_names(self.of.denoiser.module) if adapter else {key: key for key in live}
        return {key: DENOISER + name for key, name in own.items() if DENOISER + name in self.shares.whole}

    def _value(self, name: str) -> Tensor:
        value = self.values[name]
        return value if self.shares is None else self.shares.joined(name, value)

    def write(self, folder: Path, state: State) -> None:
        (folder / AVERAGED).mkdir()
        self.of.write(folder / AVERAGED, state)

    @property
    def cheap(self) -> bool:
        return self.of.cheap

    def reread(self, folder: Path) -> Mapping[str, Tensor]:
        """Raises ModelError."""
        return self.of.reread(folder / AVERAGED)

    def remarks(self, folder: Path) -> tuple[str, ...]:
        """None."""
        return ()

    def load(self, folder: Path) -> None:
        """Nothing: it comes of the weights and the optimizer's state."""
