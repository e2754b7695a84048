"""What is in memory: whether a model is gone after the with block that opened it, and how many bytes there are at most."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Opened = TypeVar("Opened")


def _weights() -> dict[int, nn.Parameter]:
    """Every living nn.Parameter. By type(): isinstance would wake lazily loaded modules."""
    return {id(item): item for item in gc.get_objects() if issubclass(type(item), nn.Parameter)}


def survivors(opening: Callable[[], AbstractContextManager[Opened]], use: Callable[[Opened], object]) -> list[str]:
    """Open, use and close; say what of it is still in memory, [] when all is gone."""
    gc.collect()
    before = set(_weights())
    with opening() as opened:
        use(opened)
        name = type(opened).__name__
        itself = weakref.ref(opened)
        weights = [weakref.ref(weight) for key, weight in _weights().items() if key not in before]
    del opened
    gc.collect()
    left = [name] if itself() is not None else []
    alive = [weight for weight in (reference() for reference in weights) if weight is not None]
    if alive:
        left.append(f"{len(alive)} weights of {sum(weight.nbytes for weight in alive):,} bytes")
    return left


class MemoryPeak(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own is untyped
    """Counts the bytes of tensors while it is active: of what operators give, each storage once, until it is freed.

    It works on real tensors and, entered inside torch's FakeTensorMode, on fake ones: then a step of any size is counted on any
    machine, for nothing is computed. What a kernel takes for itself is not seen. torch's own MemTracker counts alike, but
    its hooks on modules keep gradients alive that a step frees, and it takes no frozen weights, and no module that a step calls
    several times.

    label: under what tensors made from now on are counted. now: label -> bytes. at_peak: the same when their sum was largest.
    """

    def __init__(self, label: str = "made") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.label = label
        self.now, self.at_peak = Counter[str](), Counter[str]()
        self._total = self._peak = 0
        self._stored: dict[int, tuple[str, int]] = {}

    @property
    def peak(self) -> int:
        return self._peak

    def count(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count what was made before, or count it under another label from now on."""
        for tensor in tensors:
            self._free(id(tensor.untyped_storage()))
            self._add(tensor, label)

    def restart(self) -> None:
        """Forget the peak so far."""
        self._peak, self.at_peak = self._total, self.now.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, lambda tensor: self._add(tensor, self.label), made)
        return made

    def _add(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._stored:
            return
        self._stored[key] = label, storage.nbytes()
        weakref.finalize(storage, self._free, key).atexit = False
        self.now[label] += storage.nbytes()
        self._total += storage.nbytes()
        if self._total > self._peak:
            self.restart()

    def _free(self, key: int) -> None:
        label, size = self._stored.pop(key, ("", 0))
        self.now[label] -= size
        self._total -= size
