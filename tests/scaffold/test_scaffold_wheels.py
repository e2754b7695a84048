"""Each kind's new package, from its wheel beside vtrain's: its own tests, `plugins check`, ruff and mypy --strict pass as it was
generated.

Slow (two minutes): for each of six packages a wheel, a pytest with torch, and mypy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtrain.contract import KINDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generated")


@pytest.fixture(scope="module")
def fresh(environment: Callable[..., Any]) -> Any:
    """An environment with vtrain alone."""
    return environment()


@pytest.mark.parametrize("kind", [kind.kind for kind in KINDS])
def test_a_new_package_passes_its_tests_and_checks_from_its_wheel(kind: str, place: Path, fresh: Any) -> None:
    name = f"vtrain-new-{kind}".replace("_", "-")
    said = fresh.run("vtrain", "plugins", "new", name, "--kind", kind.replace("_", "-"), cwd=place)
    assert "Next:" in said
    package = place / name
    fresh.install(package)
    where = fresh.run("python", "-c", f"import {name.replace('-', '_')} as it; print(it.__file__)", cwd=place)
    assert Path(where.strip()).is_relative_to(fresh.place)
    (report,) = json.loads(fresh.run("vtrain", "plugins", "check", name, "--json", cwd=place))
    assert report["problems"] == 0
    assert report["parts"] == [f"{kind.replace('_', ' ')} new-{kind.replace('_', '-')}"]
    passed = fresh.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=package)
    assert " passed" in passed
    assert "failed" not in passed
    for arguments in (("check", "--no-cache"), ("format", "--check", "--no-cache")):
        fresh.run(sys.executable, "-m", "ruff", *arguments, ".", cwd=package)
    fresh.run("python", "-m", "mypy", "--cache-dir", str(place / "types"), cwd=package)
