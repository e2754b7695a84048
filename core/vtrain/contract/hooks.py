"""The six registration hooks. A plugin's entry point in the group `vtrain.v1` is a module, or an object, with some of these.

Hooks describe; objects work: each returns specs once, takes no argument, and is never called again during a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pluggy

from vtrain.contract.specs import (
    DataBackendSpec,
    FamilySpec,
    OptimizerSpec,
    RegularizerSpec,
    SamplerSpec,
    Spec,
    TrackerSpec,
)

PROJECT = "vtrain"
API_VERSION = 1
ENTRY_POINT_GROUP = f"{PROJECT}.v{API_VERSION}"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """The hook specifications."""

    @hookspec
    def vtrain_families(self) -> Iterable[FamilySpec]:
        """Model families: text encoder, video codec and denoiser on a model folder."""
        return ()

    @hookspec
    def vtrain_regularizers(self) -> Iterable[RegularizerSpec]:
        """Loss terms beside the flow loss."""
        return ()

    @hookspec
    def vtrain_samplers(self) -> Iterable[SamplerSpec]:
        """Noise schedules, for training and sampling."""
        return ()

    @hookspec
    def vtrain_data_backends(self) -> Iterable[DataBackendSpec]:
        """Storages that hold datasets."""
        return ()

    @hookspec
    def vtrain_optimizers(self) -> Iterable[OptimizerSpec]:
        """Optimizers."""
        return ()

    @hookspec
    def vtrain_trackers(self) -> Iterable[TrackerSpec]:
        """Experiment trackers."""
        return ()


HOOK_SPECS: Mapping[str, type[Spec]] = {
    "vtrain_families": FamilySpec,
    "vtrain_regularizers": RegularizerSpec,
    "vtrain_samplers": SamplerSpec,
    "vtrain_data_backends": DataBackendSpec,
    "vtrain_optimizers": OptimizerSpec,
    "vtrain_trackers": TrackerSpec,
}
