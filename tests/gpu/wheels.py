"""Brings the tests of this folder to a machine without network that has torch with CUDA, transformers and pytest already.

    python tests/gpu/wheels.py collect FOLDER [--python 3.12]     here, with network: the wheels that such a machine lacks
    python tests/gpu/wheels.py install FOLDER TARGET              there: into the folder TARGET, and says what is still missing
    PYTHONPATH=TARGET python -m pytest tests/gpu                  there

vtrain and its model families are collected as wheels too: plugins are found through the metadata of what is installed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
LACKING = (
    "annotated-types", "av", "charset-normalizer", "diffusers", "ftfy", "importlib-metadata", "ninja", "nvidia-ml-py",
    "optimum-quanto", "pydantic", "pydantic-core", "pytest-timeout", "requests", "tomli", "torch-optimi", "tree-sitter",
    "tree-sitter-toml", "typing-inspection", "wcwidth", "zipp", "zstandard",
)  # fmt: skip
"""What an image made for PyTorch does not have, of what vtrain, the families and the rows of benchmarks/gpu_sana2b.py need; but for
bitsandbytes, without which the rows `adamw8bit` say so."""

OURS = {"vtrain": ".", "vtrain-sanavideo": "sanavideo_plugin", "vtrain-wan": "wan_plugin"}
"""Distributions, and their folders."""

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST = 56 << 20
"""Bytes that all wheels may have together: what can be carried along with a checkout."""


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def pinned(name: str) -> str:
    """As constraints.txt has it."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def collect(folder: Path, python: str) -> int:
    """The wheels, for 64-bit x86 Linux. Gives their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    wanted = [*platforms, "--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    pip("download", "--no-deps", *wanted, "--dest", str(folder), *map(pinned, LACKING))
    with tempfile.TemporaryDirectory() as aside:
        pip("wheel", "--no-deps", "--wheel-dir", aside, *(str(ROOT / place) for place in OURS.values()))
        for wheel in Path(aside).iterdir():
            (folder / wheel.name).write_bytes(wheel.read_bytes())
    return sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))


def install(folder: Path, target: Path) -> None:
    """Without asking any index, and without touching what the machine has."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    pip("install", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(target), *wheels)


def missing() -> list[str]:
    """Requirements of vtrain and the families that nothing on the path meets by name; extras do not count."""
    lacking = []
    for line in [line for name in OURS for line in requires(name) or []]:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name is None or "extra ==" in line:
            continue
        try:
            version(name[0])
        except PackageNotFoundError:
            lacking.append(line)
    return lacking


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("folder", type=Path)
    collecting.add_argument("--python", default="3.12", help="of the other machine (default: 3.12)")
    installing = commands.add_parser("install")
    installing.add_argument("folder", type=Path)
    installing.add_argument("target", type=Path)
    chosen = parser.parse_args()
    if chosen.command == "collect":
        size = collect(chosen.folder, chosen.python)
        print(f"{len(list(chosen.folder.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB, in {chosen.folder}")
        if size > MOST:
            print(f"that is more than {MOST / 2**20:.0f} MiB", file=sys.stderr)
            return 1
        return 0
    install(chosen.folder, chosen.target)
    sys.path.insert(0, str(chosen.target.resolve()))
    if lacking := missing():
        print(f"still missing: {', '.join(lacking)}", file=sys.stderr)
        return 1
    print(f"installed into {chosen.target}: PYTHONPATH={chosen.target} python -m pytest tests/gpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
