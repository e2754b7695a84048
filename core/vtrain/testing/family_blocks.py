"""The rules of a denoiser's blocks: tap points, and units of gradient checkpointing, offload, compiling and sharding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtrain.contract import Denoiser, Family, SupportsFeedForward, SupportsTokenGrid
from vtrain.testing.sampler import gap
from vtrain.testing.subject import Example, FamilySubject


def tensor_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a block's output begins with."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def outputs_of(blocks: Sequence[nn.Module], read: Callable[[Tensor], Tensor]) -> Iterator[list[list[Tensor]]]:
    """`read` of what each block returns, once for each time it runs, while the with block does.

    It reads at once, as training does: what reentrant checkpointing lets a hook see is not in the graph yet.
    """
    seen: list[list[Tensor]] = [[] for _ in blocks]

    def keeper(number: int) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[number].append(read(tensor_of(output)))

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


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a block's forward pass."""


def calls_of(denoiser: Denoiser, example: Example) -> list[tuple[int, Call]]:
    """(number of a block, what it was given) of each block that ran in a prediction, in the order in which they began."""
    calls: list[tuple[int, Call]] = []

    def keeper(number: int) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.append((number, (inputs, named)))

        return denoiser.blocks[number].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [keeper(number) for number in range(len(denoiser.blocks))]
    with torch.no_grad():
        example.run(denoiser)
    for handle in handles:
        handle.remove()
    return calls


@contextmanager
def away(block: nn.Module) -> Iterator[None]:
    """A block's weights and buffers are NaN but while it runs, as if they were on another device."""
    home = {tensor: tensor.data for tensor in (*block.parameters(), *block.buffers()) if tensor.is_floating_point()}

    def leave(*_: object) -> None:
        for tensor, kept in home.items():
            tensor.data = torch.full_like(kept, torch.nan)

    def come(*_: object) -> None:
        for tensor, kept in home.items():
            tensor.data = kept

    handles = [block.register_forward_pre_hook(come), block.register_forward_hook(leave)]
    leave()
    try:
        yield
    finally:
        come()
        for handle in handles:
            handle.remove()


class BlockTests(FamilySubject):
    """Blocks as the units that are checkpointed, moved to memory and back, compiled and sharded.

    least_block_share: of the denoiser's parameters, how much lies in blocks: what does not is in memory as a whole.
    """

    least_block_share: float = 0.5

    def test_blocks_are_parts_of_the_module(self, denoiser: Denoiser) -> None:
        """Every block is a submodule of `module`, none is there twice, and none lies in another."""
        inside = {id(part): name for name, part in denoiser.module.named_modules()}
        blocks = {id(block): block for block in denoiser.blocks}
        assert len(blocks) == len(denoiser.blocks), "a block is there twice"
        for number, block in enumerate(denoiser.blocks):
            assert id(block) in inside, f"block {number} is no part of the module"
            nested = [inside.get(id(part)) for part in block.modules() if part is not block and id(part) in blocks]
            assert not nested, f"block {number} holds another block, {nested[0]}"

    def test_blocks_share_no_parameter(self, denoiser: Denoiser) -> None:
        """A parameter of a block is in no other block and nowhere else in the module: it moves with its block alone."""
        names: dict[int, list[str]] = {}
        for name, weight in denoiser.module.named_parameters(remove_duplicate=False):
            names.setdefault(id(weight), []).append(name)
        shared = [names[id(weight)] for block in denoiser.blocks for weight in block.parameters()]
        odd = next((each for each in shared if len(each) > 1), [])
        assert not odd, f"one parameter is used as {' and as '.join(odd)}"

    def test_blocks_run_in_their_order(self, denoiser: Denoiser, example: Example) -> None:
        """A prediction runs the blocks once each, in the order of `blocks`: the next one can be fetched while one computes."""
        ran = [number for number, _ in calls_of(denoiser, example)]
        assert ran == list(range(len(denoiser.blocks))), f"they ran in the order {ran}"

    def test_most_parameters_are_in_blocks(self, denoiser: Denoiser) -> None:
        """Blocks hold at least least_block_share of the denoiser's parameters."""
        inside = sum(weight.numel() for block in denoiser.blocks for weight in block.parameters())
        share = inside / sum(weight.numel() for weight in denoiser.module.parameters())
        assert share >= self.least_block_share, f"{share:.1%} of the parameters are in blocks"

    def test_a_block_is_needed_only_while_it_runs(self, denoiser: Denoiser, example: Example) -> None:
        """With each block's weights away but while it runs, the prediction is the same, bit for bit."""
        with torch.no_grad():
            wanted = example.run(denoiser)
            for number, block in enumerate(denoiser.blocks):
                with away(block):
                    same = torch.equal(example.run(denoiser), wanted)
                assert same, f"weights of block {number} are read while it does not run"

    def test_feed_forwards_are_parts_of_their_blocks_and_run_once(self, denoiser: Denoiser, example: Example) -> None:
        """SupportsFeedForward: a submodule of each block, in their order, which a prediction runs once."""
        if not isinstance(denoiser, SupportsFeedForward):
            pytest.skip("it names no feed-forward layers")
        parts, runs = list(denoiser.feed_forwards), [0] * len(denoiser.feed_forwards)
        assert len(parts) == len(denoiser.blocks), f"{len(parts)} layers and {len(denoiser.blocks)} blocks"
        for number, (part, block) in enumerate(zip(parts, denoiser.blocks, strict=True)):
            assert any(inner is part for inner in block.modules()), f"layer {number} is no part of block {number}"

        def counter(number: int) -> torch.utils.hooks.RemovableHandle:
            def hook(module: nn.Module, inputs: object) -> None:
                runs[number] += 1

            return parts[number].register_forward_pre_hook(hook)

        handles = [counter(number) for number in range(len(parts))]
        with torch.no_grad():
            example.run(denoiser)
        for handle in handles:
            handle.remove()
        assert runs == [1] * len(runs), f"layers ran {runs} times"

    def test_a_block_is_one_graph(self, denoiser: Denoiser, example: Example) -> None:
        """torch.compile traces a block as a whole, without a break in its graph, and computes the same."""
        from torch._dynamo.exc import TorchDynamoException  # it takes a second to import

        number, (inputs, named) = calls_of(denoiser, example)[-1]
        block = denoiser.blocks[number]
        with torch.no_grad():
            wanted = block(*inputs, **named)
            try:
                found = torch.compile(block, backend="eager", fullgraph=True)(*inputs, **named)
            except TorchDynamoException as error:
                pytest.fail(f"a block is more than one graph: {str(error).splitlines()[0]}", pytrace=False)
            finally:
                torch.compiler.reset()
        assert gap(tensor_of(found), tensor_of(wanted)) <= 1e-5, "compiled it computes something else"


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
            found = f"block {number} folds to {frames} x {height} x {width} tokens, and latents are {latents}"
            assert latents.frames % frames == latents.height % height == latents.width % width == 0, found
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
