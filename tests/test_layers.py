"""The layers, held by the imports in the source: each imports only those to its left."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core" / "vtrain"
RANK = {
    "contract": 0,
    "config": 1,
    "registry": 1,
    "plan": 2,
    "data": 3,
    "estimate": 4,
    "train": 5,
    "validate": 5,
    "run": 6,
    "api": 7,
    "scaffold": 7,
    "cli": 8,
}
DATA_RANK = {"decoding": 1, "scanning": 2, "caching": 3}
"""Of the packages in data/: bytes to pixels, files to the ledger, pixels to artifacts."""
DATA_BELOW = {"draws", "index", "locks", "sample", "seeds"}
"""Modules of data/ that all of them may use. The others (batches, frames, order) are for training, above them all."""
SHIPPED = {"testing"}  # for plugin authors: may use the contract, and nothing in core imports it
FAMILIES = {"sanavideo", "sana", "wan", "gemma"}
FOREIGN = {"diffusers", "transformers"}
FOREIGN_HOME = CORE / "contract" / "loading.py"
"""The one module of core that may import these, in bodies alone: the helpers that plugins give their classes to."""


def imports(source: str, *, module_level: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every absolute import; module_level: only those that run when the module is imported."""
    tree = ast.parse(source)
    nodes: Iterator[ast.AST] = _at_import(tree) if module_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield node.lineno, str(node.module)
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that run at import: not function bodies, not `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from _at_import(child)


def layer_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "vtrain" and len(parts) > 1 else ""


def layer_faults(layer: str, source: str) -> list[str]:
    """Imports in a module of `layer` that the order of the layers forbids."""
    faults = []
    for line, name in imports(source):
        other = layer_of(name)
        if not other or other == layer or other == "__version__":
            continue
        if (
            other in SHIPPED
            or (layer in RANK and RANK.get(other, 99) >= RANK[layer])
            or (layer in SHIPPED and other != "contract")
        ):
            faults.append(f"{line}: {layer} imports {name}")
    return faults


def data_faults(package: str, source: str) -> list[str]:
    """Imports in a module of data/ that go up: decoding < scanning < caching < batches and their order.

    package: "decoding", or the name of a module that lies in data/ itself.
    """
    own = 0 if package in DATA_BELOW else DATA_RANK.get(package, 4)
    faults = []
    for line, name in imports(source):
        parts = name.split(".")
        if parts[:2] == ["vtrain", "data"] and len(parts) > 2 and parts[2] != package:
            other = 0 if parts[2] in DATA_BELOW else DATA_RANK.get(parts[2], 4)
            if other > own:
                faults.append(f"{line}: {package} imports {name}")
    return faults


def cache_faults(source: str) -> list[str]:
    """Calls that write an entry of a cache: `stores.video.write(...)`, `column.entries.write(...)`."""
    kinds = {"text", "video", "mask", "feature", "entries"}
    return [
        f"{node.lineno}: {node.func.value.attr}.write"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "write"
        and isinstance(node.func.value, ast.Attribute)
        and node.func.value.attr in kinds
    ]


def plugin_faults(package: str, source: str) -> list[str]:
    """Imports of ours in a plugin that are neither the contract nor its own."""
    return [
        f"{line}: {package} imports {name}"
        for line, name in imports(source)
        if name.split(".")[0] in ("vtrain", "vtrain_builtin", "vtrain_sanavideo", "vtrain_wan")
        and name.split(".")[0] != package
        and name.split(".")[:2] != ["vtrain", "contract"]
        and name != "vtrain"
    ] + [
        f"{line}: {package} imports vtrain itself"
        for line, name in imports(source)
        if name == "vtrain" and _bare(source, line)
    ]


def _bare(source: str, line: int) -> bool:
    """Whether the line is `import vtrain` or takes something other than the contract from it."""
    return "import contract" not in source.splitlines()[line - 1]


def foreign_faults(source: str, *, module_level: bool = False) -> list[str]:
    found = imports(source, module_level=module_level)
    return [f"{line}: {name}" for line, name in found if name.split(".")[0] in FOREIGN]


def family_faults(source: str) -> list[str]:
    """Names and texts in code, docstrings apart, that are a family's."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    faults = []
    for node in ast.walk(tree):
        words: list[str] = []
        if isinstance(node, ast.Name):
            words = [node.id]
        elif isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.alias):
            words = [node.name]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            words = [node.value]
        for text in words:
            said = set("".join(char if char.isalnum() else " " for char in text.lower()).split())
            faults += (
                [f"{getattr(node, 'lineno', 0)}: {text}"] if said & FAMILIES or "sanavideo" in text.lower() else []
            )
    return faults


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "tests" not in path.relative_to(folder).parts)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_look_at() -> None:
    assert len(modules(CORE)) > 20
    assert {path.name for path in CORE.iterdir() if path.is_dir() and any(path.glob("*.py"))} <= {*RANK, *SHIPPED}


@pytest.mark.parametrize("path", modules(CORE), ids=relative)
def test_a_module_of_core_imports_only_layers_to_its_left(path: Path) -> None:
    inside = path.relative_to(CORE).parts
    if inside == ("__init__.py",):
        assert [name for _, name in imports(path.read_text()) if layer_of(name)] == [], (
            "the package itself imports no layer"
        )
    else:
        assert layer_faults(inside[0].removesuffix(".py"), path.read_text()) == []


@pytest.mark.parametrize("path", modules(CORE / "data"), ids=relative)
def test_data_flows_from_decoding_over_scanning_to_caching(path: Path) -> None:
    package = path.relative_to(CORE / "data").parts[0].removesuffix(".py")
    assert data_faults(package, path.read_text()) == []


def test_nothing_but_caching_fills_a_cache() -> None:
    writing = {relative(path) for path in modules(CORE) if cache_faults(path.read_text())}
    assert writing
    assert {Path(name).parts[2:4] for name in writing} == {("data", "caching")}


@pytest.mark.parametrize("path", modules(CORE), ids=relative)
def test_core_imports_neither_diffusers_nor_transformers_and_names_no_family(path: Path) -> None:
    source = path.read_text()
    assert foreign_faults(source, module_level=path == FOREIGN_HOME) == []
    if path.relative_to(CORE).parts[0] not in SHIPPED:
        assert family_faults(source) == []


@pytest.mark.parametrize("path", modules(CORE / "contract"), ids=relative)
def test_the_contract_imports_no_torch_when_it_is_imported(path: Path) -> None:
    heavy = {"torch", "numpy", "accelerate", "peft", "av", *FOREIGN}
    assert [name for _, name in imports(path.read_text(), module_level=True) if name.split(".")[0] in heavy] == []


@pytest.mark.parametrize(
    ("package", "folder"),
    [
        ("vtrain_builtin", ROOT / "plugins" / "vtrain_builtin"),
        ("vtrain_sanavideo", ROOT / "sanavideo_plugin" / "vtrain_sanavideo"),
        ("vtrain_wan", ROOT / "wan_plugin" / "vtrain_wan"),
    ],
)
def test_a_plugin_imports_the_contract_and_nothing_else_of_ours(package: str, folder: Path) -> None:
    found = modules(folder)
    assert found
    assert {relative(path): faults for path in found if (faults := plugin_faults(package, path.read_text()))} == {}


PLANTED = [
    ("config", "from vtrain.registry import discover"),
    ("registry", "import vtrain.config.load"),
    ("contract", "def f():\n    from vtrain.plan.records import Plan"),
    ("plan", "from vtrain.data.scanning.ledger import Ledger"),
    ("data", "from vtrain import train"),
    ("train", "import vtrain.validate"),
    ("validate", "from vtrain.train.step import step"),
    ("train", "from vtrain.cli.app import main"),
    ("cli", "import vtrain.testing"),
    ("testing", "from vtrain.registry import discover"),
]


@pytest.mark.parametrize(("layer", "source"), PLANTED)
def test_a_planted_import_to_the_right_is_caught(layer: str, source: str) -> None:
    assert layer_faults(layer, source)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("decoding", "from vtrain.data.scanning.ledger import Ledger"),
        ("scanning", "from vtrain.data.caching import keys"),
        ("caching", "import vtrain.data.batches"),
        ("sample", "from vtrain.data.decoding.video import FileFault"),
    ],
)
def test_a_planted_import_up_in_data_is_caught(package: str, source: str) -> None:
    assert data_faults(package, source)
    assert data_faults("caching", "from vtrain.data.scanning.ledger import Ledger") == []


def test_a_planted_write_to_a_cache_is_caught() -> None:
    assert cache_faults("def f(stores):\n    stores.video.write(key, parts)")
    assert cache_faults("file.write('text')") == []


@pytest.mark.parametrize(
    "source", ["from vtrain.contract import Plan", "import torch", "from vtrain import __version__"]
)
def test_an_allowed_import_is_not_caught(source: str) -> None:
    assert layer_faults("plan", source) == []


@pytest.mark.parametrize(
    "source",
    ["from vtrain.config import load", "import vtrain", "from vtrain import plan", "import vtrain_sanavideo.flow"],
)
def test_a_planted_import_in_a_plugin_is_caught(source: str) -> None:
    assert plugin_faults("vtrain_builtin", source)


@pytest.mark.parametrize(
    "source", ["from vtrain.contract import Options", "from vtrain import contract", "import vtrain_builtin.flow"]
)
def test_a_plugins_allowed_import_is_not_caught(source: str) -> None:
    assert plugin_faults("vtrain_builtin", source) == []


@pytest.mark.parametrize(
    "source",
    ["x = 'sanavideo'", "def wan_codec(): pass", "use_sanavideo = 1", "x.sana", "'''Doc.'''\nx = 'a Sana model'"],
)
def test_a_planted_familys_name_is_caught(source: str) -> None:
    assert family_faults(source)


def test_a_familys_name_in_a_docstring_is_no_fault() -> None:
    assert family_faults('def f():\n    """4k+1 for the Wan VAE."""') == []


def test_a_planted_import_of_diffusers_or_torch_is_caught() -> None:
    assert foreign_faults("def f():\n    from diffusers import X")
    assert list(imports("import torch", module_level=True))
    assert list(imports("def f():\n    import torch\nif TYPE_CHECKING:\n    import torch", module_level=True)) == []


@pytest.mark.parametrize("folder", [CORE, ROOT / "plugins" / "vtrain_builtin"], ids=lambda folder: folder.name)
def test_core_and_what_is_built_in_know_no_caption_extra_by_name(folder: Path) -> None:
    pattern = re.compile("motion.?score", re.IGNORECASE)
    naming = [str(path) for path in folder.rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))]
    assert naming == [], "which extras there are is for families to say (FamilySpec.caption_extras)"
