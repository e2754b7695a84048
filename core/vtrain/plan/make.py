"""Config and catalog to a plan: parts built, and checked against each other. No torch, no look into data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pydantic_core import to_jsonable_python

from vtrain.config.findings import shown
from vtrain.config.keys import key_text
from vtrain.config.record import Config
from vtrain.contract import (
    Catalog,
    ClipShape,
    ConfigError,
    Family,
    FamilySpec,
    Problem,
    Regularizer,
    RegularizerSpec,
    Sampler,
    SamplerSpec,
    Size,
    SupportsCheck,
    SupportsFeatures,
    SupportsStepCheck,
    SupportsTokenGrid,
    TrackerSpec,
)
from vtrain.contract.rooms import Room
from vtrain.plan.adapter import adapter_problems, adapter_warnings
from vtrain.plan.averages import average_problems, average_warnings
from vtrain.plan.conditions import check_declared, encoder_problems, picture_problems, training_problems
from vtrain.plan.datasets import check_frames, datasets, nearest_size, warnings
from vtrain.plan.offload import offload_problems, offload_warnings
from vtrain.plan.optimizer import optimizer_problems, optimizer_warnings
from vtrain.plan.parallel import parallel_problems, parallel_warnings
from vtrain.plan.places import among_clips, output_problems
from vtrain.plan.precision import layer_problems, precision_problems, precision_warnings, storage_of
from vtrain.plan.promise import promised
from vtrain.plan.records import DatasetPlan, Plan, ValidationPlan
from vtrain.plan.rollout import rollout_problems
from vtrain.plan.sizes import Clips, beyond, longest, refused
from vtrain.plan.text import check_text, foreign_extras
from vtrain.registry.blame import PartFault, blame
from vtrain.registry.spelling import check_members, declared_faults, faults, makers


def make_plan(config: Config, processes: int = 1, catalog: Catalog | None = None, room: Room | None = None) -> Plan:
    """Build every part that the config names and check the whole. processes: how many train together.

    catalog: of what is installed, to know other families' caption extras. room: the memory that there is, for [memory]. Raises
    ConfigError with all problems found, PluginError for a part that is none.
    """
    with blame(config.parts()):
        return promised(_make_plan(config, processes, catalog), room, catalog)


def _make_plan(config: Config, processes: int, catalog: Catalog | None) -> Plan:
    spec = config.model.registered.spec
    assert isinstance(spec, FamilySpec)
    family = spec.build(config.model.options)
    check_members("family", family, where=config.where("model", "use"))
    broken = [
        Problem(
            config.where("model", "path"), f"{found.where}: {found.what}" if found.where else found.what, found.remedy
        )
        for found in family.check()
    ]
    problems = [*precision_problems(config), *optimizer_problems(config, catalog), *output_problems(config)]
    problems += parallel_problems(config, catalog)
    problems += average_problems(config)
    # All below asks the model folder, which is not sound.
    if broken:
        raise ConfigError(broken + problems)
    check_text(family)
    sampler_spec = config.sampler.registered.spec
    assert isinstance(sampler_spec, SamplerSpec)
    problems += _check_unit(config, spec, sampler_spec)
    sampler = sampler_spec.build(config.sampler.options, family.scheduler_config())
    check_members("sampler", sampler, where=config.where("sampler", "use"))
    problems += rollout_problems(config, sampler)
    check_declared(family)
    made = datasets(config, family, problems, foreign_extras(spec, family, catalog))
    problems += [*training_problems(config, family, made), *encoder_problems(config, family, made)]
    problems += [*among_clips(config, made), *offload_problems(config, family, processes)]
    problems += adapter_problems(config, family, storage_of(config).name)
    clips = longest(family, made)
    regularizers = _regularizers(config, family, clips, problems)
    validation = _validation(config, family, sampler, problems)
    problems += [*refused(config, family, made, validation), *_misspelt(config, family, sampler, made, regularizers)]
    problems += layer_problems(config, family)
    if problems:
        raise ConfigError(sorted(problems, key=_place))
    return Plan(
        config=config,
        processes=processes,
        family=family,
        sampler=sampler,
        regularizers=regularizers,
        datasets=made,
        base=storage_of(config).name,
        validation=validation,
        warnings=(
            *_off_recipe(config, spec),
            *sampler.warnings(),
            *optimizer_warnings(config, family),
            *_unusual(config),
            *adapter_warnings(config, family),
            *average_warnings(config),
            *warnings(config, family),
            *beyond(family, made, validation),
            *precision_warnings(config, family),
            *_said(regularizers),
            *offload_warnings(config, family),
            *parallel_warnings(config, processes),
        ),
    )


def _misspelt(
    config: Config,
    family: Family,
    sampler: Sampler,
    made: Sequence[DatasetPlan],
    regularizers: Sequence[tuple[str, Regularizer]],
) -> Iterator[Problem]:
    """Abilities that a part's author has misspelt: without a word they would not be there, or be missed when all is encoded."""
    model, where = config.model.registered, config.where("model", "use")
    yield from faults("family", family, model, where)
    for sort, maker in makers("family", family):
        yield from declared_faults(sort, maker, model, where)
    yield from faults("sampler", sampler, config.sampler.registered, config.where("sampler", "use"))
    enabled = [part.registered for part in config.data if part.table.enabled]
    for registered, dataset in zip(enabled, made, strict=True):
        yield from faults("data backend", dataset.backend, registered, dataset.where)
    for number, (_, regularizer) in enumerate(regularizers):
        registered, where = config.regularizers[number].registered, config.where("regularizer", number)
        yield from faults("regularizer", regularizer, registered, where)
        for sort, maker in makers("regularizer", regularizer):
            yield from declared_faults(sort, maker, registered, where)
    for number, part in enumerate(config.trackers):
        spec = part.registered.spec
        assert isinstance(spec, TrackerSpec)
        yield from declared_faults("tracker", spec.build, part.registered, config.where("tracker", number))


