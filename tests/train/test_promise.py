"""[memory] as a user meets it: what was chosen is recorded, a resume may choose anew, and the numbers are the same."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
CHECKPOINTING = "precision.gradient_checkpointing"


def promise(within: Run, folder: Any) -> Any:
    return json.loads(within("plan", folder.config, "--json").stdout)["memory"]["promise"]


def limited(size: float) -> str:
    return f'\n[memory]\nlimit = "{size / 2**20:.6f} MiB"\n'


def constant(config: Path) -> None:
    """A rate that does not depend on the run's length."""
    config.write_text(config.read_text(encoding="utf-8").replace('"cosine"', '"constant"'), encoding="utf-8")


@pytest.fixture(autouse=True)
def _no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is of main memory."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_resume_with_less_memory_chooses_anew_and_is_the_same_run(folder, within: Run) -> None:
    constant(folder.write(steps=3, more=limited(2**32)))
    roomy = promise(within, folder)
    assert roomy["chosen"] == []
    within("run", folder.config)
    whole = json.loads((folder.output / "plan.json").read_text())
    assert whole["settings"][CHECKPOINTING] is False
    assert whole["memory"]["promise"]["limit"] == 2**32

    constant(folder.write(steps=6, more=limited(roomy["takes"] - 1)))
    tight = promise(within, folder)
    assert tight["chosen"][0].startswith(f"{CHECKPOINTING} = true")
    assert tight["takes"] < roomy["takes"]
    printed = within("run", folder.config).stdout
    assert f"changed since the checkpoint: {CHECKPOINTING}: false -> true" in printed
    assert json.loads((folder.output / "plan.json").read_text())["settings"][CHECKPOINTING] is True
    ours, tensors = folder.rows(), folder.tensors(6)

    other = type(folder)(folder.path / "plain", folder.cache)
    other.path.mkdir()
    (other.path / "clips").symlink_to(folder.path / "clips")
    constant(other.write(steps=6))
    within("run", other.config)
    assert [row["loss"] for row in ours] == [row["loss"] for row in other.rows()]
    assert all((tensors[key] == value).all() for key, value in other.tensors(6).items())


def test_the_end_of_a_run_says_what_it_took(folder, within: Run) -> None:
    printed = within("run", folder.write(steps=2)).stdout
    assert "memory of a step: at most " in printed
    ended = json.loads((folder.output / "events.jsonl").read_text().splitlines()[-1])
    assert ended["event"] == "ended"
    assert ended["peak_memory"] > 2**26
    assert ended["estimated_memory"] > 2**29


def test_a_plan_may_be_for_the_card_of_another_machine(folder, within: Run) -> None:
    config = folder.write()
    assert "24.00 GiB (--device-memory)" in within("plan", config, "--device-memory", "24GiB").stdout
    assert "--device-memory" not in within("plan", config).stdout
    said = " ".join(within("plan", config, "--device-memory", "100 MiB").stdout.split())
    assert "and --device-memory is 0.10 GiB: [memory] would find nothing that fits." in said
    done = within("plan", config, "--device-memory", "lots", check=2)
    assert '--device-memory: "lots" is no amount of memory: give a number with a unit' in done.stderr


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('limit = "much"', 'memory.limit: "much" is no amount of memory'),
        ('limit = "0 GiB"', 'memory.limit: "0 GiB" is no memory at all'),
        ("limit = 16", "memory.limit: expected"),
        ('may = ["speed"]', 'memory.may[0]: expected "checkpointing", "offload"'),
        ('most = "3 GiB"', "unknown key memory.most"),
        ('limit = "100 MiB"', "nothing that is allowed fits in 0.10 GiB (memory.limit)"),
    ],
)
def test_what_cannot_be_a_limit_is_an_error_with_its_line(folder, within: Run, table: str, said: str) -> None:
    done = within("plan", folder.write(more=f"\n[memory]\n{table}\n"), check=2)
    text = " ".join(done.stderr.split())
    assert said in text
    assert f"config.toml:{len(folder.config.read_text().splitlines())}: " in text


def test_a_model_that_nobody_measured_is_promised_nothing(folder, within: Run) -> None:
    config = folder.write(more="\n[memory]\n")
    config.write_text(config.read_text().replace('use = "toy"\n', 'use = "toy"\nwidth = 24\n'))
    assert "was never measured, so that nothing can be promised" in " ".join(
        within("plan", config, check=2).stderr.split()
    )
