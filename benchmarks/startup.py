"""What starting costs: the command line against importing its libraries, a run's first step against loading its model.

Every number is of a process of its own, in CPU-seconds and in wall time, on one thread; the processes of a group take
turns. Commands are measured from start to end. Python writes bytecode on both sides, and a round that is not counted comes
first: PYTHONDONTWRITEBYTECODE would have an editable install compiled at every start, and no library.

The first step is measured from the start of `vtrain run`, caches warm, to the line that tells of step 1; the process is
then ended. It is held to a script that imports the libraries such a run needs (torch, diffusers' transformer class,
accelerate, safetensors, and peft under LoRA), loads the same weights, and does nothing else; from_pretrained maps the
weights of a CPU and leaves reading them to their first use. Beside it stands the bare loop (bare.py) up to the end of
its own first step, which holds what any first step costs: reading the weights, gradients and optimizer state in fresh
memory.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy starts its threads; the processes below inherit it
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import cache_from_source
from pathlib import Path

import bare
import psutil
from report import Ratio, ratio, say, say_machine, table, write_json
from workload import BASE, MODELS, MODES, RANK, Model, fill, read_samples, samples_file, write_config

import vtrain

VTRAIN = [sys.executable, "-c", "from vtrain.cli.app import main; main()"]
LIBRARIES = "import typer, rich, pydantic"
A_MODEL, ALL_OF_PLAN = "the same and one model", "import all libraries it uses"
BARE = {
    LIBRARIES: LIBRARIES,
    A_MODEL: f"{LIBRARIES}\nclass Model(pydantic.BaseModel):\n    key: int = 0",
    ALL_OF_PLAN: f"{LIBRARIES}, pluggy, tomli, tree_sitter, tree_sitter_toml, importlib.metadata, sqlite3, json, hashlib",
}
"""What commands stand beside. `import pydantic` loads little of it: most comes with the first model."""

CLI_LIMIT = 3.0
FIRST_STEP_LIMIT = 1.3

LOAD = """
import sys, time
import torch, accelerate, safetensors{peft}
from {module} import {transformer}
{transformer}.from_pretrained(sys.argv[1], torch_dtype=getattr(torch, sys.argv[2]))
print("cpu", time.process_time(), flush=True)
"""

THREADS = """
import sys, torch
from vtrain.train.step import Step
forward = Step.forward
def told(self, given):
    sys.stdout.write(f"threads {torch.get_num_threads()}\\n")
    return forward(self, given)
Step.forward = told
from vtrain.cli.app import main
main()
"""
"""`vtrain`, telling at each step with how many threads torch computes."""


@dataclass(frozen=True)
class Cost:
    """Of one process, in seconds."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Compared:
    """One process against another: medians, and the ratio of their CPU-seconds in pairs."""

    what: str
    against: str
    cost: Cost
    base: Cost
    ratio: Ratio


Measure = Callable[[], Cost]


def whole(command: list[str]) -> Cost:
    """Run to the end. Its own CPU-seconds and those of its children."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode} of {' '.join(command)}")
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - start)


def first_step(config: Path) -> Cost:
    """Run until the line of step 1, in an output folder that is not there yet; then end the process."""
    shutil.rmtree(config.with_suffix(""), ignore_errors=True)
    return until([*VTRAIN, "run", str(config)], "step 1/", lambda _line, process: used(process))


def told(command: list[str]) -> Cost:
    """Run a script until it tells how many CPU-seconds it has used; its end is not counted."""
    return until(command, "cpu ", lambda line, _process: float(line.split()[1]))


def used(process: int) -> float:
    times = psutil.Process(process).cpu_times()
    return float(times.user + times.system)


def until(command: list[str], begins: str, cpu: Callable[[str, int], float]) -> Cost:
    """Start a process, and end it at its first line that `begins` so."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith(begins):
                cost = Cost(cpu(line, process.pid), time.perf_counter() - start)
                process.kill()
                return cost
    raise SystemExit("".join(said))


def rounds(measures: Mapping[str, Measure], runs: int) -> dict[str, list[Cost]]:
    """`runs` rounds, in each of which every process runs once, after one round that is not counted; of one, none is."""
    costs: dict[str, list[Cost]] = {name: [] for name in measures}
    for turn in range(0 if runs > 1 else 1, runs + 1):
        for name, measure in measures.items():
            cost = measure()
            if turn:
                costs[name].append(cost)
    return costs


def compared(costs: Mapping[str, list[Cost]], what: str, against: str, limit: float | None) -> Compared:
    ours, theirs = costs[what], costs[against]
    pairs = ratio([cost.cpu for cost in ours], [cost.cpu for cost in theirs], limit)
    return Compared(what, against, middle(ours), middle(theirs), pairs)


def middle(costs: list[Cost]) -> Cost:
    return Cost(statistics.median(cost.cpu for cost in costs), statistics.median(cost.wall for cost in costs))


