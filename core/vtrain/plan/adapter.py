"""The adapter of [model.lora]: whether it fits the model, and what it starts from. From headers alone, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vtrain.config.findings import shown
from vtrain.config.record import Config
from vtrain.config.tables import LoraTable
from vtrain.contract import Family, ModelError, Problem
from vtrain.contract.adapters import (
    GROUPED,
    OTHER,
    AdapterFile,
    SupportsAdapterNames,
    adapter_path,
    in_groups,
    layers,
    matches,
    misfits_of,
    read_adapter,
    targets_of,
)
from vtrain.contract.specs import did_you_mean
from vtrain.plan.places import CHECKPOINT, CHECKPOINTS
from vtrain.plan.records import Plan

WHOLE = ("fp32", "bf16")
"""Storage types in which a weight is a number of its own: DoRA asks for the length of each output's weights."""


def lora_scale(table: LoraTable) -> float:
    """By which B A is multiplied."""
    alpha = float(table.rank) if table.alpha is None else table.alpha
    return alpha / (table.rank**0.5 if table.rslora else table.rank)


def adapter_problems(config: Config, family: Family, base: str) -> Iterator[Problem]:
    """Why the adapter cannot be made. base: storage type of the denoiser."""
    table = config.model.table.lora
    if table is None:
        return
    if table.init == "orthogonal" and table.rank % 2 and table.start is None:
        what = f"orthogonal first weights are of an even rank, and this one is {table.rank}."
        yield Problem(config.where("model", "lora", "init"), what, f"Set rank = {table.rank + 1}, or another init.")
    if table.dora and base not in WHOLE:
        what = f"DoRA needs the lengths of the base's weights, which {base} has not as numbers of their own."
        remedy = 'Set precision.base = "bf16", or dora = false.'
        yield Problem(config.where("model", "lora", "dora"), what, remedy)
    if table.init == "orthogonal" and table.start is None and isinstance(family, SupportsAdapterNames):
        shapes = family.weight_shapes()
        if odd := [name for name in adapted_modules(family, table) if len(shapes[f"{name}.weight"]) > 2]:
            what = f"peft makes orthogonal first weights for Linear layers alone, and {odd[0]} is a convolution."
            yield Problem(config.where("model", "lora", "init"), what, "Set another init, or other targets.")
    missed = list(_unmatched(config, family, table))
    yield from missed
    if table.start is not None and not missed and not resumes(config):
        where = config.where("model", "lora", "start")
        try:
            file = start_file(table.start, family)
            yield from (Problem(where, *fault) for fault in _start_faults(table, family, file))
        except ModelError as error:
            yield from (Problem(where, f"{each.where}: {each.what}", each.remedy) for each in error.problems)


def adapter_warnings(config: Config, family: Family) -> Iterator[str]:
    """What of [model.lora] has no effect."""
    table = config.model.table.lora
    if table is None:
        return
    if isinstance(family, SupportsAdapterNames):
        shapes = family.weight_shapes()
        sides = {name: _sides(shapes[f"{name}.weight"]) for name in adapted_modules(family, table)}
        if narrow := [name for name, both in sides.items() if min(both) < table.rank]:
            inside, outside = sides[narrow[0]]
            yield (
                f"model.lora.rank is {table.rank}, more than {len(narrow)} of the adapted layers have room for "
                f"({narrow[0]} is {inside} -> {outside}): a rank above that adds nothing but memory"
            )
    if table.start is None:
        return
    if resumes(config):
        yield "model.lora.start has no effect: this run resumes, and its checkpoint has the adapter"
    elif ("model", "lora", "init") in config.lines:
        yield "model.lora.init has no effect: model.lora.start gives the first weights"


