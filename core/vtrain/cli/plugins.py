"""`vtrain plugins`: what is installed, and what each part takes."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING

import typer

from vtrain.cli.report import print_json, print_table, say
from vtrain.contract import (
    KINDS,
    Catalog,
    ConfigError,
    Failure,
    FamilySpec,
    OptimizerSpec,
    PluginError,
    Problem,
    Registered,
    Spec,
)
from vtrain.contract.specs import NOUNS, did_you_mean, ended, listed, origin
from vtrain.registry import discover

if TYPE_CHECKING:
    from pathlib import Path

    from vtrain.config.schema import Option
    from vtrain.contract.plugin_rules import Tables
    from vtrain.registry.check import Outcome, Report


def list_plugins(as_json: bool) -> None:
    """All parts by kind and name; failures below."""
    catalog = discover()
    parts = list(catalog.parts.values())
    if as_json:
        print_json({"parts": [_part(part) for part in parts], "failures": [asdict(each) for each in catalog.failures]})
        return
    rows = [(part.spec.kind, part.spec.name, part.distribution, part.version, part.spec.summary) for part in parts]
    print_table(("kind", "name", "distribution", "version", "summary"), rows)
    if catalog.failures:
        typer.echo("\nCannot be used:")
        failures = [(_failed(each), each.distribution, each.version, each.reason) for each in catalog.failures]
        print_table(("plugin", "distribution", "version", "reason"), failures)


def _part(part: Registered) -> dict[str, str]:
    return {
        "kind": part.spec.kind,
        "name": part.spec.name,
        "distribution": part.distribution,
        "version": part.version,
        "entry_point": part.entry_point,
        "summary": part.spec.summary,
    }


def _failed(failure: Failure) -> str:
    """ "toy" for a plugin, "toy: sampler flow" for a part of one."""
    part = f"{failure.kind} {failure.name}".strip()
    return f"{failure.entry_point}: {part}" if part else failure.entry_point


def show_plugin(name: str, kind: str | None, as_json: bool) -> None:
    """Every option of every part called `name`. Raises ConfigError or PluginError if there is none."""
    from vtrain.config.schema import describe

    parts = _parts_called(discover(), name, kind)
    described = [(part, describe(part.spec.options)) for part in parts]
    if as_json:
        print_json(
            [
                {**_part(part), "options": [asdict(option) for option in options], **_extras(part.spec)}
                for part, options in described
            ]
        )
        return
    for index, (part, options) in enumerate(described):
        if index:
            typer.echo()
        say(f"{part.spec.kind} {name}, from {origin(part)}: {part.spec.summary}")
        _print_options(options)
        if isinstance(part.spec, OptimizerSpec):
            typer.echo("\nAs an optimizer:")
            print_table(("what", "value"), _of_optimizer(part.spec))
        if isinstance(part.spec, FamilySpec) and part.spec.caption_extras:
            typer.echo("\nBeside a clip's caption it reads (keys of JSON sidecars, columns of tables):")
            rows = [
                (each.name, each.kind, each.default or "nothing", each.summary) for each in part.spec.caption_extras
            ]
            print_table(("extra", "what", "absent", "meaning"), rows)


def _of_optimizer(spec: OptimizerSpec) -> list[tuple[str, str]]:
    """What a plan goes by."""
    types = [each for each in ("fp32", "bf16") if each in spec.moves]
    parts = "; also parts of weights (sharded)" if "sharded" in spec.moves else ""
    rows = [
        ("moves", f"{' and '.join(types)} weights{parts}"),
        ("state", ", ".join(f"{spec.bytes_of_state(each):.3g} bytes for each {each} weight" for each in types)),
    ]
    if spec.usual_lr is not None:
        rows.append(("usual lr", "{:g} to {:g}".format(*spec.usual_lr)))
    if spec.library is not None:
        there = find_spec(spec.library[0]) is not None
        needs = "installed" if there else f'not installed: pip install "{spec.library[1]}"'
        rows.append(("library", f"{spec.library[0]}, {needs}"))
    return rows


def _extras(spec: Spec) -> dict[str, object]:
    """Of a family or an optimizer, for programs."""
    if isinstance(spec, FamilySpec):
        return {"caption_extras": [asdict(each) for each in spec.caption_extras]}
    if not isinstance(spec, OptimizerSpec):
        return {}
    bytes_of_state = {each: spec.bytes_of_state(each) for each in ("fp32", "bf16") if each in spec.moves}
    return {
        "moves": sorted(spec.moves),
        "state_bytes": bytes_of_state,
        "usual_lr": spec.usual_lr,
        "library": spec.library,
    }


def _print_options(options: Sequence[Option]) -> None:
    from vtrain.config.schema import REFUSED

    if not options:
        typer.echo("It takes no options.")
        return
    rows = [
        (
            option.key,
            option.type,
            "required" if option.required else option.default or "absent",
            option.limits,
            option.resume,
            option.meaning.removesuffix(REFUSED),  # `resume` says it
        )
        for option in options
    ]
    print_table(("option", "type", "default", "limits", "resume", "meaning"), rows)


def _parts_called(catalog: Catalog, name: str, kind: str | None) -> list[Registered]:
    kind = kind_called(kind)
    parts = [part for (of, called), part in catalog.parts.items() if called == name and kind in (None, of)]
    if parts:
        return parts
    broken = [each for each in catalog.failures if name in (each.name, each.entry_point) and kind in (None, each.kind)]
    if broken:
        raise PluginError(
            Problem("", f"{_failed(each)}, of {origin(each)}, cannot be used: {ended(each.reason)}") for each in broken
        )
    names = sorted({called for of, called in catalog.parts if kind in (None, of)})
    remedy = f"{did_you_mean(name, names)} Installed: {listed(names)}.".strip()
    raise ConfigError(Problem("", f'no {kind or "part"} is called "{name}".', remedy))


def kind_called(kind: str | None) -> str | None:
    """As specs name it, also of "data-backend". Raises ConfigError."""
    if kind is None:
        return None
    kinds, wanted = {spec.kind.replace("_", "-") for spec in KINDS}, kind.replace("_", "-")
    if wanted not in kinds:
        raise ConfigError(Problem("", f'no kind of part is called "{kind}".', f"The kinds are {listed(kinds)}."))
    return wanted.replace("-", "_")


def write_plugin(name: str, kind: str, directory: Path) -> None:
    """A new package, and what to do next. Raises ConfigError."""
    from vtrain.scaffold.package import Names, new_plugin

    chosen = kind_called(kind)
    assert chosen is not None
    place = new_plugin(name, chosen, directory, discover())
    files = sorted(path for path in place.rglob("*") if path.is_file())
    for file in files:
        typer.echo(f"  {file.relative_to(directory)}")
    part = Names.of(name).part
    say(f'wrote the {NOUNS[chosen][0]} "{part}", {len(files)} files. Next:')
    for line in (
        f"cd {shlex.quote(str(place))}",
        'pip install -e ".[test]"',
        f"vtrain plugins check {name}",
        "python -m pytest",
    ):
        typer.echo(f"  {line}")


def check_plugin(name: str, kind: str | None, config: Path | None, as_json: bool) -> None:
    """Every rule of a plugin that needs no model. Raises typer.Exit with code 2 if one is broken."""
    from vtrain.registry.check import check

    reports = check(name, kind_called(kind), _tables(config) if config is not None else {})
    if as_json:
        print_json([_checked(report) for report in reports])
    else:
        for index, report in enumerate(reports):
            if index:
                typer.echo()
            _print_report(report)
    if any(report.problems for report in reports):
        raise typer.Exit(2)


def _tables(config: Path) -> Tables:
    """The options of every part that a run's file names, as JSON."""
    from vtrain.config import load
    from vtrain.config.record import TABLES, Part

    read = load(config, discover())
    parts = [part for table in TABLES.values() for _, part in read.held(table) if isinstance(part, Part)]
    return {
        (part.registered.spec.kind, part.registered.spec.name): json.loads(part.options.model_dump_json())
        for part in parts
    }


