"""Bad files that a run moves out of its datasets, told as they go."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from vtrain.cli.report import visible
from vtrain.data.scanning.quarantine import move_bad
from vtrain.plan.records import Plan


def tell_moved(plan: Plan, console: Console) -> None:
    """Move what is bad, in datasets with on_bad_file = "move"; a line for each file, and how many there were."""
    done = stayed = 0
    for moved in move_bad(plan):
        name = f"{moved.dataset}/{moved.ref_id}"
        if moved.target is None:
            stayed += 1
            line = f"not moved: {name}: {moved.stays} ({moved.reason})"
        else:
            done += 1
            line = f"moved: {name} -> {moved.target} ({moved.reason})"
        console.print(escape(visible(line).replace("\n", "\\n")))
    if done or stayed:
        console.print(f"{done} bad files moved" + (f", {stayed} not" if stayed else ""))
