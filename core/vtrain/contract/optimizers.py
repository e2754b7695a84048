"""What more an optimizer can be than a torch.optim.Optimizer. As in protocols.py, abilities are found by isinstance."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OptimizedRun:
    """What `OptimizerSpec.advice` may ask of the run.

    schedule: lr_schedule.use. warms_up: whether lr_schedule.warmup is there. trained: the type of the weights that are trained.
    names: of the denoiser's weights that are trained, or of its layers that get an adapter; None: its family does not tell.
    steps: how many optimizer steps it takes; None: not known yet, and it is asked again when the clips are counted.
    """

    schedule: str
    warms_up: bool
    trained: Literal["fp32", "bf16"] = "fp32"
    names: tuple[str, ...] | None = None
    steps: int | None = None


class Optimizer(Protocol):
    """What OptimizerSpec.build gives: a torch.optim.Optimizer. *torch*"""

    param_groups: list[dict[str, Any]]
    state: MutableMapping[Any, Any]

    def step(self) -> object: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


@runtime_checkable
class SupportsEvalWeights(Protocol):
    """An optimizer that trains at other weights than those that it is after, such as schedule-free ones (arXiv 2405.15682).

    Validation, averages (EMA) and what is exported take the others; steps, and a checkpoint's own files, those in training.
    """

    def eval_weight(self, weight: Tensor) -> Tensor:
        """A new tensor like `weight`, one of its parameters: what it is for evaluation. Nothing of training is changed, no bit."""
        ...
