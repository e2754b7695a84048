"""Fixtures that several layers' tests share."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import venv
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from hypothesis import HealthCheck, settings

InstallPlugin = Callable[..., Path]
Python = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_configure() -> None:
    """Ctrl-C and a hang-up are heard here and in every process that a test starts, also where the suite was started to ignore them.

    A shell does so for what a script starts in the background, and nohup; processes inherit it, what is caught as default.
    Hypothesis measures no time: a busy machine stops any example for longer than its limits. Plugins are not tried in processes
    of their own, which tests/registry/test_trials.py asks for.
    """
    os.environ["VTRAIN_PLUGIN_TIMEOUT"] = "0"
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)  # the suite itself continues
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


SILENCE_S = 8.0
"""After so long without a line from pytest, it is said which tests are running."""


def pytest_report_header(config: pytest.Config) -> str:
    rule = config.option.markexpr
    return f"tests chosen by -m {rule!r}" if rule else "tests marked slow run too: `nox -s tests` has -m 'not slow'"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: not (item.get_closest_marker("slow") or item.get_closest_marker("long")))


def pytest_sessionstart(session: pytest.Session) -> None:
    config, option = session.config, session.config.option
    if not hasattr(config, "workerinput") and option.verbose >= 0 and not (option.usepdb or option.trace):
        config.pluginmanager.register(Heartbeat(SILENCE_S), "heartbeat")


class Heartbeat:
    """Names the running tests, and for how long they run, whenever pytest has said nothing for a while.

    Without xdist a test's output is captured at the file descriptors, so this writes to a copy of standard output made before.
    """

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._running: dict[str, float] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._began = self._last = time.monotonic()
        self._at_line_start = False
        self._output = os.dup(1)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        with self._lock:
            self._running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        with self._lock:
            self._running.pop(nodeid, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        with self._lock:
            if report.when == "call" or not report.passed:  # else pytest prints nothing
                self._last, self._at_line_start = time.monotonic(), False
            if report.when not in ("setup", "call", "teardown"):  # its worker has died
                self._running.pop(report.nodeid, None)

    def pytest_sessionfinish(self) -> None:
        self._ended.set()
        self._thread.join()
        os.close(self._output)

    def _watch(self) -> None:
        while not self._ended.wait(self._silence_s / 8):
            with self._lock:
                now = time.monotonic()
                if now - self._last < self._silence_s:
                    continue
                self._last = now
                running = [f"{name} ({now - since:.0f} s)" for name, since in self._running.items()]
            text = "running: " + ", ".join(running) if running else f"collecting ({now - self._began:.0f} s)"
            os.write(self._output, f"{'' if self._at_line_start else os.linesep}{text}\n".encode())
            self._at_line_start = True


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InstallPlugin:
    """install_plugin("toy", source): a real distribution on sys.path, as pip would leave it; returns its folder.

    Its entry point is the module `<name>_plugin` of `source`, in the group `group`.
    """

    def install(
        name: str, source: str, *, group: str = "vtrain.v1", entry: str | None = None, version: str = "1.0"
    ) -> Path:
        folder = tmp_path / "site" / name
        module = f"{name.replace('-', '_')}_plugin"
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry or name} = {module}\n")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, module, raising=False)
        return folder

    return install


@pytest.fixture
def python() -> Python:
    """python("-c", code): a fresh interpreter, one thread, with `env` added and `path` folders in front of its own."""

    def run(
        *args: str, env: Mapping[str, str] | None = None, path: tuple[Path, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        environment.pop("VTRAIN_PLUGINS", None) if "VTRAIN_PLUGINS" not in (env or {}) else None
        if path:
            environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
        command = [sys.executable, *args]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)

    return run


@pytest.fixture
def run_here() -> Callable[[Path], None]:
    """`vtrain run` in this process, which has imported all that a new one would have to."""

    def run(config: Path) -> None:
        from typer.testing import CliRunner

        from vtrain.cli.app import app

        done = CliRunner().invoke(app, ["run", str(config)])
        assert done.exit_code == 0, (done.output, done.exception)

    return run


@pytest.fixture(autouse=True)
def _all_plugins_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VTRAIN_PLUGINS of the shell that runs the tests changes none of them."""
    monkeypatch.delenv("VTRAIN_PLUGINS", raising=False)


@pytest.fixture(autouse=True)
def _accelerate_as_it_was() -> Iterator[None]:
    """accelerate keeps the precision that it is given first for a whole process: the next test chooses its own."""
    yield
    if found := sys.modules.get("accelerate.state"):
        found.AcceleratorState._reset_state(reset_partial_state=True)


