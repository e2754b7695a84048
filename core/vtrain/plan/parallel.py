"""Processes that train together, as a plan says it: what they share, and what of it cannot work together. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from vtrain.config.record import Config
from vtrain.contract import Catalog, OptimizerSpec, Problem
from vtrain.contract.specs import listed
from vtrain.plan.optimizer import spec_of
from vtrain.plan.records import Plan

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable of torchrun: at "1" each start of the processes has a store of its own to meet in; in torchrun's own they
would meet those that have died."""


def parallel_problems(config: Config, catalog: Catalog | None) -> Iterator[Problem]:
    """Settings that cannot work with [parallel] shard, with however many processes."""
    if not config.parallel.shard:
        return
    spec, instead = spec_of(config), "or set parallel.shard = false."
    if "sharded" not in spec.moves:
        what = f'parallel.shard with optimizer "{spec.name}": it needs whole weights, and each process has a share of them.'
        others = [part.spec.name for part in catalog.parts.values() if _moves_shares(part.spec)] if catalog else []
        remedy = f"Use {listed(others)}, {instead}" if others else f"Use another optimizer, {instead}"
        yield Problem(config.where("optimizer", "use"), what, remedy)
    for key, given in (("group", config.offload.group), ("model_cpu", config.offload.model_cpu)):
        if given:
            what = f"offload.{key} with parallel.shard: both move the denoiser's weights, each as if it were alone."
            yield Problem(config.where("offload", key), what, f"Leave offload.{key} out, {instead}")
    if config.train.statistics:
        what = "train.statistics with parallel.shard: a process has shares of a block's weights, and its numbers are of whole ones."
        yield Problem(config.where("train", "statistics"), what, f"Leave train.statistics out, {instead}")


def _moves_shares(spec: object) -> bool:
    return isinstance(spec, OptimizerSpec) and "sharded" in spec.moves


def parallel_warnings(config: Config, processes: int) -> Iterator[str]:
    """Settings without an effect."""
    if config.parallel.shard and processes == 1:
        yield "parallel.shard has no effect on one process: it has all weights"


def samples_change(before: Mapping[str, object], plan: Plan) -> Iterator[str]:
    """Where an optimizer step takes another number of samples than it did, which of how many processes there are depends."""
    train, keys = plan.config.train, ("train.batch_size", "train.accumulate", "processes")
    counts = [before.get(key) for key in keys]
    if not all(isinstance(count, int) for count in counts):
        return
    took = math.prod(count for count in counts if isinstance(count, int))
    at_once = train.batch_size * plan.processes
    if took == at_once * train.accumulate:
        return
    keeps = f"train.accumulate = {took // at_once} keeps it at {took}"
    if took % at_once:
        keeps = f"no train.accumulate keeps it at {took}, which is no multiple of {at_once} (batch_size x processes)"
    yield (
        f"a step takes {at_once * train.accumulate} samples, and took {took} at the checkpoint: the run is another one from here "
        f"on; {keeps}"
    )