def command_line(configs: Mapping[str, Path], runs: int) -> list[Compared]:
    """`--help`, `plugins list` and `plan` of runs whose data are known, against importing typer, rich and pydantic.

    configs: of each family, a run's. `plugins list` also stands beside what pydantic loads with its first model. `plan`
    reads TOML, plugins, headers and a database too: it stands beside importing all the libraries for that as well.
    """
    plans = {f"vtrain plan, {family}": ["plan", str(config)] for family, config in configs.items()}
    for words in plans.values():
        whole([*VTRAIN, *words])
    commands = {"vtrain --help": ["--help"], "vtrain plugins list": ["plugins", "list"], **plans}
    measures = {name: partial(whole, [*VTRAIN, *words]) for name, words in commands.items()}
    imports = {what: partial(whole, [sys.executable, "-c", code]) for what, code in BARE.items()}
    costs = rounds({**imports, **measures}, runs)
    return [
        compared(costs, "vtrain --help", LIBRARIES, CLI_LIMIT),
        compared(costs, "vtrain plugins list", LIBRARIES, CLI_LIMIT),
        compared(costs, "vtrain plugins list", A_MODEL, None),
        *(
            compared(costs, plan, against, limit)
            for plan in plans
            for against, limit in ((LIBRARIES, None), (ALL_OF_PLAN, CLI_LIMIT))
        ),
    ]


def has_bytecode() -> bool:
    """Whether Python could keep vtrain's: not in a folder that it may not write to."""
    return Path(cache_from_source(vtrain.__file__)).is_file()


def first_steps(folder: Path, model: Model, mode: str, runs: int) -> list[Compared]:
    """The first step of `model`, warm caches, against imports and weight loading, and against the bare loop's own."""
    config = write_config(folder, model, mode, log_every=1, name=f"{model.name}-{mode}")
    fill(config)
    read_samples(config, model)
    more = [str(model.build(folder) / "transformer"), {"fp32": "float32", "bf16": "bfloat16"}[BASE[mode]]]
    load, by_hand, vtrain = (f"{model.name}, {mode}: {name}" for name in ("imports and weights", "bare loop", "vtrain"))
    family, rank = bare.FAMILIES[model.use], RANK if mode == "lora" else 0
    imports = LOAD.format(module=family.module, transformer=family.transformer, peft=", peft" if rank else "")
    loop = [sys.executable, bare.__file__, model.use, *more, str(samples_file(folder, model)), str(rank)]
    measures = {
        load: partial(told, [sys.executable, "-c", imports, *more]),
        by_hand: partial(told, loop),
        vtrain: partial(first_step, config),
    }
    costs = rounds(measures, runs)
    return [
        compared(costs, vtrain, load, FIRST_STEP_LIMIT),
        compared(costs, by_hand, load, None),
        compared(costs, vtrain, by_hand, None),
    ]


def threads_in_a_run(config: Path, threads: int) -> set[int]:
    """With how many threads torch computes in steps of a run started under OMP_NUM_THREADS = `threads`."""
    shutil.rmtree(config.with_suffix(""), ignore_errors=True)
    command = [sys.executable, "-c", THREADS, "run", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    found: set[int] = set()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("threads "):
                found.add(int(line.split()[1]))
            if line.startswith("step 3/"):
                process.kill()
                return found
    raise SystemExit("".join(said))


def cost_table(found: list[Compared]) -> str:
    def text(cost: Cost) -> str:
        return f"{cost.cpu:.2f} ({cost.wall:.2f})"

    return table(
        ("process", "CPU s (wall)", "against", "its CPU s (wall)", "ratio of CPU-seconds, 95% interval"),
        [(each.what, text(each.cost), each.against, text(each.base), str(each.ratio)) for each in found],
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="counted processes of each kind (default: 10)")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2], help="OMP_NUM_THREADS to try (default: 1 2)")
    parser.add_argument("--folder", type=Path, help="where checkpoints and caches go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    with ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vtrain-startup-")))
        folder.mkdir(parents=True, exist_ok=True)
        say_machine()
        configs = {
            model.use: write_config(folder, model, "full", log_every=1, name=f"plan-{model.name}")
            for model in (MODELS["tiny"], MODELS["wan-tiny"])
        }
        for config in configs.values():
            fill(config)
        commands = command_line(configs, chosen.runs)
        say(f"vtrain's bytecode: {'kept' if has_bytecode() else 'NOT KEPT: it is compiled at every start'}\n")
        say(cost_table(commands))
        starts = [
            row
            for model in chosen.models
            for mode in chosen.modes
            for row in first_steps(folder, MODELS[model], mode, chosen.runs)
        ]
        if starts:
            say("\n" + cost_table(starts))
        threads = {asked: sorted(threads_in_a_run(configs["sanavideo"], asked)) for asked in chosen.threads}
        for asked, found in threads.items():
            verdict = "respected" if found == [asked] else "NOT RESPECTED"
            say(f"\nOMP_NUM_THREADS={asked}: steps compute with {found} threads: {verdict}")
        content = {"commands": commands, "first_steps": starts}
        tables = {name: [asdict(each) for each in rows] for name, rows in content.items()}
        more = {"bytecode": has_bytecode(), "threads": {str(asked): found for asked, found in threads.items()}}
        write_json(chosen.json, {**tables, **more})


if __name__ == "__main__":
    main()
