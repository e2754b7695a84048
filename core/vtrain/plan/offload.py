"""What is recomputed and what leaves the card, as a plan says it; and what of it cannot work together. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from vtrain.config.record import Config
from vtrain.config.tables import OffloadTable, PrecisionTable
from vtrain.contract import Family, Problem
from vtrain.contract.precision import STORAGE
from vtrain.plan.records import Plan


def offload_problems(config: Config, family: Family, processes: int) -> Iterator[Problem]:
    """Settings of [offload] that cannot work: together, with what is trained, or with this model."""
    table = config.offload

    def problem(key: str, what: str, remedy: str) -> Problem:
        return Problem(config.where("offload", key), what, remedy)

    if table.disk is not None and table.group is None:
        what = "offload.disk is where groups of weights wait, and offload.group is absent: nothing would go there."
        yield problem("disk", what, 'Set offload.group = "block", or leave offload.disk out.')
    if table.group is None:
        return
    if table.model_cpu:
        what = "offload.model_cpu and offload.group both move the denoiser: a group is on the card only while it runs anyway."
        yield problem(
            "model_cpu", what, "Leave one of them out: group takes less of the card, model_cpu costs less time."
        )
    if config.model.table.train == "full":
        what = f"offload.group{' and offload.disk move' if table.disk else ' moves'} frozen weights, and full training has none: "
        what += "read again at each use, what the optimizer changed would be lost."
        remedy = 'Set model.train = "lora", or offload.optimizer = true in its place: it moves the optimizer\'s states.'
        yield problem("group", what, remedy)
    if config.precision.gradient_checkpointing is not True or config.precision.gradient_checkpointing_interval > 1:
        what = "offload.group needs every block to be recomputed: what is kept of one for the backward pass holds its weights."
        remedy = "Set precision.gradient_checkpointing = true, without an interval."
        key = "gradient_checkpointing" + ("_interval" if config.precision.gradient_checkpointing is True else "")
        yield Problem(config.where("precision", key), what, remedy)
    if processes > 1:
        what = f"offload.group works for one process, and {processes} train together, whose weights all have to be on their cards."
        yield problem("group", what, "Leave offload.group out, or train with one process.")
    if table.group == "block" and table.blocks_per_group > family.block_count:
        what = f"offload.blocks_per_group = {table.blocks_per_group}, and this model has {family.block_count} blocks."
        yield problem("blocks_per_group", what, f"Give 1 to {family.block_count - 1}; fewer take less of the card.")
    if config.precision.base is not None and STORAGE[config.precision.base].quantised:
        what = f"offload.group moves weights as they are stored, and those in {config.precision.base} are not proved to stand it."
        yield problem("group", what, 'Leave offload.group out, or set precision.base = "bf16".')


def offload_warnings(config: Config, family: Family) -> Iterator[str]:
    """Settings without an effect, or with one that is probably not meant."""
    table, precision = config.offload, config.precision
    interval = precision.gradient_checkpointing_interval
    if interval > 1 and precision.gradient_checkpointing is not True:
        yield "precision.gradient_checkpointing_interval has no effect: gradient_checkpointing is not true"
    elif interval >= family.block_count > 1:
        yield (
            f"precision.gradient_checkpointing_interval = {interval}, and this model has {family.block_count} blocks: the first "
            "alone is recomputed"
        )
    for key, given in (("blocks_per_group", table.blocks_per_group > 1), ("stream", table.stream)):
        if given and table.group != "block":
            why = "no group is offloaded" if table.group is None else 'it is for group = "block"'
            yield f"offload.{key} has no effect: {why}"
    if table.group == "block" and table.blocks_per_group * (1 + table.stream) >= family.block_count:
        yield "offload.group has little effect: all blocks are on the card at once"
    if table.model_cpu and config.validation is None and table.group is None:
        yield "offload.model_cpu has no effect: without [validation] no video is decoded beside the denoiser"


def device_notices(table: OffloadTable, *, accelerated: bool, streams: bool) -> Iterator[str]:
    """What of [offload] does nothing on the device that a run found."""
    asked = [f"offload.{key}" for key in ("group", "model_cpu", "optimizer") if getattr(table, key)]
    if asked and not accelerated:
        verb = "changes" if len(asked) == 1 else "change"
        yield f"{' and '.join(asked)} {verb} nothing on a CPU: everything is in its memory anyway"
    elif table.stream and table.group == "block" and not streams:
        yield "offload.stream has no effect: this device has no streams; groups are waited for"


def recomputed(table: PrecisionTable) -> float:
    """About which part of a forward pass the backward pass does again; feed-forward layers are taken for half of it."""
    if table.gradient_checkpointing == "feed_forward":
        return 0.5
    return 1 / table.gradient_checkpointing_interval if table.gradient_checkpointing else 0.0


def checkpointing_text(plan: Plan) -> str:
    """What is recomputed, for the row of the precision."""
    precision = plan.config.precision
    if precision.gradient_checkpointing == "feed_forward":
        return "gradient checkpointing of feed-forward layers"
    if not precision.gradient_checkpointing:
        return "without gradient checkpointing"
    every = precision.gradient_checkpointing_interval
    return "with gradient checkpointing" + (f" of every {_ordinal(every)} block" if every > 1 else "")


def memory_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """What is kept for the backward pass and what leaves the card, with the price."""
    config, blocks = plan.config, plan.family.block_count
    precision, table = config.precision, config.offload
    every = precision.gradient_checkpointing_interval
    if precision.gradient_checkpointing == "feed_forward":
        yield "activations", "all but those of feed-forward layers, which are computed twice: up to a quarter more time"
    elif not precision.gradient_checkpointing:
        yield "activations", f"all of {blocks} blocks: most memory, least time"
    elif every == 1:
        yield (
            "activations",
            "the input of each block, and those of one block at a time: each block is computed twice, about a third more time",
        )
    else:
        twice = -(-blocks // every)
        yield "activations", f"the input of {twice} of {blocks} blocks, which are computed twice, and all of the others"
    if table.group is not None:
        yield "offloaded", _group_text(config, blocks)
    if table.model_cpu:
        yield "denoiser while videos are decoded", "in the machine's memory: it goes there and back once a validation"
    if table.optimizer:
        what = "in the machine's memory, with a copy of what is trained and of its gradients; the step is made there"
        yield "optimizer", f"{what}, and waits for both copies (on a CPU: no change)"


def _group_text(config: Config, blocks: int) -> str:
    table = config.offload
    where = "in the machine's memory, page-locked" if table.disk is None else f"on disk, in {table.disk}"
    if table.group == "leaf":
        on_card = "one layer is on the card at a time, in the backward pass nearly a block"
    else:
        many = min(table.blocks_per_group, blocks)
        one = "one block" if many == 1 else f"{many} blocks"
        on_card = f"{one} of {blocks} on the card at a time"
        if table.stream:
            on_card += ", and the next on its way (stream: on CUDA; elsewhere groups are waited for)"
    return f"frozen weights of blocks wait {where}; {on_card}; {_brought(config)} (on a CPU: no change)"


def _brought(config: Config) -> str:
    """How often in a step: each micro-batch has a forward and a backward pass, and a rollout more forward passes."""
    many, rollout = config.train.accumulate, config.train.rollout
    times = "twice a step, forward and backward" if many == 1 else f"{2 * many} times a step, twice a micro-batch"
    verb = "is brought" if config.offload.disk is None else "is read"
    if rollout is None:
        return f"each {verb} {times}"
    more = "once more" if rollout.steps == 1 else f"{rollout.steps} times more"
    return f"each {verb} {times}, and {more} where a micro-batch has a clip that is rolled out"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
