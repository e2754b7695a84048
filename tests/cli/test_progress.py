"""The line of numbers while a run trains."""

from __future__ import annotations

from dataclasses import replace

from vtrain.cli.progress import numbers
from vtrain.train.metrics import Row

ROW = Row(3, 0.3, 1.25, 1.5, 1e-3, 0.5, [], [], 0.1, 0.0, 2**30)


def test_a_loss_of_several_terms_is_shown_with_each_of_them_apart() -> None:
    line = numbers(replace(ROW, terms={"crepa/loss": -0.25, "crepa/weight": 0.5}), 10, 0.1)
    assert line.startswith("loss 1.2500  flow_loss 1.5  crepa/loss -0.25  crepa/weight 0.5  lr 1.00e-03  norm 0.5")


def test_a_flow_loss_alone_is_shown_once() -> None:
    assert "flow_loss" not in numbers(ROW, 10, 0.1)
    assert numbers(ROW, 10, 0.1).endswith("left 0:00:01  1.0 GiB")
