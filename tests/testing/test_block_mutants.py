"""Every rule about a denoiser's blocks fails for a toy denoiser that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vtrain_toy.denoiser import ToyDenoiser
from vtrain_toy.family import ToyFamily, ToyOptions
from vtrain_toy.transformer import Block, ToyTransformer

from vtrain.contract import ClipShape, LatentShape
from vtrain.testing import FamilyTests
from vtrain.testing.family_blocks import BlockTests, TapTests

CLIP = ClipShape(9, 32, 48)
Subject = dict[str, Any]


class Denoiser(ToyDenoiser):
    """A denoiser with methods replaced, on a fresh network."""

    def __init__(self, transformer: type[ToyTransformer] = ToyTransformer) -> None:
        torch.manual_seed(0)
        super().__init__(transformer(32, 3))


def blocks(choose: Callable[[list[nn.Module]], list[nn.Module]]) -> Subject:
    """A denoiser that names other blocks."""

    class Other(Denoiser):
        @property
        def blocks(self) -> list[nn.Module]:
            return choose(list(super().blocks))

    return {"denoiser": Other()}


def example_with(denoiser: ToyDenoiser, **more: object) -> Subject:
    return {"denoiser": denoiser, "example": FamilyTests.example_of(ToyFamily(ToyOptions()), CLIP), **more}


class Tied(ToyTransformer):
    """Two blocks have one matrix."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__(width, blocks)
        self.blocks[1].widen.weight = self.blocks[0].widen.weight


class Peeking(ToyTransformer):
    """It reads a weight of its second block before any block runs."""

    def predicted(self, noisy: Tensor, *inputs: Any, **more: Any) -> Tensor:
        return super().predicted(noisy * self.blocks[1].modulation.bias.mean(), *inputs, **more)


class Looking(Block):
    """It looks at a number of its input."""

    def forward(self, tokens: Tensor, time: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return super().forward(tokens if tokens.mean().item() < 1000 else tokens / 2, time, text, mask)


class OfLookingBlocks(ToyTransformer):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__(width, blocks)
        self.blocks = nn.ModuleList(Looking(width) for _ in range(blocks))


class Reentrant(ToyTransformer):
    """The old form of checkpointing, in which a hook on a block sees a tensor outside the graph."""

    def _through(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            again: Tensor = checkpoint(block, *inputs, use_reentrant=True)
            return again
        return super()._through(block, *inputs)


class RunningTwice(ToyTransformer):
    def _through(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        return super()._through(block, super()._through(block, *inputs), *inputs[1:])


class Scaling(ToyTransformer):
    """Checkpointing changes the result a little."""

    def _through(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        return super()._through(block, *inputs) * (1.001 if self.checkpointing else 1.0)


class Swapped(Denoiser):
    def fold(self, tap: Tensor, latents: LatentShape) -> Tensor:
        return super().fold(tap, latents).transpose(2, 3)


class NeverCheckpointing(Denoiser):
    def gradient_checkpointing(self, on: bool) -> None:
        return


class FeedForwardOfAnother(Denoiser):
    @property
    def feed_forwards(self) -> list[nn.Module]:
        return [block.get_submodule("widen") for block in reversed(self.blocks)]


class FeedForwardOfOneBlock(Denoiser):
    @property
    def feed_forwards(self) -> list[nn.Module]:
        return [block.get_submodule("self_attention.to_q") for block in self.blocks[:1]]


PLANTED: tuple[tuple[str, str, str, Callable[[], Subject]], ...] = (
    (
        "blocks that are wrapped again each time",
        "test_blocks_are_parts_of_the_module",
        "block 0 is no part of the module",
        lambda: blocks(lambda own: [nn.Sequential(each) for each in own]),
    ),
    (
        "a block that is named twice",
        "test_blocks_are_parts_of_the_module",
        "a block is there twice",
        lambda: blocks(lambda own: [*own, own[0]]),
    ),
    (
        "a block with its own attention beside it",
        "test_blocks_are_parts_of_the_module",
        "block 0 holds another block",
        lambda: blocks(lambda own: [own[0], own[0].self_attention]),
    ),
    (
        "two blocks with one matrix",
        "test_blocks_share_no_parameter",
        "one parameter is used as blocks.0.widen.weight and as blocks.1.widen.weight",
        lambda: {"denoiser": Denoiser(Tied)},
    ),
    (
        "blocks that are named in another order than they run",
        "test_blocks_run_in_their_order",
        "they ran in the order [2, 1, 0]",
        lambda: example_with(blocks(lambda own: own[::-1])["denoiser"]),
    ),
    (
        "blocks of which some are forgotten",
        "test_most_parameters_are_in_blocks",
        "of the parameters are in blocks",
        lambda: blocks(lambda own: own[:1]),
    ),
    (
        "a weight of a block that is read outside it",
        "test_a_block_is_needed_only_while_it_runs",
        "weights of block 1 are read while it does not run",
        lambda: example_with(Denoiser(Peeking)),
    ),
    (
        "feed-forward layers in another order",
        "test_feed_forwards_are_parts_of_their_blocks_and_run_once",
        "layer 0 is no part of block 0",
        lambda: example_with(FeedForwardOfAnother()),
    ),
    (
        "a feed-forward layer of one block alone",
        "test_feed_forwards_are_parts_of_their_blocks_and_run_once",
        "1 layers and 3 blocks",
        lambda: example_with(FeedForwardOfOneBlock()),
    ),
    (
        "a block that looks at a value",
        "test_a_block_is_one_graph",
        "a block is more than one graph",
        lambda: example_with(Denoiser(OfLookingBlocks)),
    ),
    (
        "reentrant checkpointing",
        "test_every_block_can_be_tapped",
        "what a hook on a block sees is detached",
        lambda: example_with(Denoiser(Reentrant), on=True),
    ),
    (
        "fold that swaps height and width",
        "test_a_tap_folds_to_the_token_grid",
        "block 0 folds to 3 x 3 x 2 tokens",
        lambda: example_with(Swapped(), family=ToyFamily(ToyOptions())),
    ),
    (
        "checkpointing that changes the result",
        "test_checkpointing_changes_no_gradient",
        "differs by",
        lambda: example_with(Denoiser(Scaling)),
    ),
    (
        "checkpointing that does nothing",
        "test_checkpointing_recomputes_each_block",
        "checkpointing on: blocks ran [1, 1, 1] times",
        lambda: example_with(NeverCheckpointing()),
    ),
)
"""(the mistake, the rule that finds it, a piece of its message, the arguments with the mistake in them)."""


@pytest.mark.parametrize(("rule", "says", "subject"), [each[1:] for each in PLANTED], ids=[each[0] for each in PLANTED])
def test_the_rule_fails_for_blocks_that_break_it(
    rule: str, says: str, subject: Callable[..., Subject], breaks: Callable[..., None]
) -> None:
    breaks(FamilyTests(), rule, subject(), says)


def test_every_rule_of_blocks_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(BlockTests) | rules_of(TapTests) == {rule for _, rule, _, _ in PLANTED}


def test_a_tap_outside_the_graph_is_called_detached() -> None:
    with pytest.raises(AssertionError, match="what a hook on a block sees is detached"):
        FamilyTests().test_every_block_can_be_tapped(**example_with(Denoiser(Reentrant), on=True))


def test_a_block_that_runs_twice_is_found(breaks: Callable[..., None]) -> None:
    subject = example_with(Denoiser(RunningTwice), on=False)
    breaks(FamilyTests(), "test_every_block_can_be_tapped", subject)