def _checked(report: Report) -> dict[str, object]:
    rules = [
        {"rule": each.rule, "part": each.part, "result": each.result, **(asdict(each.problem) if each.problem else {})}
        for each in report.outcomes
    ]
    plugin = report.plugin
    about = {"entry_point": plugin.entry.name, "distribution": plugin.distribution, "version": plugin.version}
    return {**about, "parts": report.parts, "problems": len(report.problems), "rules": rules}


def _print_report(report: Report) -> None:
    plugin = report.plugin
    named = f'"{plugin.entry.name}" of {plugin.distribution} {plugin.version}'
    say(f"{named}: {', '.join(report.parts) or 'no part'}")
    rules = dict.fromkeys(each.rule for each in report.outcomes)
    print_table(
        ("result", "rule"), [(_summed([each for each in report.outcomes if each.rule == rule]), rule) for rule in rules]
    )
    skipped = [each for each in report.outcomes if each.result == "not checked"]
    if skipped:
        typer.echo("\nNot checked:")
        print_table(("part", "why"), list(dict.fromkeys((each.part, _what(each)) for each in skipped)))
        for hint in {each.problem.remedy for each in skipped if each.problem and each.problem.remedy}:
            say(hint)
    count = len(report.problems)
    typer.echo("\nNo problem." if not count else f"\n{count} problem{'s' if count > 1 else ''}:")
    for each in report.problems:
        if each.problem is not None:
            place = f" ({each.problem.where})" if each.problem.where else ""
            say(f"  {f'{each.part}: ' if each.part else ''}{each.rule}{place}")
            say(f"      {each.problem.what} {each.problem.remedy}".rstrip())


def _what(outcome: Outcome) -> str:
    return outcome.problem.what if outcome.problem else ""


def _summed(outcomes: Sequence[Outcome]) -> str:
    """ "ok", "2 problems", "ok, 1 not checked": of one rule, over all parts."""
    counts = Counter(each.result for each in outcomes)
    problems, skipped = counts["problem"], counts["not checked"]
    words = [f"{problems} problem{'s' if problems > 1 else ''}"] if problems else ["ok"] if counts["ok"] else []
    if skipped:
        words.append("not checked" if not words else f"{skipped} not checked")
    return ", ".join(words)
