"""What a run's average of the weights (EMA) is, in a plan: how long against the run, how large, where it lies. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from vtrain.config.record import Config
from vtrain.config.tables import EmaTable
from vtrain.contract import Problem

ENDING = ".ema"
"""What follows a nickname in the name of a video that averaged weights made."""


def average_problems(config: Config) -> list[Problem]:
    """Nicknames of prompts whose files would be another's."""
    table, validation = config.ema, config.validation
    if table is None or validation is None or table.validation == "raw":
        return []
    return [
        Problem(
            config.where("validation", "prompts", name + ENDING),
            f'"{name}{ENDING}.mp4" is the video of "{name}" with averaged weights (ema.validation), too.',
            "Choose another nickname.",
        )
        for name in validation.prompts
        if name + ENDING in validation.prompts
    ]


def average_warnings(config: Config) -> Iterator[str]:
    """What of [ema] has no effect, whatever the run's length."""
    if config.ema is not None and config.validation is None and ("ema", "validation") in config.lines:
        yield "ema.validation has no effect: there is no [validation]"


def span(table: EmaTable) -> float:
    """How many of the last steps count in an average: 1 / (1 - decay), the sum of their weights by that of the newest."""
    return 1 / (1 - table.decay)


def last_span(table: EmaTable, steps: int) -> float:
    """The same at the end of a run of so many steps, where the warm-up may still be on: 1 / (1 - d), d = (1 + n) / (10 + n)."""
    return min(span(table), (10 + steps) / 9) if table.warmup else span(table)


def average_length_warnings(config: Config, steps: int) -> Iterator[str]:
    """What of [ema] does not go with a run of so many optimizer steps."""
    table = config.ema
    if table is None:
        return
    if table.update_every > steps:
        yield f"ema.update_every is {table.update_every} steps and the run {steps}: the average stays at the first weights"
    elif (length := span(table)) > steps:
        what = f"ema.decay = {table.decay:g} averages about {length:,.0f} steps, and the run has {steps:,}"
        if table.warmup:
            yield f"{what}: its warm-up never ends, and the average is over about the last {last_span(table, steps):,.0f} steps"
        else:
            share = table.decay**steps
            yield f"{what}: {100 * share:.0f}% of the average at the end is the weights that training began with"


def average_words(table: EmaTable, steps: int) -> str:
    """Decay and length in words."""
    if table.update_every > steps:
        length = f"never updated in {steps:,} steps"
    elif not table.warmup and span(table) > steps:
        length = f"at the end over all {steps:,} steps and the weights before them"
    else:
        length = f"at the end over about the last {last_span(table, steps):,.0f} of {steps:,} steps"
    warmup = f", warm-up to step {max(0, 9 * span(table) - 10):,.0f}" if table.warmup else ", no warm-up"
    every = f", updated every {table.update_every} steps" if table.update_every > 1 else ""
    return f"decay {table.decay:g}{warmup}: {length}{every}"


def average_place(table: EmaTable) -> str:
    return (
        "on the device"
        if table.on == "device"
        else "in main memory; beside a card as much again, for weights on their way"
    )


def video_words(table: EmaTable | None) -> str:
    """Which weights make the videos, where there is a choice."""
    if table is None:
        return ""
    return {
        "raw": "; with the weights in training",
        "ema": "; with the averaged weights (<nickname>.ema.mp4)",
        "both": "; each twice, with the weights in training and with the averaged ones (<nickname>.ema.mp4)",
    }[table.validation]
