"""Kill runs with kill -9 wherever they can be killed, resume them, and compare what comes of it with runs that were left alone.

    python tests/kill/run.py [--kills 200] [--seed 0] [--jobs 2] [--points N] [--write] [MODE ...]

For each mode a small run of the toy family: killed before every call that changes a file of its output folder, and with every file
that it writes torn (`failpoints.py`); then at random moments, once or several times in a row. After each kill the folder must hold
no half checkpoint, none that was sound before may be gone, and metrics.jsonl must have each step up to the newest once. Each run is
resumed by the same command until it ends: rows, weights, optimizer, state and the hashes of the records must be those of the run
that was left alone, and no other file may be there.

Exit code 1 where one is not. The seed is printed; with it the same moments are drawn, as far as a machine's speed allows.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VTRAIN_PLUGIN_TIMEOUT": "0"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]

from failpoints import Failpoints, Point  # noqa: E402 - beside this file
from measured import put  # noqa: E402 - in benchmarks

PRELOADED = (
    "accelerate", "optimum.quanto", "peft", "torch.distributed.fsdp", "torch.distributed.tensor", "vtrain.cli.run",
    "vtrain.data.caching.caches", "vtrain.data.caching.pictures", "vtrain.run.verify", "vtrain.train.assemble",
    "vtrain.train.sharding", "vtrain_builtin.plugin", "vtrain_builtin.tensorboard", "vtrain_toy.denoiser",
)  # fmt: skip
PATIENCE = 120.0
"""Seconds after which a run that should end is one that hangs."""
PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
SCRATCH = "checkpoints/spool.partial"
GRACE = 15.0
"""Seconds after which `vtrain run` ends the others of a process that failed."""
TRAINING = 0.8
"""Of the random moments, how many are drawn from the time after the start; the others from the start on."""
ROW = ("seconds", "data_wait", "memory")
"""What of a row is measured."""


@dataclass(frozen=True)
class Mode:
    """values: of `Folder.write`. changes: text of the configuration -> what stands there instead. processes: of the run.

    beside: whether a thread writes checkpoints, as on a card. back: the run goes back to its first checkpoint, a later one there.
    refused: the output folder becomes read-only where another run would be killed. clock: it jumps by up to a day, either way, at
    each look, and files are of any time.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1
    beside: bool = False
    back: bool = False
    refused: bool = False
    clock: bool = False


INT8 = {'mixed = "no"': 'mixed = "no"\nbase = "int8"'}
KEEP = "keep = 1\n"
TWO = '[[data]]\nuse = "folder"\npath = "clips"\n'
MODES: Mapping[str, Mode] = {
    "full": Mode(),
    "LoRA": Mode({"train": "lora"}),
    "EMA": Mode({"more": "\n[ema]\ndecay = 0.5\n"}),
    "LoRA on int8": Mode({"train": "lora"}, INT8),
    "accumulation": Mode({"accumulate": 3, "batch_size": 1}),
    "several datasets": Mode({}, {TWO: f'{TWO}id = "one"\n\n{TWO.replace("clips", "more")}id = "two"\nweight = 0.5\n'}),
    "written beside training": Mode({"more": "\n[ema]\ndecay = 0.5\n"}, beside=True),
    "going back": Mode({}, back=True),
    "read-only disk": Mode({}, refused=True),
    "read-only disk, beside": Mode({}, refused=True, beside=True),
    "clock that jumps": Mode({}, clock=True),
    "2 processes": Mode({"batch_size": 1}, processes=2),
    "2 processes, shares": Mode({"batch_size": 1, "more": "\n[parallel]\nshard = true\n"}, processes=2),
}


@dataclass
class Result:
    """Of a mode. calls: that change files, of one run; points: at which it was killed there. random: kills at random moments.

    exact: whether all that was resumed is the same bit for bit; difference: the largest. failures: what was not as it must be.
    """

    mode: str
    calls: int = 0
    points: int = 0
    random: int = 0
    runs: int = 0
    exact: bool = True
    difference: float = 0.0
    failures: list[str] = field(default_factory=list)


