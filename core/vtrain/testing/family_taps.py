"""The rules of tap points and of gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from vtrain.contract import Denoiser, Family, SupportsTokenGrid
from vtrain.testing.sampler import gap
from vtrain.testing.subject import Example, FamilySubject


@contextmanager
def outputs_of(blocks: Sequence[nn.Module], read: Callable[[Tensor], Tensor]) -> Iterator[list[list[Tensor]]]:
    """`read` of what each block returns, once for each time it runs, while the with block does.

    It reads at once, as training does: what reentrant checkpointing lets a hook see is not in the graph yet.
    """
    seen: list[list[Tensor]] = [[] for _ in blocks]

    def keeper(number: int) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[number].append(read(output[0] if isinstance(output, tuple) else output))

        return blocks[number].register_forward_hook(hook)

    handles = [keeper(number) for number in range(len(blocks))]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def checkpointing(denoiser: Denoiser, on: bool) -> Iterator[None]:
    """Gradient checkpointing on or off; off afterwards."""
    denoiser.gradient_checkpointing(on)
    try:
        yield
    finally:
        denoiser.gradient_checkpointing(False)


def gradients(denoiser: Denoiser, example: Example, tap: int) -> dict[str, Tensor]:
    """Of a loss on the prediction and on one tapped block, by parameter."""
    denoiser.module.zero_grad()
    with outputs_of(denoiser.blocks, lambda output: denoiser.fold(output, example.latents)) as seen:
        prediction = example.run(denoiser)
    loss = prediction.float().square().mean()
    torch.autograd.backward(loss + seen[tap][0].float().square().mean())
    found = {name: w.grad.clone() for name, w in denoiser.module.named_parameters() if w.grad is not None}
    denoiser.module.zero_grad()
    return found


class TapTests(FamilySubject):
    """Block outputs, as regularizers read them.

    checkpointing_tolerance: largest difference of a gradient with and without checkpointing, relative to its largest value.
    """

    checkpointing_tolerance: float = 1e-6

    @pytest.mark.parametrize("on", [False, True], ids=["plain", "checkpointing"])
    def test_every_block_can_be_tapped(self, denoiser: Denoiser, example: Example, on: bool) -> None:
        """A hook on a block fires once in a forward pass and gets a tensor in the graph of the block's own weights."""

        def read(output: Tensor) -> Tensor:
            assert output.requires_grad, "what a hook on a block sees is detached"
            return denoiser.fold(output, example.latents)

        with checkpointing(denoiser, on):
            with outputs_of(denoiser.blocks, read) as seen:
                example.run(denoiser)
            for number, outputs in enumerate(seen):
                assert len(outputs) == 1, f"block {number} ran {len(outputs)} times"
                weights = list(denoiser.blocks[number].parameters())
                loss = outputs[0].float().square().mean()
                reached = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
                assert any(grad is not None and grad.any() for grad in reached), f"block {number} is not reached"

    def test_a_tap_folds_to_the_token_grid(self, family: Family, denoiser: Denoiser, example: Example) -> None:
        """fold gives (B, f, h, w, block_width), where f, h and w divide the latents' and h : w is theirs."""
        with outputs_of(denoiser.blocks, lambda output: output) as seen, torch.no_grad():
            example.run(denoiser)
        latents = example.latents
        for number, outputs in enumerate(seen):
            tap = denoiser.fold(outputs[0], latents)
            assert tap.ndim == 5, f"block {number}: {tuple(tap.shape)}"
            batch, frames, height, width, depth = tap.shape
            assert (batch, depth) == (len(example.noisy), family.block_width), f"block {number}: {tuple(tap.shape)}"
            assert tap.numel() == outputs[0].numel(), f"block {number}: fold loses or adds values"
            assert latents.frames % frames == latents.height % height == latents.width % width == 0
            assert height * latents.width == width * latents.height, f"block {number}: height and width are swapped"
            if isinstance(family, SupportsTokenGrid):
                assert family.token_grid(latents) == (frames, height, width), "token_grid is another grid than fold's"

    def test_checkpointing_changes_no_gradient(self, denoiser: Denoiser, example: Example) -> None:
        """With a tapped block in the loss, gradients with and without checkpointing agree (checkpointing_tolerance)."""
        tap = len(denoiser.blocks) // 2
        plain = gradients(denoiser, example, tap)
        with checkpointing(denoiser, True):
            saved = gradients(denoiser, example, tap)
        assert plain.keys() == saved.keys()
        odd = {name: gap(saved[name], plain[name]) for name in plain}
        worst = max(odd, key=lambda name: odd[name])
        assert odd[worst] <= self.checkpointing_tolerance, f"{worst} differs by {odd[worst]:.1e}"

    def test_checkpointing_recomputes_each_block(self, denoiser: Denoiser, example: Example) -> None:
        """With checkpointing on, a block runs a second time in the backward pass; off, it does not."""
        for on, wanted in ((True, 2), (False, 1)):
            runs = [0] * len(denoiser.blocks)

            def count(number: int, runs: list[int] = runs) -> torch.utils.hooks.RemovableHandle:
                def hook(module: nn.Module, inputs: object) -> None:
                    runs[number] += 1

                return denoiser.blocks[number].register_forward_pre_hook(hook)

            handles = [count(number) for number in range(len(runs))]
            with checkpointing(denoiser, on):
                torch.autograd.backward(example.run(denoiser).float().square().mean())
            for handle in handles:
                handle.remove()
            denoiser.module.zero_grad()
            assert runs == [wanted] * len(runs), f"checkpointing {'on' if on else 'off'}: blocks ran {runs} times"
