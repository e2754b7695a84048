"""What a plan says of the optimizer, its rate over the run, and statistics."""

from __future__ import annotations

from vtrain.contract import OptimizerSpec
from vtrain.estimate.estimate import bytes_text
from vtrain.plan.optimizer import learning_rate
from vtrain.plan.records import Plan

STATISTICS_COST = (
    "such a step takes a pass over the blocks' outputs, and one over gradients and weights, more than others"
)


def optimizer_words(plan: Plan) -> str:
    spec = plan.config.optimizer.registered.spec
    assert isinstance(spec, OptimizerSpec)
    full = plan.config.model.table.train == "full"
    weights = plan.base if full else "fp32"
    held = f", {bytes_text(plan.family.parameters * spec.bytes_of_state(weights))}" if full else ""
    return f"{spec.name}, {spec.bytes_of_state(weights):.3g} bytes of state for each {weights} weight that is trained{held}"


def schedule_words(plan: Plan) -> str:
    table, lr = plan.config.lr_schedule, learning_rate(plan.config)
    warmup = f"warm-up {table.warmup} from 0, then " if table.warmup else ""
    how = {
        "constant": "constant",
        "linear": "linear",
        "cosine": "cosine",
        "cosine_with_restarts": f"cosine, {table.cycles} time{'s' * (table.cycles > 1)}",
        "polynomial": f"polynomial of power {table.power:g}",
    }[table.use]
    ends = "" if table.use == "constant" else f" to {table.end * lr:g} at the last step"
    return f"{lr:g}, {warmup}{how}{ends}"
