"""The debug record of a step whose numbers were not finite: a folder in the output folder, and never a checkpoint.

    failures/step-000123/record.json      what, clips and noise levels, losses, gradients and weights by block, settings
    failures/step-000123/micro-000488.safetensors      latents, noise, level, mask and text of a micro-batch, as trained

Order and noise are pure functions of the seed, so the inputs are made again when they are asked for; weights are not kept.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vtrain.contract import Event, Noted, VtrainError, Warned
from vtrain.plan.records import Plan
from vtrain.train.prefetch import Prefetcher
from vtrain.train.processes import Processes
from vtrain.train.readings import Failure
from vtrain.train.settings import settings
from vtrain.train.step import StepInput

FAILURES = "failures"
VERSION = 1

LARGEST = 64 << 20
"""Bytes of tensors in a record: what would be more is named in record.json and made again from the seed."""

KEPT = 5
"""Records that an output folder holds at most: the newest."""


def recorded(
    plan: Plan, named: Sequence[tuple[str, Tensor]], prefetcher: Prefetcher, processes: Processes, failure: Failure
) -> Iterator[Event]:
    """Write the record of a step on the first process, and tell where. named: what is trained."""
    # Gradients are there where steps may be skipped; else the step has been taken.
    found = replace(failure, gradients=gradient_norms(named), weights=weights_not_finite(named))
    values = {key: setting.value for key, setting in settings(plan).items()}

    def write() -> Event:
        try:
            folder = write_failure(plan.config.run.output_dir, found, values, prefetcher.inputs)
        # What is told of the step itself must not be lost for it.
        except (OSError, VtrainError) as error:
            return Warned(f"the debug record of step {failure.step} could not be written: {error}")
        return Noted(f"debug record of step {failure.step}: {folder}")

    yield processes.from_first(write)


def write_failure(
    output: Path, failure: Failure, settings: Mapping[str, object], again: Callable[[int, int], StepInput]
) -> Path:
    """Write it aside, then rename. again: micro-batch, zero-based step -> its input, once more. Raises OSError.

    A record of the same step is replaced; of others the newest are kept.
    """
    folder = output / FAILURES / f"step-{failure.step:06d}"
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    files, left_out = _inputs(aside, failure, again)
    record = {
        "version": VERSION,
        "step": failure.step,
        "what": [str(problem) for problem in failure.error.problems],
        "lr": failure.lr,
        "grad_norm": failure.grad_norm,
        "micro_batches": [{**vars(each), "file": files.get(each.micro_batch)} for each in failure.readings],
        "left_out": left_out,
        "gradient_norms": dict(failure.gradients),
        "weights_not_finite": dict(failure.weights),
        "settings": dict(settings),
    }
    text = json.dumps(_plain(record), indent=1, ensure_ascii=False)
    (aside / "record.json").write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    for old in sorted(folder.parent.glob("step-*"))[:-KEPT]:
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _inputs(folder: Path, failure: Failure, again: Callable[[int, int], StepInput]) -> tuple[dict[int, str], list[int]]:
    """Micro-batch -> file with what it was trained on; and those for which there was no room."""
    files: dict[int, str] = {}
    left_out: list[int] = []
    room = LARGEST
    for reading in failure.broken():
        tensors = dict(_tensors(again(reading.micro_batch, failure.step - 1)))
        size = sum(each.nbytes for each in tensors.values())
        if size > room:
            left_out.append(reading.micro_batch)
            continue
        room -= size
        files[reading.micro_batch] = f"micro-{reading.micro_batch:06d}.safetensors"
        save_file(tensors, folder / files[reading.micro_batch])
    return files, left_out


def _tensors(given: StepInput) -> Iterator[tuple[str, Tensor]]:
    """Of a micro-batch, by name, on the CPU."""
    found: dict[str, Tensor | None] = {
        "clean": given.clean,
        "noise": given.noise,
        "sigma": given.level.sigma,
        "timestep": given.level.timestep,
        "mask": given.mask,
        **{f"condition.{name}": each for name, each in given.condition.extras.items()},
    }
    for name, part in given.condition.text.parts.items():
        found |= {f"text.{name}": part.embeds, f"text.{name}.mask": part.mask}
    yield from ((name, each.detach().cpu().contiguous()) for name, each in found.items() if each is not None)


def _plain(value: object) -> object:
    """JSON has no NaN: numbers that are not finite become "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def block_of(name: str) -> str:
    """ "transformer_blocks.3" of a parameter in that block; else the first two parts of its name."""
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[: number + 1])


def gradient_norms(named: Sequence[tuple[str, Tensor]]) -> dict[str, float]:
    """Block -> 2-norm of its gradients, of those that are there. Reads the device."""
    grouped: dict[str, list[Tensor]] = {}
    for name, weight in named:
        if weight.grad is not None:
            grouped.setdefault(block_of(name), []).append(weight.grad.detach().float().norm())
    return {block: float(torch.stack(norms).norm()) for block, norms in grouped.items()}


def weights_not_finite(named: Sequence[tuple[str, Tensor]]) -> dict[str, int]:
    """Block -> how many of its trained weights are not finite, of those that have any. Reads the device."""
    counts: dict[str, int] = {}
    for name, weight in named:
        if broken := int((~weight.detach().isfinite()).sum()):
            counts[block_of(name)] = counts.get(block_of(name), 0) + broken
    return counts