@dataclass(frozen=True)
class Bucket:
    """A bucket of the S3 server, through Amazon's own client."""

    name: str
    endpoint: str
    client: Any

    def put(self, files: Mapping[str, bytes]) -> None:
        for key, data in files.items():
            self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def put_fast(self, key: str) -> None:
        """An empty file, put past the server's front door: a thousand of them take no time."""
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(self.name, key, b"")

    @contextmanager
    def checked_credentials(self) -> Iterator[None]:
        """The server knows no user meanwhile, and lets none in."""
        self._allow("0")
        try:
            yield
        finally:
            self._allow("inf")

    def _allow(self, actions: str) -> None:
        """So many actions without a check of who asks."""
        with urlopen(
            Request(f"{self.endpoint}/moto-api/reset-auth", actions.encode(), {"Content-Type": "text/plain"})
        ) as answer:
            assert answer.status == 200


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Bucket:
    """A fresh bucket, with credentials for it in the environment."""
    import boto3

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = boto3.client("s3", endpoint_url=s3_server)
    name = f"bucket-{abs(hash(request.node.nodeid)):x}"
    client.create_bucket(Bucket=name)
    return Bucket(name, s3_server, client)


class Environment:
    """A fresh Python environment that holds wheels alone, and sees the libraries of the environment that runs the tests behind
    them. Nothing in it asks a network. programs: the folder of its programs."""

    def __init__(self, place: Path) -> None:
        venv.create(place / "env", symlinks=True)
        self.place, self.programs = place, place / "env" / "bin"
        own = self.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place)
        libraries = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
        (Path(own.strip()) / "libraries_of_the_tests.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")

    def install(self, *projects: Path) -> None:
        """Build a wheel of each and install it, --no-deps --no-index."""
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
        for project in projects:
            wheels = self.place / f"wheels-of-{project.name}"
            build = ("wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", wheels)
            self.run(*pip, *build, project, cwd=self.place)
            (wheel,) = wheels.iterdir()
            python = self.programs / "python"
            self.run(*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=self.place)

    def run(self, program: str | Path, *arguments: str | Path, cwd: Path, code: int = 0, **variables: str) -> str:
        """What one of its programs prints, or another of an absolute path; its output is in the failure."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("VTRAIN_", "PYTHONPATH"))}
        path = os.pathsep.join((str(self.programs), os.environ["PATH"]))
        environment = {**clean, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
        command = [str(self.programs / program), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    """environment(project, ...): a fresh one with vtrain and these, each from its wheel."""

    def make(*projects: Path) -> Environment:
        made = Environment(tmp_path_factory.mktemp("environment"))
        made.install(Path(__file__).parents[1], *projects)
        return made

    return make


BUSY = b"HTTP/1.1 %d Busy\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"


@dataclass(frozen=True)
class Fault:
    """What happens to one request. kind: "drop" the connection after `after` bytes of the answer, "stall", or an HTTP status."""

    kind: str
    after: int = 0


class Proxy:
    """Listens on loopback and passes on to `target`, but for requests whose head holds `match`: each takes the next fault.

    requests: heads of the requests that matched. url: where it listens.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (str(parts.hostname), int(parts.port or 80))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.match = b"GET"
        self.faults: deque[Fault] = deque()
        self.requests: list[bytes] = []
        self._closing = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            left: int | None = None
            while not self._closing.is_set():
                ready, _, _ = select.select([client, server], [], [], 0.5)
                if client in ready:
                    head = _received(client)
                    if not head:
                        return
                    if self.match in head:
                        self.requests.append(head)
                        fault = self.faults.popleft() if self.faults else None
                        if fault is not None and fault.kind == "stall":
                            self._closing.wait(30)
                            return
                        if fault is not None and fault.kind != "drop":
                            body = b"<Error><Code>SlowDown</Code><Message>busy</Message></Error>"
                            client.sendall(BUSY % (int(fault.kind), len(body), body))
                            return
                        left = fault.after if fault is not None else None
                    server.sendall(head)
                if server in ready:
                    data = _received(server)
                    if not data:
                        return
                    client.sendall(data if left is None else data[:left])
                    if left is not None and len(data) >= left:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return
                    left = None if left is None else left - len(data)


def _received(source: socket.socket) -> bytes:
    try:
        return source.recv(1 << 16)
    except OSError:
        return b""


@pytest.fixture
def proxy(s3_server: str) -> Iterator[Proxy]:
    """Before the S3 server."""
    made = Proxy(s3_server)
    yield made
    made.close()


