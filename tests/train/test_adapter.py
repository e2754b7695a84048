"""Runs of adapters: their kinds resume bit for bit, start from files, and are exported by families without another library."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vtrain.config.tables import LoraTable
from vtrain.contract.adapters import targets_of
from vtrain.plan.adapter import lora_scale
from vtrain.train.adapter import folded_settings
from vtrain.train.settings import Setting, compare

Run = Callable[..., subprocess.CompletedProcess[str]]


def with_keys(config: Path, *lines: str) -> Path:
    """More keys of [model.lora]."""
    text = config.read_text(encoding="utf-8").replace("dropout = 0.2\n", "\n".join(("dropout = 0.2", *lines, "")))
    config.write_text(text, encoding="utf-8")
    return config


@pytest.mark.parametrize(
    "lines", [("dora = true",), ("rslora = true", 'init = "orthogonal"')], ids=["dora", "rslora and orthogonal"]
)
def test_each_kind_of_adapter_resumes_bit_for_bit(folder, within: Run, lines: tuple[str, ...]) -> None:
    within("run", with_keys(folder.write(train="lora"), *lines))
    expected, rows = folder.tensors(6), folder.rows()
    assert any(name.endswith("lora_magnitude_vector") for name in expected) == ("dora = true" in lines)
    shutil.rmtree(folder.output / "checkpoints" / "step-000006")
    assert "resuming from" in within("run", folder.config).stdout
    got = folder.tensors(6)
    assert got.keys() == expected.keys()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    assert folder.rows() == rows


def test_a_run_starts_from_an_adapter_once_and_records_it(folder, another, within: Run) -> None:
    """The file may be gone when the run resumes, which has the adapter in its checkpoint."""
    first = another()
    within("run", first.write(train="lora", steps=2, save=2))
    source = first.output / "checkpoints" / "step-000002"
    said = within("run", with_keys(folder.write(train="lora", lr=1e-12), f'start = "{source}"')).stdout
    assert f"the adapter starts from {source}" in said
    before, after = load_file(source / "adapter_model.safetensors"), folder.tensors(3)
    assert all(torch.allclose(after[f"adapter_model.safetensors:{name}"], value) for name, value in before.items())
    state = json.loads((folder.output / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["adapter"].endswith(str(source / "adapter_model.safetensors"))
    assert len(state["adapter"].split()[0]) == 64
    expected = folder.tensors(6)
    shutil.rmtree(folder.output / "checkpoints" / "step-000006")
    shutil.rmtree(first.output)
    assert "model.lora.start has no effect: this run resumes" in within("plan", folder.config).stdout
    within("run", folder.config)
    assert all(torch.equal(value, folder.tensors(6)[name]) for name, value in expected.items())
    again = json.loads((folder.output / "checkpoints" / "step-000006" / "state.json").read_text())
    assert again["adapter"] == state["adapter"]


def test_a_start_of_a_family_that_names_no_weights_is_refused_when_it_is_loaded(folder, another, within: Run) -> None:
    first = another()
    within("run", first.write(train="lora", steps=2, save=2))
    source = first.output / "checkpoints" / "step-000002"
    done = within("run", with_keys(folder.write(train="lora"), 'targets = ["to_q"]', f'start = "{source}"'), check=2)
    assert "does not fit the adapter that is described here" in done.stderr
    assert f"{folder.config}:" in done.stderr


def test_an_adapter_that_no_step_moved_is_told_at_its_checkpoint(folder, within: Run) -> None:
    done = within("run", folder.write(train="lora", lr=1e-60, steps=2, save=2))
    assert "the adapter changes nothing: each of its lora_B is zero" in done.stdout
    events = [json.loads(line) for line in (folder.output / "events.jsonl").read_text().splitlines()]
    assert any("changes nothing" in json.dumps(event) for event in events)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_family_without_another_library_exports_with_a_word_of_that(folder, within: Run, train: str) -> None:
    within("run", folder.write(train=train, steps=2, save=2))
    form = "lora" if train == "lora" else "merged"
    done = within("export", folder.output, "--format", form)
    assert f"exported step 2 as {form}" in done.stdout
    assert "no loader of another library" in done.stdout
    target = folder.output / "exports" / f"step-000002-{form}"
    assert (target / "export.json").is_file()
    assert "nothing is written over" in within("export", folder.output, "--format", form, check=2).stderr
    assert "is none of pipeline" in within("export", folder.output, "--format", "lorra", check=2).stderr
    assert "SupportsReference" in within("export", folder.output, "--format", "pipeline", check=2).stderr


def test_rslora_as_an_alpha_has_the_same_scale() -> None:
    table = LoraTable(rank=6, alpha=5.0, rslora=True)
    folded = folded_settings({"r": 6, "lora_alpha": 5.0, "use_rslora": True})
    assert folded.keys() == {"r", "lora_alpha"}
    assert math.isclose(lora_scale(table), float(str(folded["lora_alpha"])) / 6)
    assert math.isclose(lora_scale(table), 5 / math.sqrt(6))


def test_a_checkpoint_of_before_has_a_plain_adapter() -> None:
    now = {
        "model.lora.rank": Setting(4, "refuse"), "model.lora.dora": Setting(False, "refuse"),
        "model.lora.rslora": Setting(False, "refuse"), "model.lora.init": Setting("kaiming", "refuse"),
    }  # fmt: skip
    assert compare({"model.lora.rank": 4}, now) == []
    found = compare({"model.lora.rank": 4}, {**now, "model.lora.dora": Setting(True, "refuse")})
    assert [(change.key, change.old, change.new) for change in found] == [("model.lora.dora", False, True)]


def test_targets_are_the_shortest_that_name_the_modules_and_no_others() -> None:
    among = ["a.0.q", "a.0.out.0", "a.1.q", "a.1.out.0", "b.q", "b.net.0"]
    assert targets_of(["a.0.q", "a.1.q", "b.q"], among) == ["q"]
    assert targets_of(["a.0.out.0", "a.1.out.0"], among) == ["out.0"]
    assert targets_of(["a.0.q", "b.q"], among) == ["a.0.q", "b.q"]
