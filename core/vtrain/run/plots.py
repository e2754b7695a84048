"""A drawing of what a run will do over its steps: learning rate, noise levels, the weights of regularizers. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vtrain.contract import ConfigError, DataError, Problem, RunLength, SupportsWeight
from vtrain.plan.optimizer import learning_rate, lr_factor
from vtrain.run.prepare import Prepared

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "plan.png"
DRAWS = 100_000
"""Noise levels that are drawn for their density: each bar of fifty then has an error of about two hundredths."""
POINTS = 2_000
"""Steps of a curve that are computed, at most."""
BLUE, GREY = "#2b6cb0", "#718096"


def draw_plots(prepared: Prepared, target: Path) -> Path:
    """Write the PNG: `target` itself if it ends in .png, else NAME in that folder. Gives its path.

    Raises ConfigError without matplotlib or for another kind of file, DataError where it cannot be written.
    """
    if target.suffix and target.suffix.lower() != ".png" and not target.is_dir():
        what = f'"{target.name}" ends in {target.suffix}, and what is drawn is a PNG.'
        raise ConfigError(Problem("--plots", what, 'Give a folder, or a file that ends in ".png".'))
    file = target if target.suffix.lower() == ".png" and not target.is_dir() else target / NAME
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a display
    except ImportError as error:
        what = "drawing needs matplotlib, which is not installed."
        raise ConfigError(Problem("--plots", what, 'Run: pip install "vtrain[plot]"')) from error
    plan, estimate = prepared.plan, prepared.estimate
    run = RunLength(estimate.steps, estimate.steps_per_epoch)
    weighted = [(name, part) for name, part in plan.regularizers if isinstance(part, SupportsWeight)]
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _learning_rate(axes, prepared),
        lambda axes: _noise_levels(axes, prepared),
        *(_weight(name, part, run) for name, part in weighted),
    ]
    figure = Figure(figsize=(8, 2.6 * len(panels)), dpi=120, layout="constrained")
    figure.suptitle(f"{plan.config.run.name}: {estimate.steps:,} steps, {estimate.epochs:.4g} epochs", fontsize=11)
    for number, panel in enumerate(panels):
        panel(figure.add_subplot(len(panels), 1, number + 1))
    with _written(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="png")
    return file


@contextmanager
def _written(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"the drawing cannot be written: {error.strerror or error}."
        raise DataError(Problem(str(file), what, "Give another place with --plots.")) from error


def _over(steps: int, value: Callable[[int], float]) -> tuple[list[int], list[float]]:
    """(1-based steps, values): every step, or POINTS of them with the first and the last."""
    chosen = range(steps) if steps <= POINTS else sorted({round(i * (steps - 1) / (POINTS - 1)) for i in range(POINTS)})
    return [step + 1 for step in chosen], [value(step) for step in chosen]


def _learning_rate(axes: Axes, prepared: Prepared) -> None:
    config, estimate = prepared.plan.config, prepared.estimate
    lr = learning_rate(config)
    factor = lr_factor(config.lr_schedule, estimate.steps, estimate.steps_per_epoch)
    steps, rates = _over(estimate.steps, lambda step: lr * factor(step))
    _curve(axes, steps, rates)
    spec = config.optimizer.registered.spec
    what = "factor of the rate that it finds" if spec.name == "prodigy" else "learning rate"
    shape = config.lr_schedule.use.replace("_", " ")
    title = f"{what} ({spec.name}, {shape}): at most {max(rates):.3g}, {rates[-1]:.3g} at the last step"
    axes.set_title(title, fontsize=10)
    warmup = config.lr_schedule.warmup
    full = warmup.in_steps(estimate.steps_per_epoch) if warmup else None
    if full is not None and full <= estimate.steps:
        axes.axvline(full, color=GREY, linewidth=0.8, linestyle="--")
        axes.annotate(f" warm-up ends at step {full:,}", (full, 0), color=GREY, fontsize=8, va="bottom")


def _weight(name: str, part: SupportsWeight, run: RunLength) -> Callable[[Axes], None]:
    def panel(axes: Axes) -> None:
        _curve(axes, *_over(run.steps, lambda step: part.weight_at(step, run)))
        axes.set_title(f"weight of {name}, as its schedule alone has it", fontsize=10)

    return panel


def _curve(axes: Axes, steps: list[int], values: list[float]) -> None:
    # A value holds for a whole step: in a short run the stairs show.
    axes.step(steps, values, where="mid", color=BLUE, linewidth=1.5)
    if len(steps) == 1:
        axes.plot(steps, values, "o", color=BLUE)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylim(0, max(*values, 1e-12) * 1.08)
    axes.margins(x=0.01)
    _quiet(axes)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))


def _noise_levels(axes: Axes, prepared: Prepared) -> None:
    """Of the sampler's own draws, from the run's seed."""
    import torch

    plan = prepared.plan
    generator = torch.Generator().manual_seed(plan.config.run.seed)
    drawn = plan.sampler.draw(DRAWS, generator).sigma.double()
    low, middle, high = (float(drawn.quantile(share)) for share in (0.1, 0.5, 0.9))
    axes.hist(drawn.numpy(), bins=50, range=(0, 1), density=True, color=BLUE, alpha=0.35, edgecolor=BLUE, linewidth=0.4)
    axes.axvline(middle, color=BLUE, linewidth=1.2)
    axes.axvspan(low, high, color=GREY, alpha=0.12, linewidth=0)
    words = f"median {middle:.2f}; eight of ten between {low:.2f} and {high:.2f}"
    axes.set_title(
        f"density of the noise levels trained at ({plan.config.sampler.registered.spec.name}): {words}", fontsize=10
    )
    axes.set_xlabel("noise level (sigma): 0 is the clean video, 1 noise alone", fontsize=8)
    axes.set_xlim(0, 1)
    _quiet(axes)


def _quiet(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
