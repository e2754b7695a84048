"""Gradient checkpointing (arXiv 1604.06174): what the backward pass computes again instead of keeping it from the forward pass.

It changes no number: what is computed again is the same work on the same inputs, with the same dropout, whose random state is put
back. torch's non-reentrant form, which keeps what hooks on blocks see in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vtrain.config.tables import PrecisionTable
from vtrain.contract import ConfigError, Denoiser, Problem, SupportsFeedForward


def checkpoint_gradients(denoiser: Denoiser, table: PrecisionTable, where: str) -> None:
    """Let the denoiser's backward pass recompute what the table says, or nothing.

    where: the place of the setting in the configuration file. Raises ConfigError for feed-forward layers that the family does
    not name.
    """
    whole = table.gradient_checkpointing is True and table.gradient_checkpointing_interval == 1
    denoiser.gradient_checkpointing(whole)  # the model's own way, which a model may have for its blocks
    if whole or table.gradient_checkpointing is False:
        return
    if table.gradient_checkpointing is True:
        recompute(denoiser.blocks[:: table.gradient_checkpointing_interval])
        return
    if not isinstance(denoiser, SupportsFeedForward):
        what = "this model family does not say which part of its blocks is the feed-forward layer."
        remedy = "Set gradient_checkpointing = true, with gradient_checkpointing_interval = 2 for every second block."
        raise ConfigError(Problem(where, what, remedy))
    recompute(denoiser.feed_forwards)


def recompute(modules: Sequence[nn.Module]) -> None:
    """Each module's forward pass is run again in the backward pass; from now on.

    Of the forward method, not of the call: a hook on the module fires once, outside of what is run again.
    """
    for module in modules:
        module.forward = partial(_again, module.forward)


def _again(forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """The result of a forward pass; where gradients are taken, without what it computed on the way."""
    if not torch.is_grad_enabled():
        return forward(*args, **named)
    return checkpoint(forward, *args, use_reentrant=False, **named)