def fixtures() -> Any:
    """Folders of runs, as the tests of training have them."""
    path = Path(__file__).parents[1] / "train" / "conftest.py"
    spec = importlib.util.spec_from_file_location("train_runs", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["train_runs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imported() -> None:
    """All that a run imports, once: each run is a fork of this process."""
    for name in PRELOADED:
        importlib.import_module(name)
    from vtrain.registry import discover

    discover()
    gc.collect()
    gc.freeze()  # a run collects what is garbage before it begins, and would look at all of this


# -- one run ---------------------------------------------------------------------------------------------------------------


def begun(folder: Any, mode: Mode, dies: Point | None = None, log: Path | None = None) -> list[int]:
    """Start the run in forks of this process; their ids. dies: where the first one does; log: takes its calls."""
    port, ids = str(_free_port()), []
    for rank in range(mode.processes):
        child = os.fork()
        if not child:
            _be_the_run(folder, mode, rank, port, dies, log)
        ids.append(child)
    return ids


def _be_the_run(folder: Any, mode: Mode, rank: int, port: str, dies: Point | None, log: Path | None) -> None:
    """In the child: never returns."""
    code = 1
    with contextlib.suppress(BaseException):
        os.setpgid(0, 0)
        printed = os.open(folder.path / f"printed-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        if mode.processes > 1:
            count = str(mode.processes)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if mode.beside:
            _written_beside()
        if mode.clock:
            _jumping(folder.output)
        points = Failpoints(folder.output, dies)
        if rank == 0 and (dies is not None or log is not None):
            points.watch()
        code = _main(folder.config)
        if log is not None and rank == 0:
            log.write_text(json.dumps([points.calls, points.torn]))
    os._exit(code)


def _written_beside() -> None:
    """A thread writes checkpoints, as on a card, however small they are."""
    from vtrain.train import saving

    plain: Any = saving.Saver.__init__
    saving.LEAST = 0
    saving.Saver.__init__ = lambda self, *given, beside: plain(self, *given, beside=True)  # type: ignore[method-assign]


def _jumping(output: Path) -> None:
    """The clock, and the times of all files that are there."""
    chance, real = random.Random(str(output)), time.time
    time.time = lambda: real() + 86400 * chance.uniform(-1, 1)
    for path in output.rglob("*"):
        os.utime(path, (time.time(), time.time()))


def _main(config: Path) -> int:
    import traceback

    from vtrain.cli.app import main

    sys.argv = ["vtrain", "run", str(config)]
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
    return 1


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for_training(folder: Any, ids: Sequence[int]) -> None:
    """Until the run that was begun writes down that it starts, or has ended."""
    events = folder.output / "events.jsonl"
    before, until = events.stat().st_ino if events.exists() else 0, time.monotonic() + PATIENCE
    # Each start makes this file.
    while (not events.exists() or events.stat().st_ino == before) and time.monotonic() < until:
        if os.waitid(os.P_PID, ids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)


def ended(ids: Sequence[int], within: float) -> list[int | None]:
    """Wait for all: exit codes, below 0 for the signal that ended one; None for one that had to be killed because it hung."""
    codes: dict[int, int | None] = {}
    until = time.monotonic() + within
    while len(codes) < len(ids):
        for child in set(ids) - codes.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = None
        time.sleep(0.002)
    return [codes[child] for child in ids]


# -- what must be true -----------------------------------------------------------------------------------------------------


def rows_of(folder: Any) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl, without what is measured."""
    path = folder.output / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [{key: value for key, value in json.loads(line).items() if key not in ROW} for line in lines]


def newest_sound(folder: Any, straight: Sequence[Mapping[str, Any]], least: int, close: Callable[..., float]) -> int:
    """What a kill left: the newest checkpoint's step, 0 for none. Raises AssertionError where it is not what it must be."""
    from vtrain.train import checkpoint

    parent = folder.output / "checkpoints"
    newest, faults = checkpoint.latest(parent)
    unsound = [path.name for _, path in checkpoint.steps_saved(parent) if checkpoint.fault(path)]
    assert not faults, f"latest passes over {[(each.folder.name, each.reason) for each in faults]}"
    assert not unsound, f"half checkpoints: {unsound}"
    aside = sorted(path.name for path in parent.glob("step-*.partial")) if parent.is_dir() else []
    assert len(aside) <= 1, f"more than one is left aside: {aside}"
    step = int(newest.name.removeprefix("step-")) if newest is not None else 0
    assert step >= least, f"the checkpoint of step {least} was there and is gone; the newest is of {step}"
    before = [row for row in rows_of(folder) if row["step"] <= step]
    found = [row["step"] for row in before]
    assert found == list(range(1, step + 1)), f"metrics.jsonl has steps {found} at the checkpoint of step {step}"
    close(before, straight[:step])
    return step


@dataclass
class Close:
    """Compares numbers; difference: the largest, relative to the larger one (and, of weights, to 1)."""

    tolerance: float
    difference: float = 0.0
    exact: bool = True

    def __call__(self, found: Any, wanted: Any, where: str = "") -> float:
        if isinstance(wanted, Mapping):
            assert found.keys() == wanted.keys(), f"{where}: other keys"
            return max((self(found[key], wanted[key], f"{where} {key}") for key in wanted), default=0.0)
        if isinstance(wanted, list):
            assert len(found) == len(wanted), f"{where}: {len(found)} instead of {len(wanted)}"
            pairs = enumerate(zip(found, wanted, strict=True))
            return max((self(one, other, f"{where}[{at}]") for at, (one, other) in pairs), default=0.0)
        if not isinstance(wanted, float):
            assert found == wanted, f"{where} is {found!r} instead of {wanted!r}"
            return 0.0
        return self.number(abs(found - wanted) / max(abs(wanted), 1e-12), where)

    def number(self, difference: float, where: str) -> float:
        self.exact &= difference == 0
        self.difference = max(self.difference, difference)
        assert difference <= self.tolerance, f"{where} differs by {difference:.1e}"
        return difference

    def tensors(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        assert found.keys() == wanted.keys(), "other tensors"
        for name, value in wanted.items():
            if not value.is_floating_point():
                assert found[name].equal(value), name
            elif not found[name].equal(value):
                difference = (found[name].double() - value.double()).abs().max() / value.abs().max().clamp(min=1.0)
                self.number(float(difference), name)


def compared(folder: Any, straight: Any, last: int, close: Close) -> None:
    """A run that was killed and resumed, with one that was not. Raises AssertionError."""
    from vtrain.train import checkpoint

    close(rows_of(folder), rows_of(straight), "row")
    close.tensors(folder.tensors(last), straight.tensors(last))
    one, other = (each.output / "checkpoints" / f"step-{last:06d}" for each in (folder, straight))
    states = [
        (each / "state.json").read_text().replace(str(of.path), "") for each, of in ((one, folder), (other, straight))
    ]
    assert states[0] == states[1], "state.json differs"
    assert (one / "samples.npz").read_bytes() == (other / "samples.npz").read_bytes(), "samples.npz differs"
    if close.exact:
        hashes = [json.loads((each / "records.json").read_text())["files"]["metrics.jsonl"] for each in (one, other)]
        assert hashes[0] == hashes[1], "records.json: another hash of metrics.jsonl"
    for text in _findings(folder):
        raise AssertionError(f"verify: {text}")
    # One that was about to go when the run was killed behind its last step stays, and is whole.
    older = {path.name for step, path in checkpoint.steps_saved(one.parent) if step < last}
    more = {name for name in files_of(folder) ^ files_of(straight) if not older & set(Path(name).parts)}
    assert not more, f"only in one of both: {sorted(more)}"


def files_of(folder: Any) -> set[str]:
    """Below its output folder. TensorBoard makes one more at each start, and going back may leave a checkpoint behind at each."""
    found = (path.relative_to(folder.output).as_posix() for path in folder.output.rglob("*"))
    return {name for name in found if "tfevents" not in name and "left-behind" not in name}


def _findings(folder: Any) -> Iterator[str]:
    """What `vtrain verify` says of the files, without training again."""
    from vtrain.run.certificate import Report
    from vtrain.run.chain import RunFiles
    from vtrain.run.verify import _check_checkpoints, _check_configuration, _check_records

    report, run = Report(lambda text: None), RunFiles.read(folder.output)
    for check in (_check_records, _check_checkpoints, _check_configuration):
        check(run, report)
    yield from map(str, report.findings)


# -- a mode ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A run that was left alone, and how others like it begin. before: the output folder that they begin with; least: step of the
    checkpoint that is there from the beginning. rows: of the run's metrics.jsonl. watched: its calls."""

    steps: int
    save: int
    before: Path | None
    least: int
    straight: Any
    rows: list[dict[str, Any]]
    watched: Failpoints


class Place:
    """Where the runs of one mode are made. clips: a folder with `clips`, `more` and a cache that they share."""

    def __init__(self, name: str, place: Path, clips: Path, runs: Any) -> None:
        self.name, self.mode, self._place, self._clips, self._runs = name, MODES[name], place, clips, runs
        self.result, self._made = Result(name), 0
        self.close = Close(1e-6 if self.mode.processes > 1 else 0.0)

    def folder(self, steps: int, save: int, before: Path | None = None) -> Any:
        """A new one. before: an output folder to begin with."""
        self._made += 1
        path = self._place / f"run-{self._made}"
        path.mkdir(parents=True)
        made = self._runs.Folder(path, self._clips / "cache")
        values = {"steps": steps, "save": save, "log_every": 2} | dict(self.mode.values)
        text = made.write(**values).read_text(encoding="utf-8")
        changes = {"[checkpoint]\n": f"[checkpoint]\n{KEEP}"} | dict(self.mode.changes)
        if self.mode.back and before is not None:
            changes |= {"seed = 7\n": f'seed = 7\nresume = "out/checkpoints/step-{save:06d}"\n'}
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        if self.mode.back:
            text = text.replace(KEEP, 'keep = "all"\n')
        for name in ("clips", "more"):  # one place for all runs: what is known of a file is known by its path
            text = text.replace(f'path = "{name}"', f'path = "{(self._clips / name).as_posix()}"')
        made.config.write_text(text, encoding="utf-8")
        if before is not None:
            shutil.copytree(before, made.output)
        return made

    def through(self, folder: Any, log: Path | None = None) -> None:
        """Run to the end. Raises AssertionError where it does not come there."""
        codes = ended(begun(folder, self.mode, log=log), PATIENCE)
        self.result.runs += 1
        assert all(code == 0 for code in codes), f"exit codes {codes}\n{self.printed(folder)}"

    def printed(self, folder: Any) -> str:
        return "\n".join(path.read_text()[-1500:] for path in sorted(folder.path.glob("printed-*.txt")))

    def trial(self, steps: int, save: int) -> Trial:
        """A run that is left alone; in `back`, the one that goes back."""
        log, before, least = self._place / "calls.json", None, 0
        straight = self.folder(steps, save)
        self.through(straight, log=log)
        if self.mode.back:
            before, least = self._place / f"before-{self._made}", save
            shutil.copytree(straight.output, before)
            straight = self.folder(steps, save, before)
            self.through(straight, log=log)
        calls, torn = json.loads(log.read_text())
        return Trial(steps, save, before, least, straight, rows_of(straight), Failpoints(Path(), None, calls, torn))

    def failpoints(self, most: int | None) -> None:
        """Killed at every one of a short run's. most: at so many of them, one of each stretch."""
        trial = self.trial(steps=4, save=2)
        self.result.calls = len(trial.watched.calls)
        points = sorted(trial.watched.points, key=lambda point: (point.number, point.torn))
        # Shares are put together through hundreds of scratch files: one call of each 25 stands for the others.
        calls = trial.watched.calls
        points = [each for each in points if SCRATCH not in calls[each.number] or each.number % 25 == 0]
        if self.mode.refused:
            points = [replace(point, refused=True) for point in points if not point.torn]
        stride = 1 if most is None else len(points) / most
        for at in range(len(points) if most is None else min(most, len(points))):
            self._at_point(points[int(at * stride)], trial)

    def _at_point(self, point: Point, trial: Trial) -> None:
        folder = self.folder(trial.steps, trial.save, trial.before)
        with self.judged(lambda: f"{self.name}, {point} ({trial.watched.calls[point.number]})", folder):
            codes = ended(begun(folder, self.mode, dies=point), PATIENCE)
            self.result.runs += 1
            said = self.printed(folder)
            assert None not in codes, f"a process hangs after the first was killed\n{said}"
            assert "Traceback" not in said or self.mode.processes > 1, said
            if codes[0] == (2 if self.mode.refused else -signal.SIGKILL):
                self.result.points += 1
                newest_sound(folder, trial.rows, trial.least, self.close)
                self.through(folder)
            else:  # a thread's calls come in no fixed order: this time there were fewer
                assert self.mode.beside, f"exit codes {codes}\n{said}"
            compared(folder, trial.straight, trial.steps, self.close)

    def random(self, kills: int, seed: int) -> None:
        """Killed at so many random moments, some of them in a row."""
        chance = random.Random(f"{seed} {self.name}")
        trial = self.trial(steps=12, save=2)
        again = self.folder(trial.steps, trial.save, trial.before)
        ids = begun(again, self.mode)
        _wait_for_training(again, ids)
        began = time.monotonic()
        codes = ended(ids, PATIENCE)
        assert set(codes) == {0}, f"exit codes {codes}\n{self.printed(again)}"
        lasts = time.monotonic() - began
        while self.result.random < kills and len(self.result.failures) < 20:
            self._killed_on_and_on(chance, lasts, trial, min(chance.randint(1, 4), kills - self.result.random))

    def _killed_on_and_on(self, chance: random.Random, lasts: float, trial: Trial, times: int) -> None:
        folder, newest, moments = self.folder(trial.steps, trial.save, trial.before), trial.least, list[str]()
        with self.judged(lambda: f"{self.name}, killed {', '.join(moments)}", folder):
            for _ in range(times):
                training, after = chance.random() < TRAINING, lasts * chance.random()
                moments.append(f"{after:.3f} s after its {'training began' if training else 'start'}")
                ids = begun(folder, self.mode)
                if training:
                    _wait_for_training(folder, ids)
                time.sleep(after)
                for child in (ids, ids[:1], ids[-1:])[chance.randrange(3)]:
                    os.kill(child, signal.SIGKILL)
                # Before all have met, one that is alone waits for torch's half hour: its launcher ends it, and here this does.
                codes = ended(ids, PATIENCE if training else GRACE)
                self.result.runs += 1
                hangs = training and None in codes
                assert not hangs, f"a process hangs after another was killed\n{self.printed(folder)}"
                self.result.random += -signal.SIGKILL in codes
                newest = newest_sound(folder, trial.rows, trial.least if self.mode.back else newest, self.close)
            self.through(folder)
            compared(folder, trial.straight, trial.steps, self.close)

    @contextlib.contextmanager
    def judged(self, where: Callable[[], str], folder: Any) -> Iterator[None]:
        """What fails inside is a failure of the mode, its folder kept; else the folder goes."""
        try:
            yield
        except AssertionError as error:
            self.result.failures.append(f"{where()}: {error} [{folder.path}]")
            print(f"FAILED {self.result.failures[-1]}", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(folder.path)
        self.result.exact, self.result.difference = self.close.exact, self.close.difference


def judge(name: str, place: Path, clips: Path, kills: int, seed: int, points: int | None) -> dict[str, Any]:
    """A whole mode, in a process of its own. points: at most, None for all failpoints."""
    made = Place(name, place / name.replace(" ", "-"), clips, fixtures())
    try:
        if points != 0:
            made.failpoints(points)
        if kills and not MODES[name].refused:
            made.random(kills, seed)
    except AssertionError as error:
        made.result.failures.append(f"{name}, left alone: {error}")
        print(f"FAILED {made.result.failures[-1]}", file=sys.stderr, flush=True)
    return asdict(made.result)


def clips_in(folder: Path, runs: Any) -> None:
    """Seven captioned clips of two shapes in two folders."""
    sizes = {"clips": [(64, 64), (96, 64), (64, 64), (96, 64), (64, 64)], "more": [(64, 64), (96, 64)]}
    for number, (name, shapes) in enumerate(sizes.items()):
        (folder / name).mkdir(parents=True)
        for seed, (width, height) in enumerate(shapes):
            runs.write_clip(folder / name / f"clip_{seed}.mp4", width, height, 9, seed + 5 * number)
            (folder / name / f"clip_{seed}.txt").write_text(f"gradient number {seed}", encoding="utf-8")


HEAD = "| mode | failpoints | random kills | runs | resumed | largest difference |\n|---|---|---|---|---|---|"


def row(found: Result) -> str:
    how = "bit for bit" if found.exact else "to the tolerance"
    how = f"**{len(found.failures)} not**" if found.failures else how
    points = f"{found.points}, at {found.calls} calls"
    return f"| {found.mode} | {points} | {found.random} | {found.runs} | {how} | {found.difference:.1e} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="kill runs, resume them, compare")
    parser.add_argument("modes", nargs="*", metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--kills", type=int, default=200, help="at random moments, over all modes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="modes at a time")
    parser.add_argument("--points", type=int, help="at most so many failpoints of each mode; absent: all")
    parser.add_argument("--write", action="store_true", help="put the table into docs/checkpoints.md")
    asked = parser.parse_args()
    if unknown := set(asked.modes) - MODES.keys():
        parser.error(f"no such mode: {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    chosen = asked.modes or list(MODES)
    place = Path(tempfile.mkdtemp(prefix="vtrain-kill-"))
    print(f"seed {asked.seed}; {asked.kills} random kills over {len(chosen)} modes; in {place}", flush=True)
    imported()
    runs = fixtures()
    clips_in(place, runs)
    filler = Place("several datasets", place / "fill", place, runs)
    filler.through(filler.folder(1, 1))  # the cache, for all
    killed = [name for name in chosen if not MODES[name].refused]
    shares = {name: asked.kills // len(killed) + (at < asked.kills % len(killed)) for at, name in enumerate(killed)}
    with ProcessPoolExecutor(asked.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        jobs = [
            pool.submit(judge, name, place, place, shares.get(name, 0), asked.seed, asked.points) for name in chosen
        ]
        print(HEAD, flush=True)
        results = []
        for job in as_completed(jobs):
            results.append(Result(**job.result()))
            print(row(results[-1]), flush=True)
    counts = [sum(getattr(each, name) for each in results) for name in ("points", "random", "runs")]
    total = "| all | {} | {} | {} | | |".format(*counts)
    print(total)
    if asked.write:
        lines = [HEAD, *(row(each) for each in sorted(results, key=lambda each: chosen.index(each.mode))), total]
        put(PAGE, "kill", "\n".join(lines) + "\n")
    failures = [text for each in results for text in each.failures]
    if not failures:
        shutil.rmtree(place)
    print("\n".join(["", *failures, f"{len(failures)} failures"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
