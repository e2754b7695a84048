"""Training some steps of a run again, in a scratch folder, like any other run: nothing of the run or its cache is written to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli
import torch

from vtrain.contract import ConfigError, Logged, Problem, SourceRef, Stepped, SupportsLora
from vtrain.data.caching.caches import fill_caches
from vtrain.data.caching.inventory import Stores, wanted
from vtrain.data.decoding.spool import hashed
from vtrain.data.decoding.video import FileFault
from vtrain.data.index import CONTENTS, build
from vtrain.data.sample import Sample
from vtrain.data.scanning.ledger import Ledger
from vtrain.data.scanning.scan import Samples
from vtrain.plan.places import CHECKPOINTS
from vtrain.plan.records import Plan
from vtrain.plan.savings import SAVINGS
from vtrain.run.certificate import Finding
from vtrain.run.chain import Kept
from vtrain.run.compare import Compared, Rows
from vtrain.run.prepare import extra_texts, planned
from vtrain.run.session import Session
from vtrain.train.changes import SampleMarks, different, named
from vtrain.train.checkpoint import checkpoint_name
from vtrain.train.parameters import base_mark
from vtrain.train.processes import Processes
from vtrain.train.resume import RunState, encoder_marks, feature_marks, held_beside

OTHER = re.compile(
    r"run\.(resume|output_dir|name|processes)|(validation|tracker|checkpoint|memory|cache)\b.*|data\[\d+\]\.(on_bad_file|quarantine)"
)
"""Settings that change no number: the scratch run has others, and two starts of a run may have."""


SHORT = "by its configuration the run ends after step"


@dataclass(frozen=True)
class Leg:
    """Steps that are trained again, after `first` to `last`. start: the checkpoint they begin from, None for step 0. end: the one
    that they lead to, None behind the last. text: of the configuration. state: what that was resolved to."""

    start: Path | None
    first: int
    end: Kept | None
    last: int
    text: str
    state: RunState

    @property
    def words(self) -> str:
        steps = f"steps {self.first + 1} to {self.last}" if self.last > self.first + 1 else f"step {self.last}"
        return f"{steps} from {'step 0' if self.start is None else self.start.name}"


class Scratch:
    """A folder for it. base: where the paths in the run's configuration start. cache: of the run."""

    def __init__(self, folder: Path, base: Path, cache: Path) -> None:
        self.folder, self.base, self.cache = folder, base, cache
        self._own_cache = folder / "cache"

    def config(self, leg: Leg) -> Path:
        """The file of the scratch run of a leg. Raises ConfigError."""
        folder = self.folder / f"steps-{leg.first}-{leg.last}"
        folder.mkdir()
        try:
            changed = scratch_config(tomli.loads(leg.text), leg, folder / "output", self._own_cache)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(Problem("", f"its configuration cannot be read: {error}.")) from error
        file = folder / "config.toml"
        file.write_text(document(changed), encoding="utf-8")
        return file

    def plan(self, file: Path) -> Plan:
        """Raises ConfigError, ModelError, PluginError."""
        return planned(file, base=self.base)

    def data(self, plan: Plan, samples: Samples, then: SampleMarks, device: str) -> tuple[list[Finding], int, int]:
        """What of the samples is not what a checkpoint names, how many files were hashed, and how many captions there are.

        All files are hashed again. samples: of a scan that has looked at all of them. Raises DataError where none can be used.
        """
        files = self._hash(plan, samples)
        now = SampleMarks.of(build(samples, lambda sample: (), lambda sample: ()))
        captions = sum(len(sample.captions) for sample in samples)
        if odd := list(_data_findings(then, _as_far_as_known(then, now))):
            return odd, files, captions
        self._share(plan, samples)
        filled = fill_caches(plan, samples, extra_texts(plan), device)
        return list(_data_findings(then, SampleMarks.of(filled.index))), files, captions

    def _hash(self, plan: Plan, samples: Samples) -> int:
        """Write the hash of each file down in the scratch ledger, each read once."""
        seen: set[tuple[int, SourceRef]] = set()
        with Ledger(plan.config.cache.dir) as ledger:
            for sample in samples:
                for ref in (sample.ref, *([sample.mask.ref] if sample.mask is not None else [])):
                    if (sample.place, ref) not in seen:
                        seen.add((sample.place, ref))
                        _hash_file(plan, sample, ref, ledger)
        return len(seen)

    def _share(self, plan: Plan, samples: Samples) -> None:
        """Link those of the run's cache entries that are used: what is missing is made here, and nothing is written there."""
        stores = Stores(plan)
        for kind, entries in wanted(stores, samples, extra_texts(plan)).items():
            for key in (each.hex() for each in entries.keys):
                name = Path(kind, key[:2], f"{key}.safetensors")
                if (self.cache / name).is_file():
                    link = plan.config.cache.dir / name
                    link.parent.mkdir(parents=True, exist_ok=True)
                    with suppress(OSError):  # it is there, or this system lets nobody link: then it is made again
                        link.symlink_to(self.cache / name)

    def retrain(self, file: Path, leg: Leg, row: Callable[[int], Mapping[str, Any] | None], out: Compared) -> Path:
        """Train the leg again; its rows are compared as they come. Gives the checkpoint. Raises VtrainError."""
        rows, done = Rows(row, out), leg.first
        with threads(leg.state.machine.get("threads", "")), Session(file, base=self.base) as session:
            for event in session:
                if isinstance(event, Stepped):
                    done = event.step
                    if done == leg.last:
                        session.ask("stop")
                elif isinstance(event, Logged):
                    for each in event.steps:
                        rows.take(asdict(each))
        rows.end(leg.first, done)
        if done < leg.last:
            raise ConfigError(Problem("", f"{SHORT} {done}."))
        return file.parent / "output" / CHECKPOINTS / checkpoint_name(leg.last)


