"""`vtrain plugins`: what is installed, and what each part takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from vtrain.cli.report import print_json, print_table, say
from vtrain.contract import KINDS, Catalog, ConfigError, Failure, FamilySpec, PluginError, Problem, Registered, Spec
from vtrain.contract.specs import did_you_mean, listed, origin
from vtrain.registry import discover

if TYPE_CHECKING:
    from vtrain.config.schema import Option


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
        if isinstance(part.spec, FamilySpec) and part.spec.caption_extras:
            typer.echo("\nBeside a clip's caption it reads (keys of JSON sidecars, columns of tables):")
            rows = [
                (each.name, each.kind, each.default or "nothing", each.summary) for each in part.spec.caption_extras
            ]
            print_table(("extra", "what", "absent", "meaning"), rows)


def _extras(spec: Spec) -> dict[str, object]:
    """Of a family, for programs."""
    return {"caption_extras": [asdict(each) for each in spec.caption_extras]} if isinstance(spec, FamilySpec) else {}


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
    kinds = sorted(spec.kind for spec in KINDS)
    if kind is not None and kind not in kinds:
        raise ConfigError(Problem("", f'no kind of part is called "{kind}".', f"The kinds are {listed(kinds)}."))
    parts = [part for (of, called), part in catalog.parts.items() if called == name and kind in (None, of)]
    if parts:
        return parts
    broken = [each for each in catalog.failures if name in (each.name, each.entry_point) and kind in (None, each.kind)]
    if broken:
        raise PluginError(
            Problem("", f"{_failed(each)}, of {origin(each)}, cannot be used: {each.reason}.") for each in broken
        )
    names = sorted({called for of, called in catalog.parts if kind in (None, of)})
    remedy = f"{did_you_mean(name, names)} Installed: {listed(names)}.".strip()
    raise ConfigError(Problem("", f'no {kind or "part"} is called "{name}".', remedy))
