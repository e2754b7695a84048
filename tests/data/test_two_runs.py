"""Two runs that fill one cache at once, each a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vtrain.data.caching.sharing import Leases
from vtrain.data.scanning.scan import scan

RUN = """
import importlib.util, json, os, sys, time
from pathlib import Path

spec = importlib.util.spec_from_file_location("fixtures", sys.argv[1])
fixtures = importlib.util.module_from_spec(spec)
sys.modules["fixtures"] = fixtures
spec.loader.exec_module(fixtures)

from vtrain.data.caching.caches import fill_caches
from vtrain.data.scanning.scan import scan

root, seconds = Path(sys.argv[2]), float(sys.argv[3])
setup = fixtures.Setup(root)

def encode():
    with (root / "encoded").open("a") as log:
        log.write(f"{os.getpid()}\\n")
    time.sleep(seconds)

setup.family.on_encode = encode
if len(sys.argv) > 4:
    setup.use_colours(encode)
plan = setup.plan()
samples = scan(plan).samples
(root / f"ready-{os.getpid()}").touch()
while not (root / "go").exists():
    time.sleep(0.01)
filled = fill_caches(plan, samples, (), "cpu", lambda *_: None)
print(json.dumps([setup.family.encoded_texts, setup.family.clips, dict(filled.skipped)]))
"""


@pytest.fixture
def many(setup, make_video):
    for k in range(8):
        setup.add(f"{k}.mp4", make_video(frames=27 + k, fps=24), f"caption {k}")
    scan(setup.plan())
    return setup


@pytest.fixture
def start(many) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a run that is ready to fill, and takes so many seconds for a clip. "features": also features of each."""
    running: list[subprocess.Popen[str]] = []

    def begin(seconds: float, *more: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-c",
            RUN,
            str(Path(__file__).with_name("conftest.py")),
            str(many.root),
            str(seconds),
            *more,
        ]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def encoded(many) -> list[str]:
    log = many.root / "encoded"
    return log.read_text().split() if log.exists() else []


def result(process: subprocess.Popen[str]) -> tuple[list, int, dict]:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return tuple(json.loads(out))


@pytest.mark.long
def test_both_end_with_the_whole_cache_and_each_clip_caption_and_features_are_encoded_once(many, start) -> None:
    runs = [start(0.15, "features"), start(0.15, "features")]
    wait_for(lambda: len(list(many.root.glob("ready-*"))) == 2)
    (many.root / "go").touch()
    (first_texts, first, left), (second_texts, second, also_left) = map(result, runs)
    assert left == also_left == {}
    assert first + second == 8
    assert min(first, second) > 0, "one did all the work"
    captions = [caption for caption, _ in [*first_texts, *second_texts]]
    assert sorted(captions) == sorted({"", *(f"caption {k}" for k in range(8))})
    assert len(encoded(many)) == 8 + 8, "a clip's latents, or its features, were made twice"
    assert len(list((many.cache / "features").rglob("*.safetensors"))) == 8
    assert len(list(many.cache.rglob("*.safetensors"))) == 8 + 9 + 8
    assert list(many.cache.rglob("*.part")) == []


@pytest.mark.long
def test_what_a_killed_run_had_claimed_is_made_by_the_other(many, start) -> None:
    slow, other = start(60), start(0.01)
    wait_for(lambda: len(list(many.root.glob("ready-*"))) == 2)
    (many.root / "go").touch()
    wait_for(lambda: str(slow.pid) in encoded(many))
    wait_for(lambda: len(list((many.cache / "video").rglob("*.safetensors"))) >= 4)
    assert other.poll() is None, "it did not wait for what the slow one had claimed"
    slow.send_signal(signal.SIGKILL)
    _, clips, left = result(other)
    assert clips == 8
    assert left == {}


def test_a_claim_is_the_processs_own_and_ends_with_it(tmp_path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from vtrain.data.caching.sharing import Leases\n"
        "with Leases(Path(sys.argv[1])) as leases: print(leases.take('a'), leases.take('b'), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline().split() == ["True", "True"]
        with Leases(tmp_path) as leases:
            assert not leases.take("a")
            assert not leases.take("b")
            assert leases.take("c")
            leases.drop("c")
            other.kill()
            other.wait()
            assert leases.take("a")
            assert leases.take("b")
    assert (tmp_path / "leases").stat().st_size == 0
