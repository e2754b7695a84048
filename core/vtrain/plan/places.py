"""Where a run writes and where it resumes from: names in its folders, and what is in the way there.

Looks at names and rights alone; what only a try tells, such as a full disk, is for the run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from vtrain.config.keys import KeyPath, key_text
from vtrain.config.record import Config
from vtrain.contract import Problem
from vtrain.plan.records import DatasetPlan

CHECKPOINTS, SAMPLES = "checkpoints", "samples"
CONFIG, PLAN, METRICS, EVENTS = "config.toml", "plan.json", "metrics.jsonl", "events.jsonl"
"""What a run leaves in its output folder: folders, and files."""

CACHED = ("text", "video", "mask", "features")
"""Folders of entries in the cache folder."""

CHECKPOINT = re.compile(r"step-(\d{6,})")
"""The name of a checkpoint's folder."""


def written_folders(config: Config) -> Iterator[tuple[KeyPath, Path]]:
    """Every folder that a run writes into, with the key that says where; those inside another one if they are there."""
    names = (CHECKPOINTS, SAMPLES) if config.validation is not None else (CHECKPOINTS,)
    roots: tuple[tuple[KeyPath, Path, tuple[str, ...]], ...] = (
        (("run", "output_dir"), config.run.output_dir, names),
        (("cache", "dir"), config.cache.dir, CACHED),
    )
    for key, root, inside in roots:
        yield key, root
        yield from ((key, root / name) for name in inside if os.path.lexists(root / name))
    if config.offload.disk is not None:
        yield ("offload", "disk"), config.offload.disk
    for number, part in enumerate(config.data):
        if part.table.enabled and part.table.on_bad_file == "move" and part.table.quarantine is not None:
            yield ("data", number, "quarantine"), part.table.quarantine


def output_problems(config: Config) -> list[Problem]:
    """Everything that the run will write can be written, as far as names and rights tell."""
    files = [config.run.output_dir / name for name in (CONFIG, PLAN, METRICS, EVENTS)]
    found = [(key, _unwritable(folder)) for key, folder in written_folders(config)]
    found += [(("run", "output_dir"), _unwritable_file(file)) for file in files]
    problems = []
    for key, fault in dict.fromkeys((key, fault) for key, fault in found if fault):
        remedy = f"Set {key_text(key)} to another folder, or make this one writable."
        problems.append(Problem(config.where(*key), fault, remedy))
    resume = config.run.resume
    if resume not in ("latest", "never") and not resume_path(config).is_dir():
        what = f'resume: no checkpoint folder "{resume}", neither in {_folder(config)} nor in {_checkpoints(config)}.'
        remedy = f'{checkpoints_there(config)} Or "latest", "never".'
        problems.append(Problem(config.where("run", "resume"), what, remedy))
    return problems


def _unwritable(folder: Path) -> str:
    """Why a folder cannot be made, or written into; "" if it can."""
    parent = folder
    # Not Path.exists, which raises for what lies in a folder that one may not enter; a link to nothing is there, too.
    while not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        what = "a link to nothing" if parent.is_symlink() and not parent.exists() else "a file"
        return f"{parent} is {what}" + (
            " where a folder has to be." if parent == folder else f", so {folder} cannot be made."
        )
    return _forbidden(parent, os.W_OK | os.X_OK)


def _unwritable_file(file: Path) -> str:
    """Why a file that is there cannot be written; "" if it can, or is not there."""
    if not os.path.lexists(file):
        return ""
    if file.exists() and not file.is_file():
        return f"{file} is no file, and the run writes one of that name."
    return _forbidden(file, os.W_OK) if file.exists() else f"{file} is a link to nothing."


def _forbidden(path: Path, rights: int) -> str:
    # By the effective ids, where the system can ask so: opening a file goes by these.
    if os.access(path, rights, effective_ids=os.access in os.supports_effective_ids):
        return ""
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return f"{path} lies on a read-only file system."
    return f"no permission to write {'in' if path.is_dir() else 'to'} {path}."


def among_clips(config: Config, made: tuple[DatasetPlan, ...]) -> list[Problem]:
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
    return config.run.output_dir / CHECKPOINTS


def checkpoints_there(config: Config, most: int = 6) -> str:
    """A sentence that names the run's newest checkpoints. most: of them that are named."""
    folder = _checkpoints(config)
    names = [path.name for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name)] if folder.is_dir() else []
    if not names:
        return f"There is none in {folder}."
    newest = sorted(names, key=lambda name: int(name.removeprefix("step-")))[-most:]
    more = f" and {len(names) - most} earlier" if len(names) > most else ""
    return f"In {folder} there are {', '.join(newest)}{more}."
