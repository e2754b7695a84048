"""`vtrain data list --truncated`: captions and prompts that the text encoder does not read to the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import typer

from vtrain.cli.data import check_dataset, looked
from vtrain.cli.report import columns, folded, one_line, say
from vtrain.contract import ConfigError, DataError, Problem
from vtrain.data.scanning.files import Files
from vtrain.data.scanning.token_counts import LongText, TokenCounts, cut_of, cut_prompts, opened
from vtrain.estimate.tokens import count_json, cut_text
from vtrain.plan.records import Plan
from vtrain.registry.blame import blame
from vtrain.run.prepare import planned

_AT_ONCE = 200


def list_truncated(path: Path, dataset: str | None, as_json: bool, limit: int | None) -> None:
    """A row for each, with its tokens, the limit, and what is lost; counts are those that are remembered, or are made now.

    Raises what planning raises; ConfigError where tokens cannot be counted; DataError for datasets that could not be scanned,
    after the files of the others.
    """
    plan = planned(path)
    if dataset is not None:
        check_dataset(plan, dataset)
    files = looked(plan, dataset)
    counts = opened(plan.config.cache.dir, plan.family)
    if counts is None:
        use = plan.config.model.registered.spec.name
        what = f'the model family "{use}" cannot count tokens without its text encoder.'
        raise ConfigError(
            Problem(plan.config.where("model"), what, "Ask the author of its plugin for SupportsTokenCounts.")
        )
    with blame(plan.config.parts()), counts:
        prompts = list(_prompts(plan, counts)) if dataset is None else []
        found = 0
        if not as_json:
            sys.stdout.write("tokens  limit  what\n")
        for found, (long, caption) in enumerate(_all(files, counts, prompts), start=1):
            if limit is None or found <= limit:
                sys.stdout.writelines(f"{line}\n" for line in _lines(long, caption, as_json=as_json))
        sys.stdout.flush()
        if counts.why_not:
            raise ConfigError(Problem(plan.config.where("model"), f"tokens cannot be counted: {counts.why_not}"))
    if not as_json:
        typer.echo()
        say(_summary(found, limit, whole=not files.problems))
    if files.problems:
        raise DataError(files.problems)


def _summary(found: int, limit: int | None, *, whole: bool) -> str:
    """whole: whether every dataset was scanned."""
    shown = "" if limit is None or found <= limit else f", {limit} of them shown"
    if found:
        return f"{found} {'text is' if found == 1 else 'texts are'} not read to the end{shown}"
    return "every text is read whole" if whole else "every text that was found is read whole"


def _prompts(plan: Plan, counts: TokenCounts) -> Iterator[tuple[LongText, str]]:
    texts = {key: caption.text for key, caption, _ in plan.validation.texts} if plan.validation else {}
    for long in cut_prompts(plan.validation, counts):
        yield LongText(f"validation.{long.name}", long.count), texts[long.name]


def _all(files: Files, counts: TokenCounts, prompts: list[tuple[LongText, str]]) -> Iterator[tuple[LongText, str]]:
    yield from prompts
    for dataset in files.datasets:
        rows = files.rows(dataset, ("used",))
        while some := [(file.name, caption) for file in islice(rows, _AT_ONCE) for caption in file.captions]:
            found = counts.of([(caption, "prompt") for _, caption in some])
            for (name, caption), each in zip(some, found or (), strict=False):
                yield from ((LongText(name, long), caption.text) for long in cut_of(each))


def _lines(long: LongText, caption: str, *, as_json: bool) -> Iterator[str]:
    """A JSON object, or a line; on a terminal what is lost stands below."""
    if as_json:
        yield json.dumps({"name": long.name, "text": caption, **count_json(long.count)})
        return
    start = f"{long.count.tokens:>6}  {long.count.limit:>5}  "
    name, lost = one_line(long.name), f"not read: {one_line(cut_text(long.count))}"
    if (width := columns(sys.stdout)) is None:
        yield f"{start}{name}  {lost}"
        return
    yield start + name
    yield from folded(lost, width, "    ", "    ")
