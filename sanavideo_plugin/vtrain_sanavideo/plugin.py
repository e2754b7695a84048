"""What vtrain_sanavideo registers: the family `sanavideo`, its fixed schedule `sanavideo-flow`, the regularizer `crepa`."""

from __future__ import annotations

from collections.abc import Mapping

from vtrain.contract import Family, FamilySpec, Regularizer, RegularizerSpec, Sampler, SamplerSpec, hookimpl
from vtrain_sanavideo.crepa_options import CrepaOptions
from vtrain_sanavideo.options import MOTION_SCORE, SanaVideoFlowOptions, SanaVideoOptions

# A part's own module is imported when it is built: `vtrain plugins list` needs the options alone.


def _flow(options: SanaVideoFlowOptions, scheduler: Mapping[str, object]) -> Sampler:
    from vtrain_sanavideo.flow import SanaVideoFlow

    return SanaVideoFlow(options, scheduler)


def _family(options: SanaVideoOptions) -> Family:
    from vtrain_sanavideo.family import SanaVideoFamily

    return SanaVideoFamily(options)


def _crepa(options: CrepaOptions) -> Regularizer:
    from vtrain_sanavideo.crepa import Crepa

    return Crepa(options)


FLOW = SamplerSpec(
    name="sanavideo-flow",
    summary="SANA-Video's official schedule: trained with shift 3, sampled with the checkpoint's own scheduler",
    options=SanaVideoFlowOptions,
    build=_flow,
    timesteps_of="sanavideo",
)

SANAVIDEO = FamilySpec(
    name="sanavideo",
    summary="SANA-Video: the Sana video transformer, the Wan (480p) or LTX-2 (720p) VAE, the Gemma-2 text encoder",
    options=SanaVideoOptions,
    build=_family,
    sampler=FLOW.name,
    fixed_sampler=True,
    caption_extras=(MOTION_SCORE,),
)

CREPA = RegularizerSpec(
    name="crepa",
    summary="CREPA: a block's hidden states aligned with DINOv2's features of the same and the neighbouring frames",
    options=CrepaOptions,
    build=_crepa,
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