def adapter_rows(plan: Plan) -> tuple[tuple[str, str], ...]:
    """For the plan's text."""
    table = plan.config.model.table.lora
    assert table is not None
    kind = "DoRA" if table.dora else "LoRA"
    rule = " / sqrt(rank)" if table.rslora else ""
    dropout = f", dropout {table.dropout:g}" if table.dropout else ""
    init = f", {table.init} first weights" if table.init != "kaiming" and table.start is None else ""
    alpha = f"{table.alpha or table.rank:g}"
    text = (
        f"{kind}, rank {table.rank}, alpha {alpha}{rule and f'{rule} = scale {lora_scale(table):.4g}'}{dropout}{init}"
    )
    rows = [("trained", text)]
    if isinstance(plan.family, SupportsAdapterNames) and (names := adapted_modules(plan.family, table)):
        count = adapter_parameters(plan.family, table)
        rows.append(
            ("adapted", f"{len(names)} layers ({', '.join(targets(plan.family, table))}), {count:,} parameters")
        )
    if table.start is not None and not resumes(plan.config):
        rows.append(("starts from", _start_text(plan, table, table.start)))
    return tuple(rows)


def adapter_parameters(family: SupportsAdapterNames, table: LoraTable) -> int:
    """How many numbers the adapter has."""
    shapes = family.weight_shapes()
    return sum(_adapter_size(shapes[f"{name}.weight"], table) for name in adapted_modules(family, table))


def _sides(weight: Sequence[int]) -> tuple[int, int]:
    """(in, out) of a layer as a matrix, of which the smaller one bounds the rank: a convolution reads in x taps of its kernel."""
    outside, inside, *kernel = weight
    return inside * math.prod(kernel), outside


def _adapter_size(weight: Sequence[int], table: LoraTable) -> int:
    inside, outside = _sides(weight)
    return table.rank * (inside + outside) + (outside if table.dora else 0)


def _start_text(plan: Plan, table: LoraTable, start: Path) -> str:
    file = start_file(start, plan.family)
    scales = {found.scale for found in file.modules.values()}
    scale = lora_scale(table)
    odd = (
        "" if all(abs(each - scale) < 1e-9 * scale for each in scales) else ", rescaled so that it has the same effect"
    )
    before = f"{min(scales):.4g}" if len(scales) == 1 else f"{min(scales):.4g} to {max(scales):.4g}"
    return f"{file.path}" + (f" (scale {before} there, {scale:.4g} here{odd})" if odd else "")


def targets(family: SupportsAdapterNames, table: LoraTable) -> tuple[str, ...]:
    """Those of the file, or the family's."""
    return family.lora_targets if table.targets is None else table.targets


def adapted_modules(family: SupportsAdapterNames, table: LoraTable) -> list[str]:
    """Names of the modules that get an adapter."""
    ends = targets(family, table)
    return [name for name in layers(family.weight_shapes()) if any(matches(name, end) for end in ends)]


def start_file(start: Path, family: Family) -> AdapterFile:
    """What [model.lora] start names. Raises ModelError."""
    path = adapter_path(start)
    if isinstance(family, SupportsAdapterNames):
        return read_adapter(path, family.weight_shapes(), family.original_names)
    return read_adapter(path)


def resumes(config: Config) -> bool:
    """Whether the run resumes from a checkpoint, by names alone."""
    if config.run.resume != "latest":
        return config.run.resume != "never"
    folder = config.run.output_dir / CHECKPOINTS
    return folder.is_dir() and any(CHECKPOINT.fullmatch(path.name) for path in folder.iterdir())


