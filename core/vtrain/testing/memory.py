"""What is in memory: whether a model is gone after the with block that opened it, and how many bytes there are at most."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from vtrain.contract import (
    BlockMemory,
    ClipShape,
    Denoiser,
    Device,
    DType,
    LatentShape,
    SupportsFeedForward,
    TokenBytes,
)
from vtrain.contract.records import ClipBytes

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


def encoder_memory(
    opening: Callable[[], AbstractContextManager[Opened]], given: Tensor, use: Callable[[Opened], object]
) -> tuple[int, int]:
    """(bytes of the weights that opening it makes, bytes at the peak of what it is used for, without what it is given)."""
    gc.collect()
    before = set(_weights())
    with opening() as opened, MemoryPeak() as memory:
        weights = [weight for key, weight in _weights().items() if key not in before]
        memory.count([given, *weights], "there")
        kept, there = use(opened), memory.now["there"]
    del kept
    return sum(weight.nbytes for weight in weights), memory.peak - there


Call = Callable[[], object]
"""A call of a denoiser's `predict` on clips of some length, whose result is kept until the next one."""


def block_memory(denoiser: Denoiser, calls: Sequence[tuple[Call, int]], compute: DType) -> BlockMemory:
    """What a denoiser keeps for the backward pass, by what a call of `predict` leaves in memory: measured, not reckoned.

    calls: two of different lengths, each with the number of tokens of all its clips; what does not grow with tokens (cast weights,
    text) is no part of it. compute: the type in which layers compute, "bf16" under autocast. Nothing is computed: it is run
    on fake tensors, and the weights may be fake too, so a model of any size is measured on any machine. Afterwards all
    weights take gradients. Raises ValueError for a denoiser of one block: what it keeps cannot be separated from what is beside it.
    """
    if len(denoiser.blocks) < 2:
        raise ValueError("memory is measured between two blocks, and this denoiser has one")
    denoiser.module.requires_grad_(True).train()
    found = []
    for on in (False, True):
        denoiser.gradient_checkpointing(on)
        found.append(_token_bytes(denoiser, calls, compute))
    denoiser.gradient_checkpointing(False)
    layers = None
    if isinstance(denoiser, SupportsFeedForward):
        with _recomputed(denoiser.feed_forwards):
            layers = _token_bytes(denoiser, calls, compute)
    (few_bytes, few), (many_bytes, many) = ((_working(denoiser, call, compute), tokens) for call, tokens in calls)
    plain, checkpointed = found
    return BlockMemory(plain, checkpointed, (many_bytes - few_bytes) / (many - few), layers)


def _token_bytes(denoiser: Denoiser, calls: Sequence[tuple[Call, int]], compute: DType) -> TokenBytes:
    (short, few), (long, many) = ((_left(denoiser, call, compute), tokens) for call, tokens in calls)
    total, block = ((after - before) / (many - few) for before, after in zip(short, long, strict=True))
    return TokenBytes(block, total - len(denoiser.blocks) * block)


@contextmanager
def _recomputed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The forward passes of modules are run again in the backward pass, inside."""
    for module in modules:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _working(denoiser: Denoiser, call: Call, compute: DType) -> int:
    """Bytes at the peak of a call without gradients, beside the weights and what it is given."""
    weight = next(denoiser.module.parameters())
    mode = weight.fake_mode if isinstance(weight, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode, MemoryPeak() as memory, Device().autocast("bf16" if compute == "bf16" else None):
        # Of a weight an operator gives views, which are the weight's own bytes.
        memory.count((*denoiser.module.parameters(), *denoiser.module.buffers()), "weights")
        call()
    peak: int = memory.peak
    return peak


def codec_memory(
    encode: Callable[[Tensor], object],
    decode: Callable[[Tensor], object],
    clips: Sequence[tuple[ClipShape, LatentShape]],
) -> tuple[ClipBytes, ClipBytes]:
    """What a video codec computes when it encodes and decodes a clip, at its peak, what it is given and gives included.

    encode: of pixels (1, 3, F, H, W) in [-1, 1]; decode: of latents (1, C, f, h, w). clips: two of one size and of different
    lengths, beyond the first chunk of frames that a causal codec goes through, each with the shape of its latents. Inside
    torch's FakeTensorMode nothing is computed.
    """
    found = []
    for work, shape_of in ((encode, lambda clip, _: (3, *clip)), (decode, lambda _, latents: latents)):
        peaks = []
        for clip, latents in clips:
            with torch.no_grad(), MemoryPeak() as memory:
                kept = work(torch.zeros(1, *shape_of(clip, latents)))
            peaks.append(memory.peak)
            del kept
        (first, _), (last, _) = clips
        area = first.height * first.width
        pixel = (peaks[1] - peaks[0]) / (area * (last.frames - first.frames))
        found.append(ClipBytes(peaks[0] / area - pixel * first.frames, pixel))
    return found[0], found[1]


def _left(denoiser: Denoiser, call: Call, compute: DType) -> tuple[int, int]:
    """Bytes made and left over by a call, and by the last of its blocks but one.

    From where that block begins to where the next one does: at both, what a block is given is in memory, and is freed later
    where it is not kept. When a block ends, its input and its output are there.
    """
    weight = next(denoiser.module.parameters())
    # Fake weights keep to the mode that made them.
    mode = weight.fake_mode if isinstance(weight, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)
    with mode, MemoryPeak() as memory:
        marks: list[int] = []

        def mark(*_: object) -> None:
            marks.append(memory.now.total())

        handles = [block.register_forward_pre_hook(mark) for block in denoiser.blocks[-2:]]
        try:
            with Device().autocast("bf16" if compute == "bf16" else None):
                kept = call()
        finally:
            for handle in handles:
                handle.remove()
        total = memory.now.total()
        del kept
    return total, marks[1] - marks[0]


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
