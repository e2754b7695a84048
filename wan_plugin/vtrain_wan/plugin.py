"""What vtrain_wan registers: the families `wan21` and `wan22-ti2v`, with their options."""

from __future__ import annotations

from typing import Literal

from vtrain.contract import CheckpointOptions, Family, FamilySpec, fixed, hookimpl


class Wan21Options(CheckpointOptions):
    """[model] with use = "wan21"."""

    task: Literal["text-to-video", "image-to-video"] | None = fixed(
        None, description="what the checkpoint must be made for; absent: whichever it is"
    )
    size: Literal["1.3B", "14B"] | None = fixed(
        None, description="which size the checkpoint must be; absent: whichever it is"
    )


def _family(options: CheckpointOptions) -> Family:
    # Imported here: `vtrain plugins list` needs the options alone.
    from vtrain_wan.family import TI2VFamily, Wan21Family

    if isinstance(options, Wan21Options):
        return Wan21Family(options, options.task or "", options.size or "")
    return TI2VFamily(options)


WAN21 = FamilySpec(
    name="wan21",
    summary="Wan 2.1, text-to-video 1.3B and 14B, image-to-video 14B: the Wan transformer and VAE, UMT5 and CLIP",
    options=Wan21Options,
    build=_family,
    sampler="flow",
    sampler_options={"shift": 3.0},
)
WAN22_TI2V = FamilySpec(
    name="wan22-ti2v",
    summary="Wan 2.2 TI2V 5B: the Wan transformer, the Wan 2.2 VAE and the UMT5 text encoder",
    options=CheckpointOptions,
    build=_family,
    sampler="flow",
    sampler_options={"shift": 5.0},
)


@hookimpl
def vtrain_families() -> tuple[FamilySpec, ...]:
    return (WAN21, WAN22_TI2V)
