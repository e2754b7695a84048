"""What vtrain_builtin registers."""

from __future__ import annotations

from vtrain.contract import DataBackendSpec, OptimizerSpec, RegularizerSpec, SamplerSpec, TrackerSpec, hookimpl
from vtrain_builtin.adamw import ADAMW, ADAMW8BIT, ADAMW_BF16
from vtrain_builtin.flow import FLOW
from vtrain_builtin.folder import FOLDER
from vtrain_builtin.frames import FRAMES
from vtrain_builtin.layersync import LAYERSYNC
from vtrain_builtin.manifest import MANIFEST
from vtrain_builtin.muon import MUON
from vtrain_builtin.prodigy import PRODIGY
from vtrain_builtin.schedule_free import SCHEDULE_FREE
from vtrain_builtin.tar import TAR
from vtrain_builtin.tensorboard import TENSORBOARD
from vtrain_builtin.torch_optimi import OPTIMI


@hookimpl
def vtrain_data_backends() -> tuple[DataBackendSpec, ...]:
    return (FOLDER, FRAMES, MANIFEST, TAR)


@hookimpl
def vtrain_samplers() -> tuple[SamplerSpec, ...]:
    return (FLOW,)


@hookimpl
def vtrain_regularizers() -> tuple[RegularizerSpec, ...]:
    return (LAYERSYNC,)


@hookimpl
def vtrain_optimizers() -> tuple[OptimizerSpec, ...]:
    return (ADAMW, ADAMW_BF16, ADAMW8BIT, MUON, *OPTIMI, PRODIGY, SCHEDULE_FREE)


@hookimpl
def vtrain_trackers() -> tuple[TrackerSpec, ...]:
    return (TENSORBOARD,)
