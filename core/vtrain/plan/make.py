"""Config and catalog to a plan: parts built, and checked against each other. No torch, no look into data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vtrain.config.keys import key_text
from vtrain.config.record import Config
from vtrain.contract import (
    ClipShape,
    ConfigError,
    Family,
    FamilySpec,
    OptimizerSpec,
    PluginError,
    Problem,
    Regularizer,
    RegularizerSpec,
    SamplerSpec,
    SupportsCheck,
    SupportsFeatures,
    SupportsFrameLevels,
    SupportsTokenGrid,
    TokenGrid,
)
from vtrain.contract.specs import did_you_mean, listed
from vtrain.plan.datasets import check_frames, check_size, datasets, token_grid, warnings
from vtrain.plan.records import DatasetPlan, Plan, ValidationPlan
from vtrain.registry.blame import blame

CHECKPOINT = re.compile(r"step-(\d{6,})")
"""The name of a checkpoint's folder."""


def make_plan(config: Config, processes: int = 1) -> Plan:
    """Build every part that the config names and check the whole. processes: how many train together.

    Raises ConfigError with all problems found.
    """
    with blame(config.parts()):
        return _make_plan(config, processes)


def _make_plan(config: Config, processes: int) -> Plan:
    spec = config.model.registered.spec
    assert isinstance(spec, FamilySpec)
    family = spec.build(config.model.options)
    broken = [
        Problem(
            config.where("model", "path"), f"{found.where}: {found.what}" if found.where else found.what, found.remedy
        )
        for found in family.check()
    ]
    problems = _check_precision(config) + _check_training(config) + _check_output(config)
    # All below asks the model folder, which is not sound.
    if broken:
        raise ConfigError(broken + problems)
    sampler_spec = config.sampler.registered.spec
    assert isinstance(sampler_spec, SamplerSpec)
    sampler = sampler_spec.build(config.sampler.options, family.scheduler_config())
    made = datasets(config, family, problems)
    problems += [*training_problems(config, family, made), *_check_samples(config, made)]
    clips = _longest(family, made)
    regularizers = _regularizers(config, family, clips, problems)
    validation = _validation(config, family, problems)
    if problems:
        raise ConfigError(sorted(problems, key=_place))
    return Plan(
        config=config,
        processes=processes,
        family=family,
        sampler=sampler,
        regularizers=regularizers,
        datasets=made,
        # What is trained is fp32: an adapter on a bf16 base, or all weights (_check_precision tells why).
        base=config.precision.base or ("bf16" if config.model.table.train == "lora" else "fp32"),
        validation=validation,
        warnings=(*sampler.warnings(), *warnings(config, family), *_said(regularizers)),
    )


def _place(problem: Problem) -> tuple[str, int, Problem]:
    """For the order of the file: line 9 before line 10."""
    file, _, line = problem.where.rpartition(":")
    return (file, int(line), problem) if line.isdigit() else (problem.where, 0, problem)


def _check_precision(config: Config) -> list[Problem]:
    optimizer = config.optimizer.registered.spec
    assert isinstance(optimizer, OptimizerSpec)
    full_bf16 = config.model.table.train == "full" and config.precision.base == "bf16"
    if not full_bf16 or optimizer.pure_bf16:
        return []
    return [
        Problem(
            config.where("precision", "base"),
            f'full training of bf16 weights with optimizer "{optimizer.name}": its updates are smaller than bf16 can '
            "hold, so the weights would not move.",
            'Use base = "fp32" with mixed = "bf16".',
        )
    ]


def _check_training(config: Config) -> list[Problem]:
    problems = []
    timed = 'needs "steps" or "epochs": a schedule in seconds would not be the same run twice.'
    if config.lr_schedule.warmup is not None and config.lr_schedule.warmup.unit == "seconds":
        problems.append(Problem(config.where("lr_schedule", "warmup"), f"lr_schedule.warmup {timed}"))
    return problems


