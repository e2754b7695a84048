"""A new plugin: its names checked, every template filled in, and all of it written or nothing.

A template is a file with the ending .tmpl. `$name` in it is replaced, as string.Template does; the folder MODULE gets the
module's name, and "dot_" in front of a name is a dot.
"""

from __future__ import annotations

import ast
import keyword
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from string import Template

from vtrain import __version__
from vtrain.contract import ENTRY_POINT_GROUP, Catalog, ConfigError, Problem
from vtrain.contract.specs import NOUNS, origin, with_article

TEMPLATES = Path(__file__).parent / "templates"
LONGEST = 32
"""Letters of a name: with a longer one, lines of the templates would be too long."""

SUMMARIES: Mapping[str, str] = {
    "family": "a small video transformer with random weights, to begin with",
    "sampler": "rectified flow with levels that are a power of uniform ones",
    "regularizer": "neighbouring latent frames should look alike to one block",
    "data_backend": "the files of a folder",
    "optimizer": "stochastic gradient descent with momentum",
    "tracker": "losses as rows of a CSV file",
}
"""Kind -> what the template of it is."""

_WITH_TORCH = frozenset({"family", "optimizer", "regularizer", "sampler"})


@dataclass(frozen=True)
class Names:
    """What a new plugin is called. distribution: "vtrain-motion"; module: "vtrain_motion"; part: "motion"."""

    distribution: str
    module: str
    part: str

    @classmethod
    def of(cls, name: str) -> Names:
        """Of the distribution's name; a "vtrain-" in front is not the part's."""
        part = re.sub(r"[-_.]+", "-", name).lower()
        return cls(name, part.replace("-", "_"), part.removeprefix("vtrain-"))

    @property
    def class_name(self) -> str:
        return "".join(word.capitalize() for word in self.part.split("-"))

    def problems(self, kind: str) -> Iterator[Problem]:
        """Why no plugin with a part of that kind can be called so."""
        name = self.distribution
        such = 'Such as "vtrain-motion".'
        if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
            what = f'"{name}" is no name of a distribution: letters, digits, ".", "-" and "_", a letter first.'
            yield Problem("", what, such)
            return
        if len(name) > LONGEST:
            yield Problem("", f'"{name}" has {len(name)} letters; {LONGEST} are the most.', such)
        if not self.class_name.isidentifier():
            yield Problem("", f"its class would be called {self.class_name}, which Python takes for no name.", such)
        elif keyword.iskeyword(self.module) or keyword.iskeyword(self.class_name):
            yield Problem("", f'"{name}" is a word of Python: no module can be called so.', such)
        elif self.module in sys.stdlib_module_names or self.module == "tests":
            yield Problem("", f'the module "{self.module}" would hide one that is there.', such)
        if self.class_name in _used(kind):
            what = f"its class would be called {self.class_name}, which its own module uses for something else."
            yield Problem("", what, such)


def _used(kind: str) -> set[str]:
    """Every name in the file of a new package that defines its class, which would hide it."""
    neutral = Names.of("vtrain-neutral")
    found: set[str] = set()
    for path, text in rendered(neutral, kind):
        if path.suffix == ".py" and f"class {neutral.class_name}" in text:
            found.update(*map(_names_in, ast.walk(ast.parse(text))))
    return found - {neutral.class_name}


def _names_in(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    return {node.id} if isinstance(node, ast.Name) else set()


def new_plugin(name: str, kind: str, folder: Path, catalog: Catalog) -> Path:
    """Write a package into `folder`/`name`, which this gives. kind: as specs name it.

    catalog: of what is installed, whose names are taken. Raises ConfigError with all that is wrong; nothing is written then.
    """
    names, place = Names.of(name), folder / name
    problems = list(names.problems(kind)) or list(_taken(names, kind, catalog))
    if place.exists() or place.is_symlink():
        problems.append(
            Problem(str(place), "this is there already.", "Take another name or --directory; nothing is overwritten.")
        )
    if not folder.is_dir():
        problems.append(Problem(str(folder), "there is no such folder.", "Make it first, or take another --directory."))
    if problems:
        raise ConfigError(problems)
    files = dict(rendered(names, kind))
    try:
        place.mkdir()
        try:
            _write(place, files)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    except OSError as error:
        raise ConfigError(Problem(str(error.filename or place), f"it cannot be written: {error.strerror}.")) from error
    return place


def _write(place: Path, files: Mapping[Path, str]) -> None:
    for path, text in files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text, encoding="utf-8")


def _taken(names: Names, kind: str, catalog: Catalog) -> Iterator[Problem]:
    if find_spec(names.module) is not None:
        yield Problem("", f'a module "{names.module}" is installed already.', "Take another name.")
    found = catalog.find(kind, names.part)
    if found is not None:
        what = f'{origin(found)} has {with_article(NOUNS[kind][0])} called "{names.part}".'
        yield Problem("", what, "Take another name: neither could be used.")


def rendered(names: Names, kind: str) -> Iterator[tuple[Path, str]]:
    """(path in the package, text) of every file."""
    values = {
        "distribution": names.distribution,
        "module": names.module,
        "part": names.part,
        "Name": names.class_name,
        "a_noun": with_article(NOUNS[kind][0]).capitalize(),
        "summary": SUMMARIES[kind],
        "group": ENTRY_POINT_GROUP,
        "dependencies": ", ".join(f'"{line}"' for line in _dependencies(kind)),
    }
    for key, name in {"table": "table.toml.tmpl", "files": "files.md.tmpl"}.items():
        values[key] = _filled(TEMPLATES / kind / name, values).rstrip()
    for folder in (TEMPLATES / "common", TEMPLATES / kind):
        for file in sorted(folder.rglob("*.tmpl")):
            path = file.relative_to(folder)
            if len(path.parts) > 1 or folder.name == "common":
                yield _renamed(path, names.module), _filled(file, values)


def _filled(file: Path, values: Mapping[str, str]) -> str:
    return Template(file.read_text(encoding="utf-8")).substitute(values)


def _renamed(path: Path, module: str) -> Path:
    parts = (module if each == "MODULE" else re.sub(r"^dot_", ".", each) for each in path.parts)
    return Path(*parts).with_suffix("")


def _dependencies(kind: str) -> tuple[str, ...]:
    """What the package imports. Of vtrain the versions that have this contract: the next minor one may have another."""
    major, minor = __version__.split(".")[:2]
    heavy = (*(("safetensors>=0.5",) if kind == "family" else ()), *(("torch>=2.9",) if kind in _WITH_TORCH else ()))
    light = () if kind == "data_backend" else ("pydantic>=2.11,<3",)
    return (*light, *heavy, f"vtrain>={major}.{minor},<{major}.{int(minor) + 1}")
