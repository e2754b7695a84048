"""The optimizer, its learning rate over the run and its statistics: what cannot be, what is hardly meant, what a plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

from vtrain.config.record import Config
from vtrain.config.tables import LrScheduleTable
from vtrain.contract import (
    Catalog,
    Decay,
    DType,
    Family,
    OptimizedRun,
    OptimizerSpec,
    Problem,
    SupportsAdapterNames,
    scheduled,
)
from vtrain.contract.specs import bytes_text, listed
from vtrain.plan.adapter import adapted_modules
from vtrain.plan.records import Plan


def spec_of(config: Config) -> OptimizerSpec:
    spec = config.optimizer.registered.spec
    assert isinstance(spec, OptimizerSpec)
    return spec


def learning_rate(config: Config) -> float:
    return float(config.optimizer.options.model_dump()["lr"])  # of every optimizer: `fault_of` asks for it


def optimizer_problems(config: Config, catalog: Catalog | None) -> Iterator[Problem]:
    """Its library is not there; it does not move what is trained; its rate destroys the model; a schedule by the clock."""
    spec, lr = spec_of(config), learning_rate(config)
    if spec.library is not None and find_spec(spec.library[0]) is None:
        what = f'the optimizer "{spec.name}" needs the package "{spec.library[0]}", which is not installed.'
        yield Problem(config.where("optimizer", "use"), what, f'Run: pip install "{spec.library[1]}"')
    yield from _moves(config, spec, catalog)
    if config.lr_schedule.warmup is not None and config.lr_schedule.warmup.unit == "seconds":
        what = 'lr_schedule.warmup needs "steps" or "epochs": a schedule in seconds would not be the same run twice.'
        yield Problem(config.where("lr_schedule", "warmup"), what)
    if spec.sensible_lr is not None and lr > spec.sensible_lr:
        what = f"optimizer.lr = {lr:g}: above {spec.sensible_lr:g} {spec.name} destroys what the model knows."
        yield Problem(config.where("optimizer", "lr"), what, _usual(spec))


def trained_type(config: Config) -> DType:
    """Of the weights that are trained. An adapter's own are fp32, whatever its base is."""
    return "bf16" if config.model.table.train == "full" and config.precision.base == "bf16" else "fp32"


def _moves(config: Config, spec: OptimizerSpec, catalog: Catalog | None) -> Iterator[Problem]:
    trained = trained_type(config)
    if trained in spec.moves:
        return
    if trained == "fp32":
        what = f'the optimizer "{spec.name}" moves {listed(spec.moves)} weights, and fp32 is trained.'
        yield Problem(config.where("optimizer", "use"), what, "Use another optimizer.")
        return
    what = (
        f'full training of bf16 weights with optimizer "{spec.name}": its updates are smaller than bf16 can hold, so the '
        "weights would not move."
    )
    others = [part.spec.name for part in catalog.parts.values() if _moves_bf16(part.spec)] if catalog else []
    instead = f", or an optimizer that moves bf16 weights: {listed(others)}" if others else ""
    yield Problem(config.where("precision", "base"), what, f'Use base = "fp32" with mixed = "bf16"{instead}.')


def _moves_bf16(spec: object) -> bool:
    return isinstance(spec, OptimizerSpec) and "bf16" in spec.moves


def optimizer_warnings(config: Config, family: Family) -> Iterator[str]:
    """What is allowed and probably not meant; what the optimizer itself advises."""
    spec, lr = spec_of(config), learning_rate(config)
    if spec.usual_lr is not None and not spec.usual_lr[0] <= lr <= spec.usual_lr[1]:
        yield f"optimizer.lr = {lr:g} is far from what {spec.name} is usually trained with. {_usual(spec)}"
    yield from _advised(config, family, None)


def optimizer_length_warnings(config: Config, family: Family, steps: int) -> Iterator[str]:
    """What the optimizer advises more when the run's length is known."""
    before = set(_advised(config, family, None))
    yield from (text for text in _advised(config, family, steps) if text not in before)


def _advised(config: Config, family: Family, steps: int | None) -> Sequence[str]:
    spec, schedule = spec_of(config), config.lr_schedule
    if spec.advice is None:
        return ()
    run = OptimizedRun(
        schedule.use, schedule.warmup is not None, trained_type(config), _trained_names(config, family), steps
    )
    return spec.advice(config.optimizer.options, run)


def _trained_names(config: Config, family: Family) -> tuple[str, ...] | None:
    if not isinstance(family, SupportsAdapterNames):
        return None
    lora = config.model.table.lora
    return tuple(family.weight_shapes()) if lora is None else tuple(adapted_modules(family, lora))


def _usual(spec: OptimizerSpec) -> str:
    return "" if spec.usual_lr is None else "Usual are {:g} to {:g}.".format(*spec.usual_lr)


Factor = Callable[[int], float]
"""Zero-based optimizer step -> factor of the optimizer's lr, in [0, 1]."""


def lr_factor(table: LrScheduleTable, steps: int, steps_per_epoch: float) -> Factor:
    """The schedule over `steps` optimizer steps: warm-up, then the rest of the run, its last step at `end` exactly."""
    warmup = table.warmup.in_steps(steps_per_epoch) or 0 if table.warmup else 0
    # From the last step of the warm-up, the first at the full rate, to the last step of the run.
    length = steps - 1 - max(warmup - 1, 0)
    restarts = table.use == "cosine_with_restarts"
    decay: Decay = "cosine" if table.use == "cosine_with_restarts" else table.use
    cycles = table.cycles if restarts else 1

    def factor(step: int) -> float:
        return scheduled(
            step, full=1.0, end=table.end, warmup=warmup, length=length, decay=decay, power=table.power, cycles=cycles
        )

    return factor


STATISTICS_COST = (
    "such a step takes a pass over the blocks' outputs, and one over gradients and weights, more than others"
)


def optimizer_words(plan: Plan) -> str:
    spec = spec_of(plan.config)
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
