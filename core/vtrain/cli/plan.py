"""`vtrain plan`: everything a run would do, priced, without loading a weight."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vtrain.cli.prepare import prepare
from vtrain.plan.price import Prices
from vtrain.plan.records import Plan, Survey
from vtrain.plan.render import as_json, sections


def plan(config: Path, as_json_text: bool) -> None:
    """Print the plan of `config`. Raises what `prepare` raises."""
    prepared = prepare(config)
    if as_json_text:
        print(json.dumps(as_json(prepared.plan, prepared.scan.survey, prepared.prices), indent=2))  # noqa: T201
    else:
        show(Console(soft_wrap=True, highlight=False), prepared.plan, prepared.scan.survey, prepared.prices)


def show(console: Console, plan: Plan, survey: Survey, prices: Prices) -> None:
    """The plan as a table a section."""
    for section in sections(plan, survey, prices):
        table = Table(
            box=None, show_header=False, padding=(0, 2, 0, 0), title=escape(section.title), title_justify="left"
        )
        table.title_style = "bold"
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in section.rows:
            table.add_row("  " + escape(label), escape(text))
        console.print(table)
