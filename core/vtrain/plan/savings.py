"""Every way in which a run can take less memory, as rows of one table: what it sets, and what it costs in time. No torch.

Times are a small model, for choosing between settings, not for promising seconds: work by operations at COMPUTE, bytes over the bus
at BUS, and what was measured where a comment says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from vtrain.config.record import Config
from vtrain.contract import Catalog, OptimizerSpec
from vtrain.plan.memory import Workload
from vtrain.plan.offload import recomputed
from vtrain.plan.records import Plan

COMPUTE = 1.5e14
"""Operations that a card does in a second of training: 150 TFLOP (an H200 does 190 of SANA-Video 2B; smaller cards do fewer)."""

BUS = 2e10
"""Bytes a second between page-locked memory and a card (PCIe 4 x16: 20 to 25 GB/s in practice)."""

HOST = 3e10
"""Bytes a second that an optimizer reads and writes in main memory."""

RECOMPUTED = {"lora": 0.42, "full": 0.33}
"""Time of a forward pass of all blocks by that of a step. LoRA: 1.139 s with checkpointing against 0.803 s without (SANA-Video 2B,
49 frames, one H200). Full training: one forward of three (forward, and twice its work backward)."""

Key = tuple[str, str]


@dataclass(frozen=True)
class Saving:
    """One setting that takes less memory. may: its word in [memory] may; axis: of one axis a run has one at most; values: key ->
    value, which must be absent from the file.

    time: share of a step's time that it takes more. exact: whether the results stay the same. on_cpu: whether it saves anything
    where the CPU trains. applies: whether the run has what it saves.
    """

    may: str
    axis: str
    values: tuple[tuple[Key, object], ...]
    time: Callable[[Plan, Workload], float]
    applies: Callable[[Plan], bool] = lambda plan: True
    exact: bool = True
    on_cpu: bool = True

    @property
    def keys(self) -> tuple[Key, ...]:
        return tuple(key for key, _ in self.values)

    @property
    def words(self) -> str:
        """As a file has it."""
        return ", ".join(f"{table}.{key} = {_toml(value)}" for (table, key), value in self.values)

    def set(self, config: Config, catalog: Catalog | None) -> Config:
        """The configuration with it."""
        for (table, key), value in self.values:
            if table == "optimizer":
                config = _optimizer(config, catalog, str(value))
            else:
                held = vars(config)[table].model_copy(update={key: value})
                config = replace(config, **{table: held})
        return config


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def _optimizer(config: Config, catalog: Catalog | None, name: str) -> Config:
    """Another optimizer, with the options of the one before that both have."""
    registered = catalog.find("optimizer", name) if catalog is not None else None
    if registered is None:
        return config
    given = config.optimizer.options.model_dump()
    known = registered.spec.options.model_fields
    options = registered.spec.options.model_validate({key: value for key, value in given.items() if key in known})
    return replace(config, optimizer=replace(config.optimizer, registered=registered, options=options))


def step_seconds(plan: Plan, work: Workload) -> float:
    """About how long a step takes without any saving, at COMPUTE."""
    passes = 2 if plan.config.model.table.train == "lora" else 3
    train = plan.config.train
    return max(1e-3, train.batch_size * train.accumulate * work.tokens * passes * 2 * work.parameters / COMPUTE)


def _recomputing(plan: Plan, table: dict[str, object]) -> float:
    precision = plan.config.precision.model_copy(update=table)
    return RECOMPUTED[plan.config.model.table.train] * recomputed(precision)


def _recompute(**values: object) -> Saving:
    given = tuple((("precision", key), value) for key, value in values.items())
    return Saving("checkpointing", "recompute", given, lambda plan, _: _recomputing(plan, values))


def _group(*, waits: float, **values: object) -> Saving:
    """waits: for which part of the bytes the card waits."""
    given = tuple((("offload", key), value) for key, value in values.items())

    def time(plan: Plan, work: Workload) -> float:
        # Each group comes twice in each micro-batch, for the forward and for the backward pass.
        away = 2 * plan.config.train.accumulate * plan.storage.bits / 8 * work.parameters * work.in_blocks / BUS
        step = step_seconds(plan, work) * (1 + RECOMPUTED["lora"])
        hidden = max(0.0, away - step)
        return (waits * away + (1 - waits) * hidden) / step_seconds(plan, work)

    return Saving("offload", "group", given, time, _is_lora, on_cpu=False)


def _is_lora(plan: Plan) -> bool:
    return plan.config.model.table.train == "lora"


def _states(plan: Plan, work: Workload) -> float:
    """Gradients go to the machine's memory and weights come back, in fp32; the processor steps over both and over the states."""
    count = work.adapter if _is_lora(plan) else work.parameters
    spec = plan.config.optimizer.registered.spec
    assert isinstance(spec, OptimizerSpec)
    return count * (8 / BUS + (12 + 2 * spec.state_bytes) / HOST) / step_seconds(plan, work)


