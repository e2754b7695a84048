"""What vtrain_sanavideo registers: the family `sanavideo`, its fixed schedule `sanavideo-flow`, the regularizer `crepa`."""

from __future__ import annotations

from vtrain.contract import FamilySpec, RegularizerSpec, SamplerSpec, hookimpl
from vtrain_sanavideo.crepa import Crepa
from vtrain_sanavideo.crepa_options import CrepaOptions
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.flow import SanaVideoFlow
from vtrain_sanavideo.options import SanaVideoFlowOptions, SanaVideoOptions

FLOW = SamplerSpec(
    name="sanavideo-flow",
    summary="SANA-Video's official schedule: trained with shift 3, sampled with the checkpoint's own scheduler",
    options=SanaVideoFlowOptions,
    build=SanaVideoFlow,
)

SANAVIDEO = FamilySpec(
    name="sanavideo",
    summary="SANA-Video: the Sana video transformer, the Wan VAE and the Gemma-2 text encoder",
    options=SanaVideoOptions,
    build=SanaVideoFamily,
    sampler=FLOW.name,
    fixed_sampler=True,
)

CREPA = RegularizerSpec(
    name="crepa",
    summary="CREPA: a block's hidden states aligned with DINOv2's features of the same and the neighbouring frames",
    options=CrepaOptions,
    build=Crepa,
)


@hookimpl
def vtrain_families() -> tuple[FamilySpec, ...]:
    return (SANAVIDEO,)


@hookimpl
def vtrain_samplers() -> tuple[SamplerSpec, ...]:
    return (FLOW,)


@hookimpl
def vtrain_regularizers() -> tuple[RegularizerSpec, ...]:
    return (CREPA,)
