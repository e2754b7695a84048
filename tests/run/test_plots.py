"""The drawing of a plan: `vtrain plan --plots`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from vtrain.contract import ConfigError, RunLength, SupportsWeight
from vtrain.run import plots
from vtrain.run.prepare import Prepared
from vtrain_builtin.layersync import LAYERSYNC

PlanOf = Callable[..., Any]


class Length:
    """Of an estimate, what is drawn."""

    steps, steps_per_epoch, epochs = 5000, 10.0, 500.0


@pytest.fixture
def prepared(plan_of: PlanOf) -> Prepared:
    more = '[[regularizer]]\nuse = "layersync"\nstudent = 0\nteacher = 2\nuntil = "300 epochs"'
    schedule = 'use = "cosine"\nwarmup = "100 steps"\nend = 0.1'
    plan = plan_of(lr_schedule=schedule, more=more, optimizer='use = "adamw"\nlr = 2e-4')
    return Prepared(plan, None, Length())  # type: ignore[arg-type]


def drawn(prepared: Prepared, target: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    figures: list[Figure] = []
    save = Figure.savefig

    def kept(self: Figure, *args: Any, **more: Any) -> None:
        figures.append(self)
        save(self, *args, **more)

    monkeypatch.setattr(Figure, "savefig", kept)
    plots.draw_plots(prepared, target)
    return figures[0]


def test_it_shows_rate_levels_and_weights_as_the_run_will_have_them(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate, levels, weight = drawn(prepared, tmp_path, monkeypatch).axes
    (curve, _) = rate.get_lines()
    steps, rates = curve.get_xdata(), curve.get_ydata()
    assert (steps[0], steps[-1]) == (1, 5000)
    assert len(steps) <= plots.POINTS
    assert (rates[0], max(rates), rates[-1]) == (pytest.approx(2e-6), pytest.approx(2e-4), pytest.approx(2e-5))
    assert "2e-05 at the last step" in rate.get_title()
    heights = [bar.get_height() for bar in levels.patches[:50]]
    assert sum(heights) / 50 == pytest.approx(1.0)  # a density over levels from 0 to 1
    assert sum(heights[:25]) == pytest.approx(25, rel=0.1)  # logit-normal around one half
    ((stairs,), title) = weight.get_lines(), weight.get_title()
    assert title == "weight of layersync, as its schedule alone has it"
    weights = dict(zip(stairs.get_xdata(), stairs.get_ydata(), strict=True))
    assert {value for step, value in weights.items() if step <= 3000} == {0.2}
    assert {value for step, value in weights.items() if step > 3000} == {0.0}


def test_a_folder_is_made_and_a_file_is_taken_by_its_name(prepared: Prepared, tmp_path: Path) -> None:
    assert plots.draw_plots(prepared, tmp_path / "a" / "b") == tmp_path / "a" / "b" / plots.NAME
    assert plots.draw_plots(prepared, tmp_path / "own.png") == tmp_path / "own.png"
    with Image.open(tmp_path / "own.png") as image:
        assert image.format == "PNG"
        assert image.width > 500


def test_what_cannot_be_drawn_is_said(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="what is drawn is a PNG"):
        plots.draw_plots(prepared, tmp_path / "plan.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(plots.DataError, match="the drawing cannot be written"):
        plots.draw_plots(prepared, tmp_path / "file" / "plan.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r'pip install "vtrain\[plot\]"'):
        plots.draw_plots(prepared, tmp_path)


def test_a_regularizers_weight_is_that_of_its_module() -> None:
    options = LAYERSYNC.options.model_validate({"student": 0, "teacher": 1, "weight": 0.3, "until": "4 steps"})
    part, run = LAYERSYNC.build(options), RunLength(10, 5.0)
    assert isinstance(part, SupportsWeight)
    module: Any = part.load({0: 4, 1: 4})
    for step in range(10):
        assert part.weight_at(step, run) == (0.3 if module.active(step, run) else 0.0)


def test_the_plan_itself_draws_nothing_and_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, vtrain.cli.plan; print({'torch', 'matplotlib', 'vtrain.run.plots'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
