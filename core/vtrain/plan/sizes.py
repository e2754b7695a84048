"""Sizes of data and of validation against what the family can do: those that it cannot decode, and those far beyond its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vtrain.config.record import Config
from vtrain.contract import ClipShape, Family, ModelError, Problem, TokenGrid
from vtrain.plan.datasets import pointed_out, token_grid
from vtrain.plan.records import DatasetPlan, ValidationPlan

Clips = tuple[tuple[ClipShape, TokenGrid | None], ...]

_BEYOND = 1.5
"""An area by this factor larger than any of the checkpoint's own is pointed out."""


def longest(family: Family, made: Sequence[DatasetPlan]) -> Clips:
    """The longest clip of each bucket that the family takes, once, with its tokens."""
    shapes = {shape for each in made for shape in _shapes(each)}
    taken = [shape for shape in sorted(shapes) if _by_rule(family, shape) and _refusal(family, shape) is None]
    return tuple((shape, token_grid(family, shape)) for shape in taken)


def refused(
    config: Config, family: Family, made: Sequence[DatasetPlan], validation: ValidationPlan | None
) -> Iterator[Problem]:
    """Sizes that are by the family's rules and that it has no latents for, in its own words."""
    clips = [(each.where, shape) for each in made for shape in _shapes(each)]
    clips += [(config.where("validation", "size"), validation.shape)] if validation is not None else []
    for where, shape in clips:
        fault = _refusal(family, shape) if _by_rule(family, shape) else None
        if fault is not None:
            yield Problem(where, f"{fault.where or 'this size'}: {fault.what}", fault.remedy)


def beyond(family: Family, made: Sequence[DatasetPlan], validation: ValidationPlan | None) -> Iterator[str]:
    """Sizes far larger than all that the family's checkpoint was made for; smaller ones are cheap, and often meant."""
    named = family.resolutions()
    name, largest = max(((name, size) for name in named for size in named[name]), key=lambda each: each[1].area)
    # What a number in `resolution` is beside the family's own sizes has been said.
    sizes = {f"[[data]] {each.id}": each.sizes for each in made if not pointed_out(family, each.table)}
    sizes |= {"[validation] size": (validation.shape.size,)} if validation is not None else {}
    for where, of in sizes.items():
        worst = max(of, key=lambda size: size.area, default=largest)
        if worst.area > _BEYOND * largest.area:
            times = f"{worst.area / largest.area:.1f} times the area of {largest}"
            yield (
                f'{where}: {worst} has {times}, the largest size of this checkpoint\'s own, "{name}": '
                "it has not been trained on videos that large"
            )


def _shapes(dataset: DatasetPlan) -> list[ClipShape]:
    return [ClipShape(dataset.frames, size.height, size.width) for size in dataset.sizes]


def _by_rule(family: Family, clip: ClipShape) -> bool:
    """Frames by the family's rule, edges by its stride: what is not has its problem already."""
    stride = family.pixel_stride
    return family.frame_rule.accepts(clip.frames) and not (clip.height % stride or clip.width % stride)


def _refusal(family: Family, clip: ClipShape) -> Problem | None:
    """Why the family has no latents for a clip that is by its rules: a decoder that takes no single row, for example."""
    try:
        family.latent_shape(clip)
    except ModelError as error:
        return error.problems[0]
    except ValueError as error:
        return Problem("", f"{error}.", "Choose another size, or another number of frames.")
    return None