def scratch_config(tree: dict[str, Any], leg: Leg, output: Path, cache: Path) -> dict[str, Any]:
    """The run's configuration with another place, that saves at the end of the leg alone, shows nothing and moves no file."""
    tree["run"] = {
        **tree["run"],
        "processes": 1,
        "output_dir": str(output),
        "resume": "never" if leg.start is None else str(leg.start),
    }
    tree["cache"] = {**tree.get("cache", {}), "dir": str(cache)}
    tree["checkpoint"] = {"every": f"{leg.last} steps", "keep": "all"}
    tree["tracker"] = []
    tree.pop("validation", None)
    tree.get("ema", {}).pop("validation", None)
    for dataset in tree["data"]:
        dataset.pop("quarantine", None)
        dataset["on_bad_file"] = "skip"
    if tree.pop("memory", None) is not None:
        for table, key in {key for saving in SAVINGS for key in saving.keys}:
            value = leg.state.settings.get(f"{table}.{key}")
            if value is not None:
                tree.setdefault(table, {}).setdefault(key, value)
    count = leg.state.settings.get("processes")
    if isinstance(count, int) and count > 1:  # the same micro-batches in one process
        tree["train"]["accumulate"] = tree["train"].get("accumulate", 1) * count
    return tree


def document(tree: Mapping[str, Any]) -> str:
    """The text of a TOML file, a line for each key at its top."""
    return "".join(f"{_key(key)} = {_toml(value)}\n" for key, value in tree.items())


def _toml(value: object) -> str:
    """A value, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(key)} = {_toml(each)}' for key, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return _quoted(value)
    return repr(value) if isinstance(value, int | float) else str(value)


def _key(text: str) -> str:
    return text if re.fullmatch("[A-Za-z0-9_-]+", text) else _quoted(text)


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's, but for pairs of halves beyond the first plane, which stay letters here.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


@contextmanager
def threads(number: str) -> Iterator[None]:
    """As many of torch's threads as the run had: sums are split by them."""
    before = torch.get_num_threads()
    if number.isdecimal() and int(number):
        torch.set_num_threads(int(number))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Here:
    """What trains now. device: as torch names it. accelerated: whether it is a card. machine: as a checkpoint has it."""

    device: str
    accelerated: bool
    machine: Mapping[str, str]

    @classmethod
    def of(cls, plan: Plan) -> Here:
        """Raises DeviceError."""
        processes = Processes(plan.config.precision.mixed, plan.loaded)
        try:
            if plan.config.run.deterministic:
                processes.device.deterministic()  # before any work, as in a run
            return cls(str(processes.device), processes.device.accelerated, processes.machine)
        finally:
            processes.close()


