"""What a configuration file holds of secrets, and where it ends up."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_a_refused_secret_is_not_in_the_error(folder, within: Run) -> None:
    """Nor is a password in a URL, nor what stands beside them."""
    folder.write()
    text = folder.config.read_text()
    wrong = {
        'path = "s3://b/c"\nstorage_options = { secret = "abcd-value" }': "storage_options holds secret",
        'path = "https://me:abcd-value@host/clips"': "the URL holds a password",
        'use = "tar"\npath = "https://host/{0..99999999}.tar?token=abcd-value"': "https://host/{0..99999999}.tar?***",
    }
    for lines, words in wrong.items():
        changed = lines if lines.startswith("use") else f'use = "folder"\n{lines}'
        folder.config.write_text(text.replace('use = "folder"\npath = "clips"', changed))
        done = within("config", "show", folder.config, check=2)
        assert words in done.stderr
        assert "abcd-value" not in done.stderr + done.stdout


def test_the_query_of_a_url_is_in_no_file_of_a_run_but_the_copies_of_its_configuration(
    folder, within: Run, tmp_path: Path
) -> None:
    """A chain through fsspec's cache of files, as no server is needed for one: its folder's name looks like a query."""
    (tmp_path / "clips?token=abcd-value").symlink_to(tmp_path / "clips")
    folder.write(steps=3)
    text = folder.config.read_text().replace('"clips"', f'"simplecache::file://{tmp_path}/clips?token=abcd-value"')
    folder.config.write_text(text)
    shown = within("config", "show", folder.config)
    assert "abcd-value" not in shown.stdout
    assert "clips?***" in shown.stdout
    printed = within("run", folder.config)
    assert "abcd-value" not in printed.stdout + printed.stderr
    files = [path for path in folder.output.rglob("*") if path.is_file()]
    holding = {path.relative_to(folder.output).as_posix() for path in files if b"abcd-value" in path.read_bytes()}
    assert holding == {"config.toml", "checkpoints/step-000003/config.toml"}
    state = json.loads((folder.output / "checkpoints" / "step-000003" / "state.json").read_text(encoding="utf-8"))
    assert state["settings"]["data[0].path"].endswith("/clips?***")
    assert any(b"clips?***" in path.read_bytes() for path in files if "tensorboard" in path.parts)
