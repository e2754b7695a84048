"""`layersync` in whole runs, beside another regularizer, on a family that knows of neither."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch

Run = Callable[..., subprocess.CompletedProcess[str]]
BOTH = """
[[regularizer]]
use = "toy-smooth"
block = 1

[[regularizer]]
use = "layersync"
student = 0
teacher = 2
until = "4 steps"
"""


def test_two_regularizers_train_together_and_each_tells_its_own_numbers(folder, within: Run) -> None:
    within("run", folder.write(more=BOTH, log_every=1))
    rows = folder.rows()
    own = {"layersync/loss", "layersync/cosine", "layersync/weight"}
    assert [own & row["terms"].keys() for row in rows] == [own] * 4 + [set()] * 2
    for row in rows:
        terms = row["terms"]
        added = terms["toy-smooth/loss"] + terms.get("layersync/loss", 0.0)
        assert row["loss"] == pytest.approx(row["flow_loss"] + added, rel=1e-5)
    for terms in (row["terms"] for row in rows[:4]):
        assert terms["layersync/loss"] == pytest.approx(-0.2 * terms["layersync/cosine"])
        assert terms["layersync/weight"] == pytest.approx(0.2)


def test_with_crepa_and_another_the_loss_is_the_sum_of_all_terms(folder, within: Run) -> None:
    """CREPA's encoder is a DINOv2 of random weights; its features come from the cache."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder.path / "dino")
    crepa = '\n[[regularizer]]\nuse = "crepa"\nblock = 1\nencoder = "./dino"\n'
    within("run", folder.write(more=BOTH + crepa, log_every=1, steps=3))
    for row in folder.rows():
        added = sum(row["terms"][f"{name}/loss"] for name in ("toy-smooth", "layersync", "crepa"))
        assert row["loss"] == pytest.approx(row["flow_loss"] + added, rel=1e-5)
        assert row["terms"]["crepa/loss"] != 0


def test_checkpointing_changes_no_number(folder, another, within: Run) -> None:
    other = another()
    within("run", folder.write(more=BOTH, steps=3))
    other.write(more=BOTH, steps=3)
    text = other.config.read_text(encoding="utf-8").replace(
        'mixed = "no"', 'mixed = "no"\ngradient_checkpointing = false'
    )
    other.config.write_text(text, encoding="utf-8")
    within("run", other.config)
    assert other.rows() == folder.rows()


def test_teacher_and_student_are_refused_in_the_plan_where_the_model_has_no_such_block(folder, within: Run) -> None:
    config = folder.write(more='\n[[regularizer]]\nuse = "layersync"\n')
    done = within("plan", config, check=2)
    assert "layersync: it reads block 7; the model has blocks 0 to 2." in done.stderr
    assert "layersync: it reads block 15; the model has blocks 0 to 2." in done.stderr


def test_the_plan_tells_the_blocks(folder, within: Run) -> None:
    printed = within("plan", folder.write(more=BOTH)).stdout
    assert "block 0 learns from block 2, weight 0.2, until 4 steps" in printed