def _unmatched(config: Config, family: Family, table: LoraTable) -> Iterator[Problem]:
    """Targets that name no layer. A family that does not say what it has is asked when it is loaded."""
    if not isinstance(family, SupportsAdapterNames):
        return
    where = config.where("model", "lora", "targets")
    if table.targets == ():
        yield Problem(
            where, "targets is empty, so that nothing would be trained.", "Remove it: the family has its own."
        )
    shapes = family.weight_shapes()
    known = layers(shapes)
    ends = sorted({part for name in known for part in _ends(name)})
    others = _modules(shapes) - set(known)
    for target in table.targets or ():
        found = [name for name in known if matches(name, target)]
        if not found:
            usual = ", ".join(family.lora_targets)
            hint = did_you_mean(target, ends)
            yield Problem(
                where, f'no layer of the model is called "{target}".', hint or f"The family's own are {usual}."
            )
        elif wrong := sorted(name for name in others if matches(name, target)):
            what = f'targets: "{target}" is also {wrong[0]}, which is no layer and can have no adapter.'
            longer = targets_of(found, [*known, *others])
            yield Problem(where, what, f"Write more of the names, such as {shown(longer)}.")
        elif grouped := [name for name in found if in_groups(shapes[f"{name}.weight"])]:
            yield Problem(where, GROUPED.format(grouped[0]), f'Remove "{target}" from model.lora.targets.')


def _modules(shapes: Iterable[str]) -> set[str]:
    """Every module that has weights, or that modules with weights are in."""
    parts = (name.split(".")[:-1] for name in shapes)
    return {".".join(each[:end]) for each in parts for end in range(1, len(each) + 1)}


def _ends(name: str) -> Iterator[str]:
    """Of a module's name, without numbers of blocks: "attn1.to_out.0", "to_out.0"."""
    parts = name.split(".")
    for start in range(len(parts)):
        if not parts[start].isdigit():
            yield ".".join(parts[start:])


def _start_faults(table: LoraTable, family: Family, file: AdapterFile) -> Iterator[tuple[str, str]]:
    """(what, remedy) of each way in which a LoRA is not the one that [model.lora] describes."""
    title = str(file.path)
    if not file.modules and not file.incomplete:
        sample = f" It holds {file.foreign[0]}." if file.foreign else ""
        yield f"{title}: nothing in it is a LoRA of this model.{sample}", "Name a LoRA of this model family."
        return
    if file.foreign or file.incomplete:
        odd = [*file.foreign, *(f"half of {name}" for name in file.incomplete)]
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        yield f"{title}: the model has no place for {', '.join(odd[:3])}{more}.", "Name a LoRA of this very model."
        return
    ranks = sorted({found.rank for found in file.modules.values()})
    if len(ranks) > 1:
        yield f"{title} has modules of rank {', '.join(map(str, ranks))}, and one rank is trained.", OTHER
    elif ranks[0] != table.rank:
        yield f"{title} has rank {ranks[0]}, and model.lora.rank is {table.rank}.", f"Set rank = {ranks[0]}."
    with_magnitudes = {found.magnitudes for found in file.modules.values()}
    if with_magnitudes != {table.dora}:
        kind, switch = ("a DoRA", "true") if True in with_magnitudes else ("a LoRA without DoRA's magnitudes", "false")
        yield f"{title} is {kind}, and model.lora.dora is {shown(table.dora)}.", f"Set dora = {switch}."
    if isinstance(family, SupportsAdapterNames):
        yield from _module_faults(table, family, file)


def _module_faults(table: LoraTable, family: SupportsAdapterNames, file: AdapterFile) -> Iterator[tuple[str, str]]:
    shapes = family.weight_shapes()
    if wrong := list(misfits_of(file, shapes)):
        yield f"{file.path} is of a model of another width: {wrong[0]}.", "Name a LoRA of this very model."
        return
    mine, theirs = set(adapted_modules(family, table)), set(file.modules)
    if mine != theirs:
        said = [f"{len(found)} layers {word}, such as {sorted(found)[0]}"
                for found, word in ((theirs - mine, "more"), (mine - theirs, "less")) if found]  # fmt: skip
        ends = targets_of(sorted(theirs), layers(shapes))
        listed = shown(ends) if len(ends) <= 24 else "those of its own layers"
        yield f"{file.path} adapts other layers than targets: {' and '.join(said)}.", f"Set targets = {listed}."
