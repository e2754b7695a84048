"""Models in the layout of diffusers: where one is, whether it is whole, and what its configs say.

    folder/model_index.json              the class of each component
    folder/<component>/config.json       scheduler_config.json, tokenizer_config.json ... for those without weights
    folder/<component>/<stem>.safetensors

For families and regularizers whose models are on disk or on the hub. Nothing here imports torch or diffusers, not even when it
is called: a plan needs all of it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vtrain.contract.errors import ModelError, PluginError, Problem
from vtrain.contract.protocols import HashFile
from vtrain.contract.weights import weight_files, weight_problems

DIFFUSERS_STEM = "diffusion_pytorch_model"
"""What diffusers calls the weight files of a model, before ".safetensors"."""

TRANSFORMERS_STEM = "model"
"""What transformers calls them."""

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model")
"""Files that hold a tokenizer's vocabulary. Where several are there, the first is the one that is read."""

_BESIDE_VOCABULARY = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What shapes tokens beside the vocabulary, where it exists."""

_SILENT = ("transformers_version", "torch_dtype", "dtype", "architectures")
"""Keys of a config that say nothing about the model; those that start with "_" do not either."""

JsonObject = Mapping[str, object]
PartT = TypeVar("PartT", bound="PartConfig")

Positive = Annotated[int, Field(ge=1)]
"""A number of a config that is 1 or more."""


@dataclass(frozen=True)
class Component:
    """What a family asks of one component. Its name is that of its folder and of its entry in model_index.json.

    classes: names of the classes that will do; none: any will, for the family looks itself. stem: of its weight files; "":
    it has none. config: its config. one_of: files of which at least one is there (`VOCABULARIES`). optional: a model need not
    list it, and then it need not be there.
    """

    classes: tuple[str, ...] = ()
    stem: str = ""
    config: str = "config.json"
    one_of: tuple[str, ...] = ()
    optional: bool = False


class PartConfig(BaseModel):
    """Base of a typed config.json. Keys that it does not name are the class's own business."""

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class CheckpointSource:
    """Where a model is. name: an absolute folder, or a hub id. revision: of a hub id. components: by name, "" for a model that
    is one component alone."""

    def __init__(
        self, name: str, revision: str | None = None, components: Mapping[str, Component] | None = None
    ) -> None:
        self.name = name
        self.revision = revision
        self.components = components or {}

    @property
    def on_hub(self) -> bool:
        return not Path(self.name).is_absolute()

    @cached_property
    def folder(self) -> Path:
        """The folder with at least the configs, from the hub's local cache if it has them. Raises ModelError."""
        if not self.on_hub:
            if not Path(self.name).is_dir():
                raise ModelError(Problem(self.name, "there is no such model folder.", "Correct [model] path."))
            return Path(self.name)
        tokenizers = tuple(f"{name}/*" for name, component in self.components.items() if component.one_of)
        patterns = ("*.json", "*/*.json", *tokenizers)
        # The cache first: a hub that cannot be reached is waited for, about 28 s.
        cached = self._snapshot(patterns, self.revision, offline=True)
        if cached is not None and self._has_configs(cached):
            return cached
        return self._download(patterns, self.revision)

    def place(self, name: str) -> Path:
        """The folder of a component with at least its config: a sub-folder, or all of it if the model is that component alone.

        Raises ModelError.
        """
        alone = (self.folder / "config.json").is_file() and not (self.folder / name).exists()
        return self.folder if alone else self.folder / name

    def part(self, name: str) -> Path:
        """`place` with all its files, fetched from the hub if the cache lacks some. Raises ModelError."""
        folder, stem = self.place(name), self.components[name].stem
        if self.on_hub and stem and self.incomplete(folder, stem):
            inside = "" if folder == self.folder else f"{name}/"
            # The commit of the configs, so that a branch that has moved on since does not mix two models.
            self._download((f"{inside}*.json", f"{inside}*.safetensors"), self.folder.name)
            if self.incomplete(folder, stem):  # without a connection the hub's client takes what there is
                what = f"weights of {name}" if name else "its weights"
                raise ModelError(self._unreachable(f"{what} are missing in the cache"))
        return folder

    @staticmethod
    def incomplete(folder: Path, stem: str) -> bool:
        """Whether a weight file is missing."""
        try:
            return bool(weight_files(folder, stem).missing)
        except ValueError:
            return True

    def may_fetch(self) -> bool:
        """Whether files that are missing now can still come from the hub."""
        if not self.on_hub:
            return False
        from huggingface_hub import constants

        return not constants.HF_HUB_OFFLINE

    def describe(self) -> str:
        """The name, and which commit of it."""
        return f"{self.name} (commit {self.folder.name})" if self.on_hub else self.name

    def _has_configs(self, folder: Path) -> bool:
        if not (folder / "model_index.json").exists():
            return (folder / "config.json").is_file()
        needed = {name: part for name, part in self.components.items() if not part.optional or _listed(folder, name)}
        return all(
            (folder / name / part.config).is_file()
            and (not part.one_of or any((folder / name / file).is_file() for file in part.one_of))
            for name, part in needed.items()
        )

    def _snapshot(self, patterns: tuple[str, ...], revision: str | None, *, offline: bool) -> Path | None:
        """The snapshot's folder; offline: what the cache has of it, complete or not, None if nothing."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(self.name, revision=revision, allow_patterns=list(patterns), local_files_only=offline)
            )
        except IncompleteSnapshotError as error:
            if not offline:
                raise
            return Path(error.snapshot_path)
        except LocalEntryNotFoundError:
            if not offline:
                raise
            return None

    def _download(self, patterns: tuple[str, ...], revision: str | None) -> Path:
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's, as this hub version has it

        try:
            found = self._snapshot(patterns, revision, offline=False)
        except (OSError, ValueError, HTTPError) as error:
            raise ModelError(self._unreachable(str(error))) from error
        if found is None:
            raise AssertionError("an online snapshot is a folder or an error")
        return found

    def _unreachable(self, why: str) -> Problem:
        revision = f" --revision {self.revision}" if self.revision else ""
        endpoint = os.environ.get("HF_ENDPOINT")
        return Problem(
            self.name,
            f"this is no folder here, and it cannot be had from the hub{f' at {endpoint}' if endpoint else ''}: "
            f"{why.strip().splitlines()[0]}",
            f"Correct [model] path, or, where there is a connection: hf download {self.name}{revision}",
        )


def check_components(source: CheckpointSource, title: str, *own: Callable[[Path], Iterable[Problem]]) -> list[Problem]:
    """Every problem of a checkpoint, each once: its index, configs, tokenizers and weight files, without loading any.

    title: what is asked for, such as "SANA-Video". own: what the family looks at itself, in `source.folder`; each may raise
    ModelError, whose problems are reported with the others.
    """
    problems: list[Problem] = []
    if source.revision and not source.on_hub:
        problems.append(Problem(source.name, "revision is for hub ids, and this is a folder.", "Remove revision."))
    try:
        folder = source.folder
    except ModelError as error:
        return [*problems, *error.problems]

    for check in (lambda _: _unlisted(source, title), lambda _: _parts(source), *own):
        try:
            problems += list(check(folder))
        except ModelError as error:
            problems += error.problems
    return list(dict.fromkeys(problems))


def component_weights(source: CheckpointSource, folder: Path, stem: str) -> list[Problem]:
    """What is wrong with the weight files of a component in `folder`, broken and missing ones."""
    if not folder.is_dir():
        return [Problem(str(folder), "this folder is missing.", "Is the model complete, and in diffusers layout?")]
    problems = weight_problems(folder, stem, may_be_fetched=source.may_fetch())
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if problems and pickled:  # beside sound safetensors they are not read, and do no harm
        what = f"the weights are pickled ({pickled[0]}), and pickles are not read."
        return [Problem(str(folder), what, "Convert them to safetensors.")]
    return problems


def _unlisted(source: CheckpointSource, title: str) -> list[Problem]:
    """Components that model_index.json does not have, or has of another class."""
    path = source.folder / "model_index.json"
    index = read_json(path)
    problems = []
    for name, component in source.components.items():
        found = _entry(index, name)
        if component.classes and found not in component.classes and (found or not component.optional):
            wanted = " or ".join(component.classes)
            what = f"{name} is {f'a {found}' if found else 'not listed'}, and this family works with {wanted}."
            problems.append(Problem(str(path), what, f"Name a {title} checkpoint in [model] path."))
    return problems


def _parts(source: CheckpointSource) -> list[Problem]:
    """What is wrong with the files of each component."""
    problems: list[Problem] = []
    for name, component in source.components.items():
        folder = source.folder / name
        if component.optional and not _listed(source.folder, name):
            continue
        if component.stem:
            problems += component_weights(source, folder, component.stem)
        if component.one_of and not any((folder / file).is_file() for file in component.one_of):
            what = f"neither {' nor '.join(component.one_of)} is here."
            problems.append(Problem(str(folder), what, "Download one."))
        try:
            read_json(folder / component.config)
        except ModelError as error:
            problems += error.problems
    return problems


def _entry(index: JsonObject, name: str) -> str | None:
    """The class of a component in model_index.json, or None: not listed, or listed as none."""
    entry = index.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _listed(folder: Path, name: str) -> bool:
    """Whether a model_index.json that can be read lists it."""
    try:
        return _entry(read_json(folder / "model_index.json"), name) is not None
    except ModelError:
        return False


def read_json(path: Path) -> JsonObject:
    """A JSON object. Raises ModelError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(Problem(str(path), "this file is missing.", "Is the folder in diffusers layout?")) from error
    except (OSError, ValueError) as error:
        raise ModelError(Problem(str(path), f"this file cannot be read: {error}.", "Download it again.")) from error
    if not isinstance(content, dict):
        raise ModelError(Problem(str(path), "this file holds no JSON object.", "Download it again."))
    return content


