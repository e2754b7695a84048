"""`vtrain data list`: every source file, and what became of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import typer
from rich.cells import cell_len, set_cell_size

from vtrain.cli.report import columns, folded, looking, one_line, print_table, say
from vtrain.contract import ConfigError, DataError, Problem
from vtrain.contract.specs import did_you_mean, listed
from vtrain.data.scanning.files import STATUSES, Count, Files, SourceFile, look
from vtrain.plan.records import Plan
from vtrain.registry.blame import blame
from vtrain.run.prepare import planned

_NAME = 40
"""Columns for a file's name where a line goes on after it; a longer one pushes the rest to the right."""

_WORDS = 60
"""Columns for a caption where lines are not those of a terminal."""


def list_files(path: Path, statuses: Sequence[str], dataset: str | None, as_json: bool, limit: int | None) -> None:
    """A row for each file; below them, how many there are and why they are skipped.

    statuses: of those that are listed; none: of all. Raises what planning raises, and DataError for datasets that could
    not be scanned, after the files of the others.
    """
    plan = planned(path)
    if dataset is not None:
        check_dataset(plan, dataset)
    files = looked(plan, dataset)
    wanted = tuple(status for status in STATUSES if not statuses or status in statuses)
    rows = islice((file for each in files.datasets for file in files.rows(each, wanted)), limit)
    if as_json:
        _write(json.dumps(as_record(file)) for file in rows)
    else:
        shown = _table(files, rows)
        _totals(files, shown, wanted)
    if files.problems:
        raise DataError(files.problems)


def check_dataset(plan: Plan, dataset: str) -> None:
    """Raises ConfigError unless the plan has a dataset of that id."""
    ids = [each.id for each in plan.datasets]
    if dataset not in ids:
        remedy = f"{did_you_mean(dataset, ids)} The datasets are {listed(ids)}.".strip()
        raise ConfigError(Problem(str(plan.config.path), f'no enabled dataset has the id "{dataset}".', remedy))


def looked(plan: Plan, dataset: str | None = None) -> Files:
    """Scan; on a terminal it is shown how far that is."""
    with looking() as on_file, blame(plan.config.parts()):
        files = look(plan, dataset, on_file)
    for message in files.messages:
        say(message, err=True)
    return files


def as_record(file: SourceFile) -> dict[str, object]:
    """A file for programs."""
    source = None
    if file.probe is not None:
        source = {
            "codec": file.probe.codec,
            "width": file.probe.width,
            "height": file.probe.height,
            "pixel_aspect": file.probe.pixel_aspect,
            "turned": file.probe.turned,
            "frames": file.probe.frames,
            "fps": file.probe.own_rate if file.probe.duration > 0 else None,
            "variable": file.probe.variable,
            "seconds": file.probe.duration,
        }
    return {
        "dataset": file.dataset,
        "file": file.ref.id,
        "status": file.status,
        "kind": file.kind,
        "reason": file.reason,
        "bucket": None if file.shape is None else str(file.shape),
        "samples": file.samples,
        "windows": file.windows,
        "stretch": file.stretch,
        "cropped": file.cropped,
        "source": source,
        "captions": [{"text": caption.text, **dict(caption.extras)} for caption in file.captions],
        "bytes": file.ref.size,
        "version": file.ref.version,
        "sha256": file.content or None,
    }


def _table(files: Files, rows: Iterable[SourceFile]) -> int:
    """Lines of a row each; on a terminal a second one below it has the caption or the reason. Gives the number of rows."""
    widths = [files.widths(each) for each in files.datasets]
    bucket = max([len("bucket"), *(width for width, _ in widths)])
    name = min(_NAME, max([len("file"), *(width for _, width in widths)]))
    several, width = len(files.datasets) > 1, columns(sys.stdout)
    shown = 0

    def lines() -> Iterator[str]:
        nonlocal shown
        head = f"{'status':7}  {'bucket':{bucket}}  windows  {'size':>9}  frames     fps  "
        yield head + (f"{'file':{name}}  caption or reason" if width is None else "file")
        for file in rows:
            shown += 1
            own = one_line(file.name if several else file.ref.id)
            shape = "-" if file.shape is None else str(file.shape)
            start = f"{file.status:7}  {shape:{bucket}}  {file.windows or '-':>7}  {_source(file)}  "
            if width is None:
                padded = set_cell_size(own, name) if cell_len(own) < name else own
                yield f"{start}{padded}  {_detail(file, _WORDS)}".rstrip()
                continue
            beside = len(start) + cell_len(own) < width
            yield start + own if beside else start.rstrip()
            for text in ("" if beside else own, _detail(file, width - 6)):
                yield from folded(text, width, "    ", "    ") if text else ()

    _write(lines())
    return shown


def _source(file: SourceFile) -> str:
    """Size, frames and rate of the source; "~" before one that is an average."""
    if file.probe is None:
        return f"{'-':>9}  {'-':>6}  {'-':>6}"
    rate = "-"
    if file.probe.frames > 1 and file.probe.duration > 0:
        rate = f"~{file.probe.own_rate:.4g}" if file.probe.variable else f"{file.probe.own_rate:.5g}"
    return f"{f'{file.probe.width}x{file.probe.height}':>9}  {file.probe.frames:>6}  {rate:>6}"


def _detail(file: SourceFile, width: int) -> str:
    """Why a file is skipped; or its caption's first words, in at most so many columns."""
    if file.status != "used":
        return one_line(file.reason)
    if not file.captions:
        return ""
    more = f" and {len(file.captions) - 1} more" if len(file.captions) > 1 else ""
    return f'"{first_words(one_line(file.captions[0].text), width - len(more) - 2)}"{more}'


def first_words(text: str, width: int) -> str:
    """As many whole words as go into so many columns, with "..." for the rest."""
    if cell_len(text) <= width:
        return text
    cut = set_cell_size(text, max(1, width - 3)).rstrip()
    return f"{cut.rpartition(' ')[0] or cut}..."


def _totals(files: Files, shown: int, statuses: Sequence[str]) -> None:
    """Counts by dataset, and by reason of the statuses that are listed."""
    for dataset in files.datasets:
        counts = files.counts(dataset)
        number = {status: sum(each.files for each in counts if each.status == status) for status in STATUSES}
        total = sum(number.values())
        of_each = ", ".join(f"{number[status]} {status}" for status in STATUSES)
        typer.echo()
        say(f"{dataset}: {total} file{'s' if total != 1 else ''}: {of_each}")
        skipped = [each for each in counts if each.status != "used" and each.status in statuses]
        if skipped:
            print_table(("files", "skipped", "such as"), [_count(each) for each in skipped])
        for note in files.notes(dataset):
            say(note)
    listed = sum(each.files for dataset in files.datasets for each in files.counts(dataset) if each.status in statuses)
    if shown < listed:
        typer.echo()
        say(f"{shown} of {listed} are listed: --limit")


def _count(count: Count) -> tuple[str, str, str]:
    kind = f"{count.kind} ({count.status})" if count.status == "failed" else count.kind
    kind += f", {count.reasons} reasons" if count.reasons > 1 else ""
    example = count.example if count.reason == count.kind else f"{count.example}: {count.reason}"
    return str(count.files), kind, one_line(example)


def _write(lines: Iterable[str]) -> None:
    """To the standard output, without pushing out each line on its own."""
    for line in lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
