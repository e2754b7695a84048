"""What the installed diffusers says in its source, read without importing it: importing it costs seconds and brings torch."""

from __future__ import annotations

import ast
import re
import textwrap
from importlib.util import find_spec
from pathlib import Path

from vtrain.contract import PluginError, Problem

PIPELINE = "pipelines/sana_video/pipeline_sana_video.py"
TRANSFORMER = "models/transformers/transformer_sana_video.py"
VAE = "models/autoencoders/autoencoder_kl_wan.py"
LTX2_VAE = "models/autoencoders/autoencoder_kl_ltx2.py"


def default_arguments(file: str, owner: str, function: str) -> dict[str, object]:
    """The defaults of a method's arguments that are literals, by name.

    file: below the package's folder; owner: the class. Raises PluginError if the installed version has no such method.
    """
    spec = find_spec("diffusers")
    path = Path(spec.origin).parent / file if spec is not None and spec.origin is not None else None
    if path is None or not path.is_file():
        raise PluginError(_unknown(f"the installed diffusers has no {file}."))
    found = _signature(path.read_text(encoding="utf-8"), owner, function)
    if found is None:
        raise PluginError(_unknown(f"{path} has no {owner}.{function}."))
    named = found.args.posonlyargs + found.args.args
    pairs = [*zip(named[len(named) - len(found.args.defaults) :], found.args.defaults, strict=True)]
    pairs += [(name, value) for name, value in zip(found.args.kwonlyargs, found.args.kw_defaults, strict=True) if value]
    return {name.arg: ast.literal_eval(value) for name, value in pairs if _is_literal(value)}


def default_instruction() -> str:
    """What SanaVideoPipeline puts before a prompt."""
    lines = default_arguments(PIPELINE, "SanaVideoPipeline", "__call__").get("complex_human_instruction")
    if not isinstance(lines, list):
        raise PluginError(_unknown("SanaVideoPipeline has no default instruction."))
    return "\n".join(str(line) for line in lines)


def _unknown(what: str) -> Problem:
    return Problem("diffusers", what, "Install the version that vtrain-sanavideo asks for: diffusers 0.42.")


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