def read_config(
    kind: type[PartT], path: Path, defaults: JsonObject | None = None, remedy: str = "This family cannot use that."
) -> PartT:
    """A config.json as a typed record. defaults: of keys that it may leave out, as its class would take them.

    Raises ModelError with a problem for each key that is missing or odd; remedy: what to do about it.
    """
    try:
        return kind.model_validate({**(defaults or {}), **read_json(path)})
    except ValidationError as error:
        raise ModelError(
            Problem(str(path), f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}.", remedy)
            for entry in error.errors(include_url=False)
        ) from error


def meaning(config: JsonObject, defaults: JsonObject | None = None) -> dict[str, object]:
    """A config without what says nothing about the model: who wrote it, from where, in which storage type.

    defaults: of its class, so that a config that spells one out means the same.
    """
    said = {key: value for key, value in config.items() if not key.startswith("_") and key not in _SILENT}
    return {**(defaults or {}), **said}


def digest(*parts: object) -> str:
    """A fingerprint of what JSON can hold, the same whatever the order of keys: 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_hashes(folder: Path, hash_file: HashFile) -> dict[str, str]:
    """Name -> content hash of the files that shape tokens: the vocabulary that is read, and its settings."""
    vocabulary = next((name for name in VOCABULARIES if (folder / name).is_file()), VOCABULARIES[0])
    names = [vocabulary, *(name for name in _BESIDE_VOCABULARY if (folder / name).is_file())]
    return {name: hash_file(folder / name) for name in names}


def default_arguments(package: str, file: str, owner: str, function: str = "__init__") -> dict[str, object]:
    """The defaults of a method's arguments that are literals, by name, as the installed `package` has them in its source.

    It is read, not imported: importing diffusers costs seconds and brings torch. file: below the package's folder; owner: the
    class. Raises PluginError if the installed version has no such method.
    """
    spec = find_spec(package)
    path = Path(spec.origin).parent / file if spec is not None and spec.origin is not None else None
    remedy = f"Install the version of {package} that the plugin asks for."
    if path is None or not path.is_file():
        raise PluginError(Problem(package, f"the installed {package} has no {file}.", remedy))
    found = _defaults(path, path.stat().st_mtime_ns, owner, function)
    if found is None:
        raise PluginError(Problem(package, f"{path} has no {owner}.{function}.", remedy))
    return dict(found)


@lru_cache(maxsize=32)
def _defaults(path: Path, changed: int, owner: str, function: str) -> Mapping[str, object] | None:
    """changed: when the file was."""
    found = _signature(path.read_text(encoding="utf-8"), owner, function)
    if found is None:
        return None
    named = found.args.posonlyargs + found.args.args
    pairs = [*zip(named[len(named) - len(found.args.defaults) :], found.args.defaults, strict=True)]
    pairs += [(name, value) for name, value in zip(found.args.kwonlyargs, found.args.kw_defaults, strict=True) if value]
    return {name.arg: ast.literal_eval(value) for name, value in pairs if _is_literal(value)}


def _signature(text: str, owner: str, function: str) -> ast.FunctionDef | None:
    """The method without its body: only these lines are parsed, for a whole file takes a hundred times as long."""
    # A bracket that closes at the start of a line would end the class for this expression.
    body = re.search(rf"^class {owner}\b.*?(?=^\S|\Z)", text.replace("\n)", "\n )"), flags=re.MULTILINE | re.DOTALL)
    head = re.search(rf"^    def {function}\(", body[0], flags=re.MULTILINE) if body else None
    if body is None or head is None:
        return None
    for end in re.finditer(r":[ \t]*\n", body[0][head.start() :]):
        try:
            tree = ast.parse(textwrap.dedent(body[0][head.start() : head.start() + end.end()]) + "    pass\n")
        except SyntaxError:
            continue
        return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)
    return None


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except ValueError:
        return False
    return True
