"""Reading the output of blocks during one forward pass, without touching the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from vtrain.contract import Denoiser, LatentShape


@contextmanager
def tapped(denoiser: Denoiser, blocks: Iterable[int], latents: LatentShape) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of `blocks`, folded to (B, f, h, w, D) and in the graph, while the with block runs.

    The hooks sit on whole blocks: under non-reentrant checkpointing such a hook fires once, in the graph, while hooks on
    inner modules would fire again in the recomputation.
    """
    taps: dict[int, Tensor] = {}

    def keep(number: int) -> object:
        def hook(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            taps[number] = denoiser.fold(output[0] if isinstance(output, tuple) else output, latents)

        return denoiser.blocks[number].register_forward_hook(hook)

    handles = [keep(number) for number in blocks]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
