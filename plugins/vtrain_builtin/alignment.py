"""The loss module of `layersync`, apart from it because this imports torch, and options and plans do without."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vtrain.contract import Duration, LossTerm, RunLength, StepView


class LayerAlignment(nn.Module):
    """weight x -mean over tokens of cos(student, teacher), the teacher outside the graph. No parameters.

    Metrics: `cosine`, the mean cosine itself; `weight`. until: it is called before that much training is done.
    """

    def __init__(self, student: int, teacher: int, weight: float, until: Duration | None) -> None:
        super().__init__()
        self._student, self._teacher = student, teacher
        self._weight = weight
        self._until = until

    def active(self, step: int, run: RunLength) -> bool:
        end = None if self._until is None else self._until.in_steps(run.per_epoch)
        return self._weight > 0 and (end is None or step < end)

    def over(self, step: int, run: RunLength) -> bool:
        return not self.active(step, run)

    def forward(self, view: StepView) -> LossTerm:
        student, teacher = view.taps[self._student], view.taps[self._teacher].detach()
        cosines = F.cosine_similarity(student.float(), teacher.float(), dim=-1)  # under autocast the taps are bf16
        mean = cosines.mean() if view.mask is None else masked_mean(cosines, view.mask)
        # new_full fills on the device: a number copied there would be waited for.
        return LossTerm(-self._weight * mean, {"cosine": mean.detach(), "weight": mean.new_full((), self._weight)})


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over clips of the mean of a clip's tokens, weighted by mask. values (B, f', h', w'); mask (B, f, h, w)."""
    _, frames, height, width = values.shape
    weights = F.adaptive_avg_pool3d(mask[:, None], (frames, height, width))[:, 0]
    return ((values * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)).mean()
