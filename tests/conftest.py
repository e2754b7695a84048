"""Fixtures that several layers' tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent

import pytest

InstallPlugin = Callable[..., Path]
Python = Callable[..., "subprocess.CompletedProcess[str]"]


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


@pytest.fixture(autouse=True)
def _all_plugins_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VTRAIN_PLUGINS of the shell that runs the tests changes none of them."""
    monkeypatch.delenv("VTRAIN_PLUGINS", raising=False)
