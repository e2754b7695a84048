"""`vtrain export`: what was written, and how it was proved."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import typer

from vtrain import api
from vtrain.cli.report import say
from vtrain.contract.pipelines import ExportFormat
from vtrain.contract.protocols import DType
from vtrain.contract.specs import did_you_mean
from vtrain.run.export import Exported


def export(
    source: Path, to: Path | None, form: str | None, ema: bool, dtype: str, model: str | None, as_json: bool
) -> None:
    """Export and say so. Raises what `vtrain.api.export` raises."""
    chosen: ExportFormat | None = next((each for each in get_args(ExportFormat) if each == form), None)
    stored: DType | None = next((each for each in get_args(DType) if each == dtype), None)
    if form is not None and chosen is None:
        raise typer.BadParameter(_unknown(form, get_args(ExportFormat)), param_hint="--format")
    if stored is None:
        raise typer.BadParameter(_unknown(dtype, get_args(DType)), param_hint="--dtype")
    done = api.export(
        source, to, chosen, ema=ema, model=model, dtype=stored, on_part=lambda text: say(text, err=as_json)
    )
    if as_json:
        print(json.dumps({name: str(each) if isinstance(each, Path) else each for name, each in asdict(done).items()}))  # noqa: T201
        return
    for line in lines(done):
        say(line)


_WEIGHTS = {"last": "", "ema": " (its average, ema)", "averaged": " (its optimizer's averaged weights)"}


def lines(done: Exported) -> list[str]:
    """What is said of an export."""
    effect = f"; training changed it by {done.effect:.1e}" if done.effect is not None else ""
    rounded = ""
    if done.rounding is not None:
        rounded, effect = ", so rounded,", f"{effect}; rounding moves it by {done.rounding:.1e}"
    near = f"within {done.error:.1e} of the largest value" if done.error else "bit for bit"
    return [
        f"exported step {done.step}{_WEIGHTS[done.weights]} as {done.export} to {done.folder}",
        f"proved: read back, it predicts as the trained model{rounded} {near}{effect}",
        *(f"warning: {text}" for text in done.warnings),
    ]


def _unknown(word: str, known: tuple[str, ...]) -> str:
    hint = did_you_mean(word, known)
    return f'"{word}" is none of {", ".join(known)}.{f" {hint}" if hint else ""}'
