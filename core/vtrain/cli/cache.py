"""`vtrain cache`: fill, status, prune, verify."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from vtrain import api
from vtrain.cli.report import looking, print_json, print_table, say
from vtrain.cli.terminal import Terminal
from vtrain.contract import ConfigError, Problem
from vtrain.contract.specs import bytes_text
from vtrain.data.caching import inventory
from vtrain.data.caching.entries import KINDS, Entries
from vtrain.data.caching.inventory import CacheFile, Inventory, Wanted
from vtrain.data.scanning.scan import scan
from vtrain.plan.records import Plan
from vtrain.registry.blame import blame
from vtrain.run.prepare import extra_texts, planned


def fill(path: Path) -> None:
    """Encode what a run of this configuration would, and no more. Under a launcher, each process fills its share."""
    terminal = Terminal()
    with api.fill(path, process_ends=True) as session, terminal.following(session):
        for event in session:
            terminal.show(event)
        if session.processes.first:
            folder = session.plan.config.cache.dir
            terminal.say(f"cache: {folder} holds {bytes_text(inventory.size(folder))}")


def status(path: Path, as_json: bool) -> None:
    """What of a run's entries is there. Raises what planning and scanning raise."""
    plan = planned(path)
    folder = plan.config.cache.dir
    if not as_json:
        say(f"cache: {folder}")  # what follows takes seconds
    with blame(plan.config.parts()):
        wanted = _wanted(plan)
    found = [inventory.take(Entries(folder, kind), kind, wanted[kind]) for kind in KINDS]
    found.append(inventory.take_databases(folder))
    if as_json:
        print_json({"folder": str(folder), **{each.kind: asdict(each) for each in found}})
        return
    heads = ("entries", "wanted", "present", "bytes", "missing", "damaged", "stale", "leftovers", "other files")
    used = [each for each in found if each.kind in ("text", "video") or each.wanted or _has_files(each)]
    print_table(heads, [_row(each) for each in used], turned=True)
    _explain(found)


def _has_files(found: Inventory) -> bool:
    tallies = (found.present, found.damaged, found.stale, found.leftovers, found.foreign)
    return any(tally.count for tally in tallies)


def _row(found: Inventory) -> tuple[str, ...]:
    tallies = (found.damaged, found.stale, found.leftovers, found.foreign)
    return (
        found.kind, str(found.wanted), str(found.present.count), bytes_text(found.present.bytes), str(found.missing),
        *(f"{tally.count} ({bytes_text(tally.bytes)})" if tally.count else "0" for tally in tallies),
    )  # fmt: skip


def _explain(found: Sequence[Inventory]) -> None:
    """What to do about it."""
    if any(each.missing or each.damaged.count for each in found):
        say("missing and damaged entries are made by `vtrain cache fill` or the next run")
    if any(each.stale.count or each.leftovers.count for each in found):
        say("stale: not used by this configuration, perhaps by another; `vtrain cache prune` deletes them")


def prune(paths: Sequence[Path], yes: bool) -> None:
    """Delete what none of the configurations uses; without `yes`, say what that would be.

    Raises ConfigError if they do not share a folder, DataError if what they use cannot be told.
    """
    from vtrain.data.caching.inventory import check_all_read, union

    plans = [planned(path) for path in paths]
    folders = dict.fromkeys(plan.config.cache.dir.resolve() for plan in plans)
    if len(folders) > 1:
        what = f"they have caches of their own: {', '.join(map(str, folders))}."
        raise ConfigError(Problem(", ".join(map(str, paths)), what, "Give those that share one folder."))
    folder = next(iter(folders))
    say(f"cache: {folder}")  # what follows takes seconds
    each: list[dict[str, Wanted]] = []
    for plan in plans:
        with blame(plan.config.parts()):
            each.append(_wanted(plan))
        check_all_read(each[-1], str(plan.config.path))
    wanted = union(each)
    found = [file for kind in KINDS for file in inventory.prunable(Entries(folder, kind), wanted[kind])]
    found += inventory.databases(folder)
    say(_amounts(found))
    if not found:
        return
    if not yes:
        say("nothing was deleted; --yes deletes them. Configurations that share the folder must be given too.")
        return
    _delete(found)


def _amounts(found: Sequence[CacheFile]) -> str:
    """How many files of each sort, and their bytes."""
    if not found:
        return "no entry is unused"
    parts = []
    for status, words in (("stale", "unused entries"), ("leftovers", "leftovers of damage and interruptions")):
        sizes = [file.bytes for file in found if file.status == status]
        if sizes:
            parts.append(f"{len(sizes)} {words} ({bytes_text(sum(sizes))})")
    return ", ".join(parts)


def _delete(found: Sequence[CacheFile]) -> None:
    done = Counter[str]()

    def count(file: CacheFile) -> None:
        done["files"] += 1
        done["bytes"] += file.bytes

    try:
        kept = inventory.delete(found, count)
    except KeyboardInterrupt:
        say(f"interrupted; {done['files']} of {len(found)} are deleted, the others are as they were", err=True)
        raise
    say(f"deleted {done['files']} files, {bytes_text(done['bytes'])}")
    for path, reason in kept:
        say(f"could not be deleted: {path}: {reason}", err=True)
    if kept:
        raise typer.Exit(2)


def verify(path: Path, as_json: bool) -> None:
    """Read every entry of the folder, whichever run made it, and move damaged ones aside. Exits with 2 if any is."""
    folder = planned(path).config.cache.dir
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("reading"),
        DownloadColumn(),
        BarColumn(bar_width=24),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    done = Counter[str]()
    with Progress(*columns, console=console, disable=not console.is_terminal or as_json) as bar:
        task = bar.add_task("reading", total=None if bar.disable else inventory.size(folder))

        def count(size: int) -> None:
            done["entries"] += 1
            bar.advance(task, size)

        try:
            counts, damaged, unread = inventory.verify(folder, count)
        except KeyboardInterrupt:
            say(f"interrupted; {done['entries']} entries were read, and damaged ones among them moved aside", err=True)
            raise
    if as_json:
        found = [{"path": str(each.path), "reason": each.reason, "moved_to": str(each.aside)} for each in damaged]
        cannot = [{"path": str(path), "reason": reason} for path, reason in unread]
        print_json({"folder": str(folder), "read": counts, "damaged": found, "unreadable": cannot})
    else:
        say(f"cache: {folder}")
        for each in damaged:
            say(f"damaged: {each.path}: {each.reason}; moved to {each.aside.name}")
        for path, reason in unread:
            say(f"cannot be read: {path}: {reason}")
        read = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count or kind in ("text", "video"))
        sound = sum(counts.values()) - len(damaged)
        say(f"{read} entries read, {sound} sound, {len(damaged)} damaged")
        if damaged:
            say("`vtrain cache fill` or the next run makes the damaged ones again")
    if damaged or unread:
        raise typer.Exit(2)


def _wanted(plan: Plan) -> dict[str, Wanted]:
    """The entries that a run of this plan uses. Raises DataError."""
    from vtrain.data.caching.inventory import Stores, wanted
    from vtrain.data.caching.pictures import keys

    with looking() as on_file:
        scanned = scan(plan, on_file)
    for message in scanned.messages:
        say(message, err=True)
    stores = Stores(plan)
    found = wanted(stores, scanned.samples, extra_texts(plan))
    for each in keys(stores).values():
        for kind, own in each.items():
            found[kind] = replace(found[kind], keys=found[kind].keys.union(map(bytes.fromhex, own)))
    return found