def _place(problem: Problem) -> tuple[str, int, Problem]:
    """For the order of the file: line 9 before line 10."""
    file, _, line = problem.where.rpartition(":")
    return (file, int(line), problem) if line.isdigit() else (problem.where, 0, problem)


def _check_unit(config: Config, family: FamilySpec, sampler: SamplerSpec) -> list[Problem]:
    if sampler.timesteps_of in ("", family.name):
        return []
    what = f'the sampler "{sampler.name}" gives timesteps in the unit of the family "{sampler.timesteps_of}", and trains no other.'
    return [Problem(config.where("sampler", "use"), what, f'The sampler of "{family.name}" is "{family.sampler}".')]


def _off_recipe(config: Config, family: FamilySpec) -> Iterator[str]:
    """What of [sampler] is not as the family's own recipe has it."""
    recipe, part = family.sampler_options, config.sampler
    if part.registered.spec.name != family.sampler:
        options = f" with {', '.join(f'{key} = {shown(value)}' for key, value in recipe.items())}" if recipe else ""
        yield (
            f'sampler.use = "{part.registered.spec.name}": the recipe of the family "{family.name}" is "{family.sampler}"'
            f"{options}"
        )
        return
    given = part.options.model_dump(mode="json")
    for key, value in recipe.items():
        if given[key] != to_jsonable_python(value):
            yield (
                f'sampler.{key} = {shown(given[key])}: the recipe of the family "{family.name}" is {key} = {shown(value)}'
            )


_TOKEN = re.compile(r"<[^<>\s]{1,64}>|\{[A-Za-z_][\w.:-]{0,63}\}")


def _unusual(config: Config) -> Iterator[str]:
    """What of texts is allowed and probably not meant."""
    texts: dict[str, str] = {}
    for number, part in enumerate(config.data):
        if part.table.enabled:
            named = (("caption", part.table.caption or ""), ("caption_prefix", part.table.caption_prefix))
            texts |= {key_text(("data", number, key)): text for key, text in named}
    if config.validation is not None:
        texts |= {key_text(("validation", "prompts", name)): text for name, text in config.validation.prompts.items()}
        texts["validation.negative_prompt"] = config.validation.negative_prompt
    for key, text in texts.items():
        if found := _TOKEN.search(text):
            yield f'{key} holds "{found[0]}", which nothing fills in: the model is given it as it stands'


