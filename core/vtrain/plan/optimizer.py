"""What of the optimizer, its learning rate and its schedule cannot be, or is probably not meant."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from vtrain.config.record import Config
from vtrain.contract import Catalog, DType, OptimizerSpec, Problem
from vtrain.contract.specs import listed


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


def _moves(config: Config, spec: OptimizerSpec, catalog: Catalog | None) -> Iterator[Problem]:
    # An adapter's own weights are fp32, whatever its base is.
    trained: DType = "bf16" if config.model.table.train == "full" and config.precision.base == "bf16" else "fp32"
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


def optimizer_warnings(config: Config) -> Iterator[str]:
    """What is allowed and probably not meant; what the optimizer itself advises."""
    spec, lr, schedule = spec_of(config), learning_rate(config), config.lr_schedule
    if spec.usual_lr is not None and not spec.usual_lr[0] <= lr <= spec.usual_lr[1]:
        yield f"optimizer.lr = {lr:g} is far from what {spec.name} is usually trained with. {_usual(spec)}"
    if spec.advice is not None:
        yield from spec.advice(config.optimizer.options, schedule.use, schedule.warmup is not None)


def _usual(spec: OptimizerSpec) -> str:
    return "" if spec.usual_lr is None else "Usual are {:g} to {:g}.".format(*spec.usual_lr)
