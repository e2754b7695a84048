"""What vtrain_wan registers: the families `wan21` and `wan22-ti2v`."""

from __future__ import annotations

from functools import partial

from vtrain.contract import Family, FamilySpec, hookimpl
from vtrain_wan.options import Wan21Options, WanOptions


def _family(options: WanOptions, *, version: str) -> Family:
    # Imported here: `vtrain plugins list` needs the options alone.
    from vtrain_wan import family

    return family.TI2VFamily(options) if version == "2.2" else family.WanFamily(options)


WAN21 = FamilySpec(
    name="wan21",
    summary="Wan 2.1 text-to-video, 1.3B and 14B: the Wan transformer, the Wan VAE and the UMT5 text encoder",
    options=Wan21Options,
    build=partial(_family, version="2.1"),
    sampler="flow",
)

WAN22_TI2V = FamilySpec(
    name="wan22-ti2v",
    summary="Wan 2.2 TI2V 5B: the Wan transformer, the Wan 2.2 VAE and the UMT5 text encoder",
    options=WanOptions,
    build=partial(_family, version="2.2"),
    sampler="flow",
)


@hookimpl
def vtrain_families() -> tuple[FamilySpec, ...]:
    return (WAN21, WAN22_TI2V)