def _said(regularizers: tuple[tuple[str, Regularizer], ...]) -> list[str]:
    """What regularizers warn of."""
    return [
        f"[[regularizer]] {name}: {text}"
        for name, part in regularizers
        if isinstance(part, SupportsCheck)
        for text in part.warnings()
    ]


def _misfits(name: str, part: Regularizer, family: Family, clips: Clips) -> list[Problem]:
    """Why a regularizer cannot work with this model and these clips."""
    needs = part.needs()
    found = [
        Problem("", f"it reads block {tap}; the model has blocks 0 to {family.block_count - 1}.")
        for tap in needs.taps
        if not 0 <= tap < family.block_count
    ]
    if needs.features is not None and not isinstance(part, SupportsFeatures):
        what = "it asks for features and has no encoder that makes them (SupportsFeatures)"
        raise PartFault("regularizer", name, what)
    if needs.features is not None and not isinstance(family, SupportsTokenGrid):
        what = "it compares each token with the picture, and this model family does not say where its tokens lie."
        found.append(Problem("", what, "Ask the author of its plugin for SupportsTokenGrid."))
    return found + (list(part.check(clips)) if isinstance(part, SupportsCheck) else [])


def _regularizers(
    config: Config, family: Family, clips: Clips, problems: list[Problem]
) -> tuple[tuple[str, Regularizer], ...]:
    built: list[tuple[str, Regularizer]] = []
    for number, part in enumerate(config.regularizers):
        spec = part.registered.spec
        assert isinstance(spec, RegularizerSpec)
        regularizer = spec.build(part.options)
        check_members("regularizer", regularizer, spec.name, config.where("regularizer", number))
        problems += [
            Problem(config.where("regularizer", number), f"{spec.name}: {fault.what}", fault.remedy)
            for fault in _misfits(spec.name, regularizer, family, clips)
        ]
        if spec.name in (name for name, _ in built):
            problems.append(Problem(config.where("regularizer", number), f"{spec.name} is given twice."))
        built.append((spec.name, regularizer))
    return tuple(built)


def _validation(config: Config, family: Family, sampler: Sampler, problems: list[Problem]) -> ValidationPlan | None:
    table = config.validation
    if table is None:
        return None
    size = table.size or family.default_size
    frames = table.frames or family.default_frames
    problems += _odd(config.where("validation", "size"), size)
    generated = nearest_size(family, size)
    problems += check_frames(config, family.frame_rule, ("validation", "frames"), frames)
    problems += picture_problems(config, family, frames)
    problems += step_problems(config, sampler, table.steps)
    return ValidationPlan(
        prompts=table.prompts,
        negative_prompt=table.negative_prompt,
        shape=ClipShape(frames, generated.height, generated.width),
        size=size,
        fps=table.fps or family.default_fps,
        guidance=table.guidance,
        steps=table.steps,
        seed=table.seed,
        images=table.images,
    )


def _odd(where: str, size: Size) -> list[Problem]:
    """Files of videos are yuv420p, which has a sample of colour for two pixels each way."""
    if not (size.width % 2 or size.height % 2):
        return []
    near = Size(*(max(2, length - length % 2) for length in size))
    return [Problem(where, f"{size}: width and height of a video are even.", f'For example "{near}".')]


def step_problems(config: Config, sampler: Sampler, steps: int) -> Iterator[Problem]:
    """Why the sampler cannot generate in so many solver steps."""
    if isinstance(sampler, SupportsStepCheck):
        for fault in sampler.check_steps(steps):
            what = f"{config.sampler.registered.spec.name} cannot solve {steps} steps: {fault.what}"
            yield Problem(config.where("validation", "steps"), what, fault.remedy or "Set another validation.steps.")
