"""`layersync`: a block learns from a deeper block of the same model; no encoder, no parameters of its own.

LayerSync (Haghighi et al., arXiv 2510.12581): the loss gains weight x L, where L is the mean over tokens of the negative cosine
between the output of a block (the student) and that of a deeper one (the teacher), through which no gradient goes. The tokens are
those of all frames. Kept as its authors train: no projector, one pair of blocks, the whole of both outputs. Ours: a clip's mask
weighs its tokens, as it weighs the flow loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from vtrain.contract import ClipShape, Duration, Needs, Options, Problem, RegularizerSpec, RunLength, TokenGrid, fixed

if TYPE_CHECKING:
    from torch import nn


class LayerSyncOptions(Options):
    """Options of `layersync`. The blocks are those of the authors' 28-block model (its 8th and 16th)."""

    student: int = fixed(7, ge=0, description="block that learns, from 0")
    teacher: int = fixed(
        15, ge=1, description="deeper block that it learns from, and that gets no gradient of it, from 0"
    )
    weight: float = Field(0.2, ge=0, description="factor of the loss; 0 switches it off")
    until: Duration | None = Field(
        None, description='it ends after so much training, such as "5000 steps"; absent: it stays to the end'
    )

    @model_validator(mode="after")
    def _one_is_deeper(self) -> Self:
        if self.teacher <= self.student:
            raise ValueError(f"teacher {self.teacher} is not deeper than student {self.student}: give a later block")
        if self.until is not None and self.until.unit == "seconds":
            raise ValueError('until: "steps" or "epochs"; an end in seconds would not be the same run twice')
        return self


class LayerSync:
    """The regularizer, built from its options."""

    def __init__(self, options: LayerSyncOptions) -> None:
        self._options = options

    def needs(self) -> Needs:
        return Needs(taps=(self._options.student, self._options.teacher))

    def describe(self) -> Sequence[tuple[str, str]]:
        chosen = self._options
        ends = "" if chosen.until is None else f", until {chosen.until}"
        return (
            ("layersync", f"block {chosen.student} learns from block {chosen.teacher}, weight {chosen.weight:g}{ends}"),
        )

    def check(self, clips: Sequence[tuple[ClipShape, TokenGrid | None]]) -> Sequence[Problem]:
        """Whatever clips there are will do."""
        return ()

    def warnings(self) -> Sequence[str]:
        return () if self._options.weight else ("weight is 0: it has no effect",)

    def weight_at(self, step: int, run: RunLength) -> float:
        """SupportsWeight."""
        until = None if self._options.until is None else self._options.until.in_steps(run.per_epoch)
        return 0.0 if until is not None and step >= until else self._options.weight

    def load(self, tap_widths: Mapping[int, int]) -> nn.Module:
        """tap_widths: both the same, as the blocks of a model are. Raises ValueError for others."""
        from vtrain_builtin.alignment import LayerAlignment

        chosen = self._options
        widths = tap_widths[chosen.student], tap_widths[chosen.teacher]
        if widths[0] != widths[1]:
            raise ValueError(f"block {chosen.student} has width {widths[0]}, block {chosen.teacher} has {widths[1]}")
        return LayerAlignment(chosen.student, chosen.teacher, chosen.weight, chosen.until)


LAYERSYNC = RegularizerSpec(
    name="layersync",
    summary="a block learns from a deeper block of the same model (LayerSync)",
    options=LayerSyncOptions,
    build=LayerSync,
)
