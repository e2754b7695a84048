"""Every job of the project. `nox -s demo` and `nox -s tests` need nothing but nox; all install what constraints.txt pins."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

CONSTRAINTS = "constraints.txt"
FAMILIES = ("sanavideo_plugin", "wan_plugin")
EDITABLE = [word for folder in FAMILIES for word in ("-e", f"./{folder}")]
CODE = ("core", "plugins", "sanavideo_plugin", "wan_plugin", "tests", "benchmarks", "examples", "docs", "noxfile.py")
WITH_TORCH = re.compile(
    r"(torch|accelerate|peft|diffusers|transformers|efficientnet-\S+?|lion-pytorch|vtrain)(?=[<>=]|$)"
)
"""Dependencies that are torch, or install it."""
SOURCES = ("folder", "frames", "manifest", "s3", "seekable", "storage", "tar", "web")
TORCH_FREE = (
    "tests/test_layers.py",
    "tests/test_imports.py",
    "tests/contract",
    "tests/config",
    "tests/registry",
    "tests/scaffold/test_package.py",
    "tests/plan",
    *(f"tests/builtin/test_{source}.py" for source in SOURCES),
    "tests/cli/test_config_command.py",
    "tests/cli/test_plugins_command.py",
)
"""Tests of the layers up to plan, of the data sources, and of the commands that need no more than these."""


def install(session: nox.Session, *more: str, extras: str = "") -> None:
    """torch alone first: a wheel that is at hand is then taken, and nothing later asks for another."""
    pinned = next(line for line in Path(CONSTRAINTS).read_text().splitlines() if line.startswith("torch=="))
    session.install("-q", "-c", CONSTRAINTS, pinned)
    session.install("-q", "-c", CONSTRAINTS, "-e", f".{extras}", *EDITABLE, *more)


INSTALLING = "installing torch, diffusers and vtrain first: the first time minutes, by your network; later seconds"


@nox.session
def demo(session: nox.Session) -> None:
    """A model of random weights learns to make what the prompt says; a judge reads it back from the pixels."""
    session.log(f"{INSTALLING}. Then the demo: four to six minutes on two cores")
    install(session, extras="[plot]")
    session.run("python", "examples/world/demo.py", *session.posargs)


@nox.session
def clips(session: nox.Session) -> None:
    """Seven real clips through everything, with a model too small to learn them; about a minute."""
    session.log(f"{INSTALLING}. Then about a minute")
    install(session, extras="[plot]")
    session.run("python", "examples/demo.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but those that need minutes, two workers of one thread each. Arguments after -- go to pytest."""
    run_pytest(session, "not slow and not gpu")


@nox.session
def slow(session: nox.Session) -> None:
    """The tests that `nox -s tests` does not run: learning, the demo, the benchmarks' own runs. Arguments after -- go to pytest."""
    run_pytest(session, "slow")


def run_pytest(session: nox.Session, chosen: str) -> None:
    """chosen: of markers, as pytest's -m. A worker that has nothing left to do takes over what waits for the other."""
    install(session, extras="[test]")
    session.install("-q", "--no-deps", "-e", "tests/fixtures/toy_plugin")
    env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    session.run("pytest", "-n", "2", "--dist", "worksteal", "-m", chosen, *session.posargs, env=env)


@nox.session
def bitsandbytes(session: nox.Session) -> None:
    """The kit on `adamw8bit`, apart from the other tests: diffusers imports an installed bitsandbytes, which prints warnings."""
    install(session, extras="[test,bitsandbytes]")
    session.run("pytest", "tests/builtin/test_optimizers.py", "-k", "8bit", *session.posargs)