def _hash_file(plan: Plan, sample: Sample, ref: SourceRef, ledger: Ledger) -> None:
    backend = plan.datasets[sample.place].backend
    # What cannot be read is not what was read.
    with suppress(OSError, FileFault), backend.open(ref) as stream, hashed(stream) as (content, _):
        ledger.record_hash(backend.location, ref, content)


def _as_far_as_known(then: SampleMarks, now: SampleMarks) -> SampleMarks:
    """Those of samples before their windows are encoded: which are whole, and what their masks give, shows then."""
    before = {name: number for number, name in enumerate(then.names)}
    kept = [number for number, name in enumerate(now.names) if name in before]
    contents = now.contents[kept].copy()
    for part in ("cut", "mask"):
        at = CONTENTS.index(part)
        contents[:, at] = then.contents[[before[now.names[number]] for number in kept], at]
    return SampleMarks([now.names[number] for number in kept], np.ascontiguousarray(contents))


def _data_findings(then: SampleMarks, now: SampleMarks) -> Iterator[Finding]:
    for what, found in different(then, now):
        if found:
            several = "sample" if len(found) == 1 else "samples"
            words = {"removed": "not there any more, or not to be read"}.get(what, what)
            yield Finding("data", f"{len(found)} {several} {words}: {named(found)}")


def weight_findings(plan: Plan, state: RunState) -> Iterator[Finding]:
    """What of the model beside the trained weights is not what it was. All files are hashed again. Raises ModelError, DataError."""
    now, words = {**encoder_marks(plan)}, held_beside(plan, state.encoders)
    for key, mark in state.encoders.items():
        if now.get(key) not in (None, mark):
            yield Finding("model", f"its {words.get(key, key)} is not the one that the run was trained with")
    for name, mark in feature_marks(plan).items():
        if state.features.get(name, mark) != mark:
            yield Finding(f"regularizer {name}", "its encoder is not the one that the run was trained with")
    if state.base:
        denoiser = plan.family.load_denoiser("cpu", plan.loaded)
        assert isinstance(denoiser, SupportsLora)
        if base_mark(denoiser.module) != state.base:
            yield Finding("model", "the weights under the adapter are not those that it was trained on")


def otherwise(state: RunState, here: Here, versions: Mapping[str, str]) -> list[str]:
    """Why bits may differ. versions: of the parts now."""
    then, now = state.machine, here.machine
    found = [] if then else ["an older vtrain did not say on which machine it trained"]
    found += [
        f"{key} was {then[key]}, and is {now[key]}"
        for key in ("torch", "device")
        if then.get(key, now[key]) != now[key]
    ]
    for part, version in versions.items():
        if state.versions.get(part, version) != version:
            found.append(f"{part} was {state.versions[part]}, and is {version}")
    count = state.settings.get("processes")
    if isinstance(count, int) and count > 1:
        found.append(f"{count} processes trained, and one does here")
    if here.accelerated and not state.settings.get("run.deterministic"):
        found.append("a card sums in another order each time without run.deterministic")
    return found


def same_training(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """Whether two starts of a run train in the same way."""
    kept = [{key: value for key, value in each.items() if not OTHER.fullmatch(key)} for each in (one, other)]
    return kept[0] == kept[1]


def bases(run: Path, state: RunState) -> list[Path]:
    """Folders in which the paths of the configuration may start: of a project that was moved, where it is now first."""
    was, output = state.folder, state.settings.get("run.output_dir")
    found = [Path(was)] if was else [run.parent]
    if was and isinstance(output, str) and run.resolve() != Path(output).resolve():
        found.insert(0, (run / os.path.relpath(was, output)).resolve())
    return [each for each in dict.fromkeys(found) if each.is_dir()]
