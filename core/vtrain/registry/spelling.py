"""What is wrong with the names of a plugin's parts, as problems: members that are missing, and abilities that are misspelt, of
parts that are there, and of those whose source alone is."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from functools import cache
from importlib.machinery import PathFinder
from itertools import chain
from pathlib import Path

from vtrain.contract import DiffusersFamily, Problem, Registered
from vtrain.contract.abilities import ABILITIES, halves, lacking, members, misspelt, names_of
from vtrain.contract.specs import listed, origin
from vtrain.registry.blame import PartFault

_EMPTY_BASES = frozenset({"nn.Module", "torch.nn.Module", "Module", "object", "Protocol", "ABC"})


def faults(sort: str, part: object, whose: Registered, where: str) -> Iterator[Problem]:
    """Of a part that was built. sort: as in ABILITIES. where: what names it in the file."""
    return _problems(sort, type(part).__name__, names_of(part), f" of {origin(whose)}", where)


def declared_faults(sort: str, maker: Callable[..., object], whose: Registered, where: str) -> Iterator[Problem]:
    """Of what a function of a plugin gives, read from the source: nothing is imported for it, nothing called. Members that it lacks
    and that it must have are faults too.

    It is the class of its annotation, or, where that is a protocol of the contract's or torch's Module, the class that it makes
    in a `return`. Nothing where the source does not tell either, and of a class with bases from elsewhere.
    """
    if isinstance(maker, type):
        return _problems(sort, maker.__name__, names_of(maker), f" of {origin(whose)}", where)
    module = getattr(maker, "__module__", "")
    for name in (_given(getattr(maker, "__annotations__", {}).get("return")), *_made(module, maker)):
        if names := _names(module, name):
            return chain(
                _absent(sort, name, names, whose, where), _problems(sort, name, names, f" of {origin(whose)}", where)
            )
    return iter(())


def _absent(sort: str, name: str, names: Set[str], whose: Registered, where: str) -> Iterator[Problem]:
    """The public members that such a part must have, and a class of that name does not."""
    wanted = {each for each in members(ABILITIES[sort].must) if not each.startswith("_")}
    if missing := wanted - names:
        what = f"the {sort} {name} of {origin(whose)} lacks {listed(missing)}."
        yield Problem(where, what, "Report it to the plugin's author: it could not be used when it is loaded.")


_LOADED_BY = {
    "family": (("denoiser", "load_denoiser"), ("video codec", "open_video_codec")),
    "regularizer": (("loss module", "load"),),
}
"""Kind -> what its parts load later, by sort, and the method by which."""
_LOADED_BY_DIFFUSERS = (("denoiser", "denoiser_of"), ("video codec", "load_codec"))
"""Of a DiffusersFamily, whose loading methods are the contract's, and call these, which are the plugin's."""


def makers(kind: str, part: object) -> Iterator[tuple[str, Callable[..., object]]]:
    """(sort, method) of all that a built part loads later and whose abilities can be read before: see `declared_faults`."""
    methods = _LOADED_BY_DIFFUSERS if isinstance(part, DiffusersFamily) else _LOADED_BY.get(kind, ())
    for sort, method in methods:
        if callable(maker := getattr(part, method, None)):
            yield sort, maker


_MADE_BY = {
    "denoiser": ("family", "load_denoiser"),
    "video codec": ("family", "open_video_codec"),
    "text encoder": ("family", "open of a text encoder"),
    "feature encoder": ("regularizer", "open_feature_encoder"),
    "condition encoder": ("family", "open of a condition's encoder"),
    "loss module": ("regularizer", "load"),
    "data backend": ("data_backend", "build"),
}
"""Sort -> the kind of part that gives it, and the function by which; other sorts are kinds, which `build` gives."""


def check_members(sort: str, part: object, name: str = "", where: str = "") -> None:
    """That a part is one. name: of the registered part that gives it, "" if it is the only one of its kind in the run.

    where: what names it in the file. Raises PartFault, with the members that it lacks.
    """
    kind, maker = _MADE_BY.get(sort, (sort, "build"))
    if fault := lacking(sort, part):
        raise PartFault(kind, name, f"its {maker} gave {fault}", where=where)


def check_part(sort: str, part: object, name: str = "") -> None:
    """That a part which is there only when it is used is one, with abilities that are spelt right. Raises PartFault."""
    check_members(sort, part, name)
    if found := list(_problems(sort, type(part).__name__, names_of(part), "", "")):
        raise PartFault(_MADE_BY[sort][0], name, (each.what for each in found), found[0].remedy)


def _problems(sort: str, name: str, names: Set[str], whose: str, where: str) -> Iterator[Problem]:
    meant = set[str]()
    for found in misspelt(sort, names):
        meant.add(found.meant)
        what = f'the {sort} {name}{whose} has "{found.name}", which nothing asks for, and no "{found.meant}" ({found.ability}).'
        yield Problem(
            where, what, f'The author of the plugin should rename it; what is its own may be "_{found.name}".'
        )
    for ability, there, missing in halves(sort, names):
        if not missing <= meant:
            what = f"the {sort} {name}{whose} has {listed(there)} and no {listed(missing)}: it is no {ability}."
            yield Problem(
                where, what, "The author of the plugin should give it the rest, or name its own members otherwise."
            )


def _given(annotation: object) -> str:
    """ "ToyCodec" of "Iterator[ToyCodec]"; "" of what is no name."""
    if not isinstance(annotation, str):
        return annotation.__name__ if isinstance(annotation, type) else ""
    try:
        node: ast.expr = ast.parse(annotation, mode="eval").body
    except SyntaxError:
        return ""
    while isinstance(node, ast.Subscript):
        node = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice
    return node.id if isinstance(node, ast.Name) else ""


def _made(module: str, maker: Callable[..., object]) -> Iterator[str]:
    """ "ToyLoss" of a function with `return ToyLoss(...)`."""
    source = _source(module)
    body: Sequence[ast.stmt] = source[0].body if source is not None else ()
    for part in getattr(maker, "__qualname__", "").split("."):
        named = (node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part)
        body = next((node.body for node in named), ())
    for node in _statements(body):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
            yield node.value.func.id


def _names(module: str, name: str, depth: int = 0) -> set[str] | None:
    """Public names of the class that a module knows as `name`; None if its source does not tell them all."""
    if module.partition(".")[0] == "vtrain":  # the contract is imported already
        known = getattr(sys.modules.get(module), name, None)
        # A protocol says what a part must have, and not what this one has.
        return names_of(known) if isinstance(known, type) and not getattr(known, "_is_protocol", False) else None
    source = _source(module)
    if source is None or not name or depth > 8:
        return None
    tree, lines = source
    for node in _statements(tree.body):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _members(module, node, lines, depth)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                of = _absolute(module, node)
                # Of the same plugin, and of the contract, whose classes a part may extend: other sources are not its author's.
                own = of.partition(".")[0] in (module.partition(".")[0], "vtrain")
                if own and (alias.asname or alias.name) == name:
                    return _names(of, alias.name, depth + 1)
    return None


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """All of them, also those inside of others; expressions, most of a tree, are not looked at."""
    for node in body:
        yield node
        yield from _statements(getattr(node, "body", ()))
        yield from _statements(getattr(node, "orelse", ()))


_ASSIGNED = re.compile(r"^\s*\(?((?:self\.\w+,?\s*)+)\)?(?::[^=]+)?=(?!=)")
"""What a line assigns to members: "self.a", "self.a: int", "self.a, self.b"."""


def _set_on_self(line: str) -> list[str]:
    found = _ASSIGNED.match(line)
    return re.findall(r"self\.(\w+)", found[1]) if found else []


def _members(module: str, node: ast.ClassDef, lines: Sequence[str], depth: int) -> set[str] | None:
    names: set[str] = set()
    for base in node.bases:
        text = ast.unparse(base)
        inherited = set[str]() if text in _EMPTY_BASES else _names(module, text, depth + 1)
        if inherited is None:
            return None
        names |= inherited
    for each in node.body:
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            if each.name == "__getattr__":
                return None
            names.add(each.name)
            names |= {name for line in lines[each.lineno : each.end_lineno] for name in _set_on_self(line)}
        elif isinstance(each, ast.Assign | ast.AnnAssign):
            targets = each.targets if isinstance(each, ast.Assign) else [each.target]
            flat = [each for target in targets for each in (target.elts if isinstance(target, ast.Tuple) else [target])]
            names |= {target.id for target in flat if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    loaded = sys.modules.get(module)
    is_package = loaded is not None and hasattr(loaded, "__path__")
    parts = module.split(".")
    package = parts[: len(parts) - node.level + is_package]
    return ".".join([*package, *([node.module] if node.module else [])])


@cache
def _source(module: str) -> tuple[ast.Module, Sequence[str]] | None:
    """The source of a module, parsed and by lines; it is not imported for it. None if it is not found as a file."""
    path = None
    origin_of = getattr(sys.modules.get(module), "__file__", None)
    if origin_of is None:
        parts = module.split(".")
        for number in range(len(parts)):
            name = ".".join(parts[: number + 1])
            loaded = getattr(sys.modules.get(name), "__path__", None)
            spec = None if loaded is not None else PathFinder.find_spec(name, path)
            if loaded is None and spec is None:
                return None
            path = list(loaded) if loaded is not None else list((spec and spec.submodule_search_locations) or ())
            origin_of = spec.origin if spec is not None else None
    try:
        text = Path(str(origin_of)).read_text(encoding="utf-8")
        return ast.parse(text), text.splitlines()
    except (OSError, SyntaxError, ValueError):
        return None
