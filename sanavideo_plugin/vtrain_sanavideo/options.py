"""Options of the family `sanavideo` and of its sampler."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vtrain.contract import CaptionExtra, CheckpointOptions, DType, ModelSource, Options, fixed

MOTION_SCORE = CaptionExtra(
    "motion_score",
    "int",
    'how much moves, written at the end of the prompt (" motion score: 30."), as the model was trained',
    minimum=0,
    default="the option motion_score",
)
"""The one thing that SANA-Video reads of a clip beside its caption."""


class SanaVideoOptions(CheckpointOptions):
    """[model] with use = "sanavideo"."""

    path: ModelSource = fixed(
        description="the checkpoint: a folder in diffusers layout, or a hub id such as "
        '"Efficient-Large-Model/SANA-Video_2B_480p_diffusers"'
    )
    vae_path: ModelSource | None = fixed(
        None, description="another copy of the same VAE: a folder or hub id; absent: the VAE of path"
    )
    motion_score: Annotated[int, Field(ge=0)] | Literal["none"] = fixed(
        30,
        description='added to prompts as " motion score: 30.", unless a clip has a score of its own; "none": nothing',
    )
    instruction: str | None = fixed(
        None,
        description='put before every prompt; absent: the video instruction of SanaVideoPipeline; "" is none',
    )
    vae_precision: DType = fixed(
        "fp32",
        description="storage type of the VAE; official training used the 480p model's in fp32, the 720p model's in bf16",
    )


class SanaVideoFlowOptions(Options):
    """[sampler] with use = "sanavideo-flow". The schedule is the model's own, so neither key has an effect."""

    shift: float | None = Field(
        None, gt=0, description="no effect: training uses the official shift 3, sampling the checkpoint's own"
    )
    auto_shift: bool | None = Field(None, description="no effect: the official schedule does not depend on the size")
