"""What both sides of step.py do, by mode: vtrain by its configuration, the bare loop (bare.py) by what is said here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import bare
import torch
from workload import BASE, Model, write_config

from vtrain.contract import ParameterGroup

LR = 1e-5
"""As workload.py's configuration has it."""


@dataclass(frozen=True)
class Work:
    """What both sides do. mode: of workload.py. changes, more: of its configuration, for vtrain.

    accumulate, average: of the bare loop. optimizer: of vtrain_builtin, that the bare loop has too; "": its own AdamW.
    """

    mode: str
    changes: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    accumulate: int = 1
    average: bool = False
    optimizer: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights."""
        return torch.bfloat16 if self.optimizer or BASE[self.mode] == "bf16" else torch.float32


def _in_bf16(optimizer: str) -> Work:
    changes = {'base = "fp32"': 'base = "bf16"', 'use = "adamw"': f'use = "{optimizer}"'}
    return Work("full", changes, optimizer=optimizer)


WORKS = {
    "full": Work("full"),
    "lora": Work("lora"),
    "accumulate-4": Work("full", {"[train]": "[train]\naccumulate = 4"}, accumulate=4),
    "ema": Work("full", more="\n[ema]\n", average=True),
    "lora-ema": Work("lora", more="\n[ema]\n", average=True),
    "bf16-stochastic": _in_bf16("adamw_bf16"),
    "bf16-kahan": _in_bf16("optimi-adamw"),
}
"""By mode."""


def same_optimizer(net: torch.nn.Module, name: str) -> torch.optim.Optimizer:
    """vtrain_builtin's, over what the bare loop trains."""
    from vtrain_builtin.plugin import vtrain_optimizers

    spec = next(each for each in vtrain_optimizers() if each.name == name)
    decayed, plain = bare.decay_groups(net)
    groups = [ParameterGroup(tuple(decayed), decay=True), ParameterGroup(tuple(plain), decay=False)]
    built: torch.optim.Optimizer = spec.build(spec.options.model_validate({"lr": LR}), groups)
    return built


def config_of(folder: Path, model: Model, mode: str, log_every: int, name: str) -> Path:
    """vtrain's configuration of one of WORKS."""
    work = WORKS[mode]
    return write_config(folder, model, work.mode, log_every, name, work.more, work.changes)