@pytest.fixture
def fault() -> type[Fault]:
    return Fault


class Card:
    """What torch.cuda is on a machine with `count` cards, for tests without one. It notes what it is asked, and by which thread.

    usable: whether torch can use them; wrong: what opening one raises.
    """

    def __init__(
        self, count: int = 1, capability: tuple[int, int] = (9, 0), usable: bool = True, wrong: str = ""
    ) -> None:
        self.count, self.capability, self.usable, self.wrong = count, capability, usable, wrong
        self.calls: list[tuple[object, ...]] = []
        self.threads: dict[str, set[str]] = {}
        self.peak = 5 << 30

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        self.threads.setdefault(str(call[0]), set()).add(threading.current_thread().name)

    def is_available(self) -> bool:
        return self.usable and self.count > 0

    def device_count(self) -> int:
        return self.count

    def init(self) -> None:
        if self.wrong:
            raise RuntimeError(self.wrong)

    def current_device(self) -> int:
        return 0

    def set_device(self, index: int) -> None:
        self._note("set_device", index)

    def Event(self) -> Any:  # noqa: N802 - as torch.cuda names it
        from types import SimpleNamespace

        return SimpleNamespace(record=lambda: self._note("record"), synchronize=lambda: self._note("wait"))

    def synchronize(self, index: int) -> None:
        self._note("synchronize", index)
        if self.wrong:
            raise RuntimeError(self.wrong)

    def get_device_name(self, index: int) -> str:
        return f"Stand-in {index}"

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return self.capability

    def get_device_properties(self, index: int) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(uuid=f"0000-{index}")

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 3 << 30, 80 << 30

    def memory_reserved(self, index: int) -> int:
        return 60 << 30

    def memory_allocated(self, index: int) -> int:
        return 2 << 30

    def max_memory_allocated(self, index: int) -> int:
        return self.peak

    def reset_peak_memory_stats(self, index: int) -> None:
        self._note("reset_peak", index)

    def manual_seed(self, seed: int) -> None:
        self._note("manual_seed", seed)

    def empty_cache(self) -> None:
        self._note("empty_cache")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """card(count=2, ...): this machine now seems to have such CUDA cards. Nothing can be put on them."""

    def plug(module: object = None, kind: str = "cuda", **settings: Any) -> Any:
        import torch

        made = module if module is not None else Card(**settings)
        own = torch.get_device_module

        def current_accelerator(check_available: bool = False) -> torch.device | None:
            """torch asks for one that is available, for itself: there is none."""
            return None if check_available else torch.device(kind)

        monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
        monkeypatch.setattr(torch, "get_device_module", lambda of=None: made if of == kind else own(of))
        return made

    return plug


@pytest.fixture
def card_in_ram(card: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A card whose memory is the CPU's, so that whole runs can be told to use it: the Device believes in it, tensors do not.

    A module that is sent anywhere has other memory afterwards, as one that leaves a card has: what still holds the old is stale.
    pinned: how many tensors were page-locked for it.
    """
    import torch

    from vtrain.contract import Device

    made = card()
    made.pinned = 0
    sent: Any = torch.nn.Module.to

    def to(self: torch.nn.Module, *where: Any, **how: Any) -> torch.nn.Module:
        for weight in self.parameters():
            if type(weight.data) is torch.Tensor:  # those of quanto are several, and frozen
                weight.data = weight.data.clone()
        return sent(self, *where, **how)

    monkeypatch.setattr(torch.nn.Module, "to", to)

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        made.pinned += 1
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Device, "torch", property(lambda self: torch.device("cpu")))
    monkeypatch.setattr(Device, "__str__", lambda self: "cpu")
    return made


PLAN = {
    "run": 'output_dir = "out"',
    "model": 'use = "toy"\ntrain = "full"',
    "[data]": 'use = "folder"\npath = "clips"',
    "train": "steps = 10",
    "optimizer": 'use = "adamw"\nlr = 1e-3',
}
"""The smallest file of the toy family that is valid, by table."""


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Any]:
    """Make a plan; tables given by name replace or join the smallest file that is valid."""
    from vtrain.config import load
    from vtrain.plan.make import make_plan
    from vtrain.registry import discover

    def make(processes: int = 1, more: str = "", **tables: str) -> Any:
        given = {**PLAN, **{name.replace("data", "[data]", 1): body for name, body in tables.items()}}
        text = "\n".join(f"[{name}]\n{body}" for name, body in given.items())
        file = tmp_path / "config.toml"
        file.write_text(text + "\n" + more, encoding="utf-8")
        return make_plan(load(file, discover()), processes)

    return make