def _check_output(config: Config) -> list[Problem]:
    problems = []
    for place, folder in ((("run", "output_dir"), config.run.output_dir), (("cache", "dir"), config.cache.dir)):
        parent = folder
        # Not Path.exists, which raises for what lies in a folder that one may not enter.
        while not os.path.exists(parent) and parent != parent.parent:  # noqa: PTH110
            parent = parent.parent
        if not parent.is_dir():
            problems.append(Problem(config.where(*place), f"{parent} is a file, so {folder} cannot be a folder."))
        # By the effective ids, where the system can ask so: opening a file goes by these.
        elif not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            problems.append(
                Problem(config.where(*place), _unwritable(parent), f"Set {key_text(place)} to another folder.")
            )
    resume = config.run.resume
    if resume not in ("latest", "never") and not resume_path(config).is_dir():
        what = f'resume: no checkpoint folder "{resume}", neither in {_folder(config)} nor in {_checkpoints(config)}.'
        remedy = f'{checkpoints_there(config)} Or "latest", "never".'
        problems.append(Problem(config.where("run", "resume"), what, remedy))
    return problems


def _check_samples(config: Config, made: tuple[DatasetPlan, ...]) -> list[Problem]:
    """A run that writes its videos among its clips would train on them the next time."""
    output = config.run.output_dir.resolve()
    return [
        Problem(
            config.where("run", "output_dir"),
            f"{output} lies in the dataset {each.backend.location}, where its sample videos would be taken for clips.",
            "Set run.output_dir to a folder beside it.",
        )
        for each in made
        if "://" not in each.backend.location and output.is_relative_to(Path(each.backend.location).resolve())
    ]


def _unwritable(folder: Path) -> str:
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"{folder} lies on a read-only file system."
    return f"no permission to write in {folder}."


def resume_path(config: Config) -> Path:
    """The checkpoint that [run].resume names, when it is neither "latest" nor "never": a path, or the name of one of the run's
    own. A relative path starts at the configuration file, as all do."""
    named = Path(os.path.expanduser(config.run.resume))  # noqa: PTH111 (Path's raises for a user that there is not)
    beside, own = _folder(config) / named, _checkpoints(config) / named
    return own if own.is_dir() and not beside.is_dir() else beside


def _folder(config: Config) -> Path:
    """The configuration file's, absolute."""
    return config.path.parent.absolute()


def _checkpoints(config: Config) -> Path:
    return config.run.output_dir / "checkpoints"


def checkpoints_there(config: Config, most: int = 6) -> str:
    """A sentence that names the run's newest checkpoints. most: of them that are named."""
    folder = _checkpoints(config)
    names = [path.name for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name)] if folder.is_dir() else []
    if not names:
        return f"There is none in {folder}."
    newest = sorted(names, key=lambda name: int(name.removeprefix("step-")))[-most:]
    more = f" and {len(names) - most} earlier" if len(names) > most else ""
    return f"In {folder} there are {', '.join(newest)}{more}."


Clips = tuple[tuple[ClipShape, TokenGrid | None], ...]


def _longest(family: Family, made: tuple[DatasetPlan, ...]) -> Clips:
    """The longest clip of each bucket that the family takes, once, with its tokens."""
    shapes = {ClipShape(each.frames, s.height, s.width) for each in made for s in each.sizes}
    stride, rule = family.pixel_stride, family.frame_rule
    taken = [s for s in sorted(shapes) if rule.accepts(s.frames) and not (s.height % stride or s.width % stride)]
    return tuple((shape, token_grid(family, shape)) for shape in taken)


def _said(regularizers: tuple[tuple[str, Regularizer], ...]) -> list[str]:
    """What regularizers warn of."""
    return [
        f"[[regularizer]] {name}: {text}"
        for name, part in regularizers
        if isinstance(part, SupportsCheck)
        for text in part.warnings()
    ]


