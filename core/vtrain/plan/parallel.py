"""Processes that train together, as a plan says it: what they share, and what of it cannot work together. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from vtrain.config.record import Config
from vtrain.contract import Catalog, OptimizerSpec, Problem
from vtrain.contract.specs import listed
from vtrain.plan.optimizer import spec_of


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