@nox.session(python="3.12")
def py312(session: nox.Session) -> None:
    """What needs no torch, on Python 3.12 and without torch, whose wheel for 3.12 takes gigabytes in many places.

    Where no python3.12 is found it is skipped, or fails if CI is set. pyenv's is found under PYENV_VERSION=<a 3.11>:<a 3.12>.
    """
    projects = [nox.project.load_toml(f"{folder}/pyproject.toml")["project"] for folder in (".", *FAMILIES)]
    needed = [line for project in projects for line in project["dependencies"]]
    needed += projects[0]["optional-dependencies"]["test"]
    session.install("-q", "-c", CONSTRAINTS, *(line for line in needed if not WITH_TORCH.match(line)))
    session.install("-q", "--no-deps", "-e", ".", *EDITABLE, "-e", "tests/fixtures/toy_plugin")
    session.run("python", "-c", "import importlib.util as i; assert not i.find_spec('torch'), 'torch came along'")
    session.run("pytest", *TORCH_FREE, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: rules and format."""
    session.install("-q", "-c", CONSTRAINTS, "ruff")
    session.run("ruff", "check", *CODE)
    session.run("ruff", "format", "--check", *CODE)


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict on everything that is shipped."""
    install(session, "types-psutil", extras="[test]")
    session.install("-q", "-c", CONSTRAINTS, "mypy")
    session.run("mypy", "core", "plugins", "sanavideo_plugin/vtrain_sanavideo", "wan_plugin/vtrain_wan")


@nox.session
def docs(session: nox.Session) -> None:
    """Every TOML and Python block and every command of README and docs, run."""
    install(session, extras="[test]")
    session.install("-q", "--no-deps", "-e", "tests/fixtures/toy_plugin")
    session.run("pytest", "tests/docs", *session.posargs)


@nox.session
def plugins(session: nox.Session) -> None:
    """The conformance kit on every part of ours and on the toy plugin, then the wheels in an empty environment: the toy, a new
    package of each kind, and the page of the first family, followed to the letter."""
    install(session, extras="[test]")
    session.install("-q", "--no-deps", "-e", "tests/fixtures/toy_plugin")
    session.run("pytest", "-k", "conformance or wheel or toy or walkthrough", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Ratios against bare loops, printed as tables. Takes most of an hour on two cores."""
    install(session, extras="[test]")
    for script in ("step.py", "startup.py"):
        session.run("python", f"benchmarks/{script}", *session.posargs)
    session.run("python", "benchmarks/crepa.py")


@nox.session
def world(session: nox.Session) -> None:
    """The tiny world in every training mode: accuracy, loss, time and memory, written to docs/tiny-world.md. Half an hour."""
    install(session, extras="[plot,test]")
    session.run("python", "benchmarks/tiny_world.py", "--write", *session.posargs, env={"PYTHONPATH": "examples/world"})


@nox.session
def world_time(session: nox.Session) -> None:
    """The tiny world in the time that the plain mode takes, two seeds, written to docs/tiny-world.md. Two hours on two cores."""
    install(session, extras="[plot,test]")
    found = ("--seeds", "42", "43", "--write")
    session.run("python", "benchmarks/world_time.py", *found, *session.posargs, env={"PYTHONPATH": "examples/world"})


@nox.session
def crepa(session: nox.Session) -> None:
    """The tiny world with CREPA and without it, from nothing and fine-tuned, three seeds, written to docs/crepa.md. Half an hour on
    two cores."""
    install(session, extras="[test]")
    env = {"PYTHONPATH": "examples/world"}
    session.run("python", "benchmarks/crepa_world.py", "--write", *session.posargs, env=env)
    session.run("python", "examples/world/demo.py")
    session.run("python", "benchmarks/crepa_motion.py", "--write", env=env)


@nox.session
def mutants(session: nox.Session) -> None:
    """Known mistakes turned on one at a time: which tests notice. Takes about four minutes."""
    install(session, extras="[test]")
    session.install("-q", "--no-deps", "-e", "tests/fixtures/toy_plugin")
    session.run("python", "tests/mutants/run.py", *session.posargs)


@nox.session
def kill(session: nox.Session) -> None:
    """Runs killed with kill -9 at every call that changes their folder and at 200 random moments, resumed and compared. An hour on
    two cores, Linux. `-- --kills 20 --points 10 full LoRA` takes less; `-- --write` puts the table into docs/checkpoints.md."""
    install(session, extras="[test]")
    session.install("-q", "--no-deps", "-e", "tests/fixtures/toy_plugin")
    session.run("python", "tests/kill/run.py", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests that need a GPU, on this machine's. A machine without network: tests/gpu/wheels.py."""
    install(session, extras="[test]")
    session.run("pytest", "tests/gpu", *session.posargs)


@nox.session(name="bench-gpu")
def bench_gpu(session: nox.Session) -> None:
    """The 2B model on a GPU, random weights: time and memory against a bare loop on the same card."""
    install(session)
    session.run("python", "benchmarks/gpu_sana2b.py", *session.posargs)