def _misfits(part: Regularizer, family: Family, clips: Clips) -> list[Problem]:
    """Why a regularizer cannot work with this model and these clips."""
    needs = part.needs()
    found = [
        Problem("", f"it reads block {tap}; the model has blocks 0 to {family.block_count - 1}.")
        for tap in needs.taps
        if not 0 <= tap < family.block_count
    ]
    if needs.features is not None and not isinstance(part, SupportsFeatures):
        raise PluginError(Problem("", "it asks for features and has no encoder that makes them (SupportsFeatures)."))
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
        problems += [
            Problem(config.where("regularizer", number), f"{spec.name}: {fault.what}", fault.remedy)
            for fault in _misfits(regularizer, family, clips)
        ]
        if spec.name in (name for name, _ in built):
            problems.append(Problem(config.where("regularizer", number), f"{spec.name} is given twice."))
        built.append((spec.name, regularizer))
    return tuple(built)


def _validation(config: Config, family: Family, problems: list[Problem]) -> ValidationPlan | None:
    table = config.validation
    if table is None:
        return None
    size = table.size or family.default_size
    frames = table.frames or family.default_frames
    problems += check_size(config.where("validation", "size"), size, family.pixel_stride)
    problems += check_frames(config, family.frame_rule, ("validation", "frames"), frames)
    problems += picture_problems(config, family, frames)
    return ValidationPlan(
        prompts=table.prompts,
        negative_prompt=table.negative_prompt,
        shape=ClipShape(frames, size.height, size.width),
        fps=table.fps or family.default_fps,
        guidance=table.guidance,
        steps=table.steps,
        seed=table.seed,
        images=table.images,
    )


# -- image to video ------------------------------------------------------------------------------------------------------


def training_problems(config: Config, family: Family, made: Sequence[DatasetPlan]) -> Iterator[Problem]:
    """Datasets that cannot be trained as image-to-video, and shall be."""
    enabled = [number for number, part in enumerate(config.data) if part.table.enabled]
    for number, dataset in zip(enabled, made, strict=True):
        if not dataset.image_to_video:
            continue
        where = config.where("data", number, "video", "image_to_video")
        share = f"image_to_video = {dataset.image_to_video:g}"
        if not isinstance(family, SupportsFrameLevels):
            what = f"{share}: this model family takes one noise level for a whole clip."
            yield Problem(where, what, "Remove it, or train a family that takes a level for each frame.")
        elif dataset.frames < two_latent_frames(family):
            what = (
                f"{share}: clips of {frames_text(dataset.frames)} are one latent frame, with nothing to make after it."
            )
            yield Problem(where, what, f"Set frames to {two_latent_frames(family)} or more, or remove it.")


def picture_problems(config: Config, family: Family, frames: int) -> Iterator[Problem]:
    """What of [validation.images] is wrong without a look into the files. frames: of the videos to generate."""
    table = config.validation
    if table is None or not table.images:
        return
    if not isinstance(family, SupportsFrameLevels):
        what = "images: this model family takes one noise level for a whole clip, so it cannot start from a picture."
        yield Problem(config.where("validation", "images"), what, "Remove it.")
    elif frames < two_latent_frames(family):
        what = f"images: a video of {frames_text(frames)} is one latent frame, with nothing to make after the picture."
        yield Problem(config.where("validation", "frames"), what, f"Set frames to {two_latent_frames(family)} or more.")
    elif not family.frame_rule.accepts(1) or len(family.pixel_frames(0)) > 1:
        stands = frames_text(len(family.pixel_frames(0)))
        what = f"images: the first latent frame of this model family stands for {stands}, not for a single picture."
        yield Problem(config.where("validation", "images"), what, "Remove it.")
    for nickname, file in table.images.items():
        where = config.where("validation", "images", nickname)
        if nickname not in table.prompts:
            remedy = did_you_mean(nickname, table.prompts) or f"There are {listed(table.prompts)}."
            yield Problem(where, f'images: no prompt has the nickname "{nickname}".', remedy)
        if not file.is_file():
            what = f"{file} is {'no file' if file.exists() else 'not there'}."
            yield Problem(where, what, "Relative paths start at the configuration file's folder.")


def two_latent_frames(family: Family) -> int:
    """Frames of the shortest clip of two latent frames."""
    return family.pixel_frames(1)[-1] + 1


def frames_text(frames: int) -> str:
    return f"{frames} frame{'s' if frames != 1 else ''}"