def _average(plan: Plan, work: Workload) -> float:
    """Weights go to the machine's memory, and are added there, at every update."""
    count = work.adapter if _is_lora(plan) else work.parameters
    every = plan.config.ema.update_every if plan.config.ema is not None else 1
    return count * (4 / BUS + 12 / HOST) / every / step_seconds(plan, work)


INTERVAL = "gradient_checkpointing_interval"

SAVINGS: tuple[Saving, ...] = (
    _recompute(gradient_checkpointing=True, **{INTERVAL: 3}),
    _recompute(gradient_checkpointing="feed_forward"),
    _recompute(gradient_checkpointing=True, **{INTERVAL: 2}),
    _recompute(gradient_checkpointing=True),
    # With two groups on the card at once the next one comes while one computes.
    _group(group="block", stream=True, waits=0.05),
    _group(group="block", waits=1.0),
    # Not "leaf": at its peak, in the backward pass, it takes as much, and waits more.
    Saving(
        "offload", "decoding", ((("offload", "model_cpu"), True),), lambda plan, work: 0.001,
        lambda plan: plan.validation is not None, on_cpu=False,
    ),
    Saving("states", "optimizer", ((("offload", "optimizer"), True),), _states, on_cpu=False),
    Saving(
        "states", "average", ((("ema", "on"), "cpu"),), _average, lambda plan: plan.config.ema is not None, on_cpu=False,
    ),
    # 1.16 s against 1.139 s with attention's Linears in int8 (one H200); here convolutions too.
    Saving("int8", "base", ((("precision", "base"), "int8"),), lambda plan, work: 0.1, _is_lora, exact=False),
    Saving(
        "adamw8bit", "eight-bit", ((("optimizer", "use"), "adamw8bit"),), lambda plan, work: 0.02,
        lambda plan: plan.config.optimizer.registered.spec.name == "adamw", exact=False,
    ),
)  # fmt: skip
"""Every way to take less memory."""

ALL: tuple[str, ...] = tuple(dict.fromkeys(saving.may for saving in SAVINGS))

PLAIN: tuple[tuple[Key, object], ...] = ((("precision", "gradient_checkpointing"), False),)
"""What a run is reckoned with before anything is chosen, where the file does not say otherwise."""


def exact(words: Iterable[str]) -> tuple[str, ...]:
    """Those of `may` that change no result."""
    return tuple(word for word in words if all(saving.exact for saving in SAVINGS if saving.may == word))


def gib(size: float) -> str:
    """ "1.50 GiB", and three digits after the point for what would be 0.00."""
    found = size / 2**30
    return f"{found:.2f} GiB" if found >= 0.005 or not found else f"{found:.3f} GiB"


def enough(size: int) -> str:
    """The same, rounded up: as a limit it holds so many bytes."""
    return f"{math.ceil(100 * size / 2**30) / 100:.2f} GiB"
