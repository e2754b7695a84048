"""Puts a run together: denoiser, adapter, regularizers, optimizer and loop, from the model folder or a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vtrain.config.record import Config
from vtrain.contract import (
    Denoiser,
    Device,
    Event,
    Noted,
    OptimizerSpec,
    Options,
    ParameterGroup,
    RunLength,
    SamplerSpec,
)
from vtrain.data.batches import Batches
from vtrain.data.caching.caches import Caches
from vtrain.data.index import Index
from vtrain.data.seeds import derive
from vtrain.estimate.estimate import Estimate
from vtrain.estimate.render import counted
from vtrain.plan.optimizer import lr_factor
from vtrain.plan.places import CHECKPOINTS
from vtrain.plan.records import Plan
from vtrain.registry.blame import PartFault
from vtrain.registry.spelling import check_part
from vtrain.train import checkpoint
from vtrain.train.adapter import start_adapter
from vtrain.train.changes import SampleMarks, SamplesPiece, data_changes
from vtrain.train.checkpointing import checkpoint_gradients
from vtrain.train.ema import Average, has_average
from vtrain.train.eval_weights import AveragedPiece, EvalWeights, eval_weights, validating_with
from vtrain.train.failures import recorded
from vtrain.train.host_optimizer import HostWeights
from vtrain.train.loop import Ends, Loop, Requests, Validate
from vtrain.train.model import average_changed, averaged, load_model, weights_piece
from vtrain.train.offload import offload, resting
from vtrain.train.optimizer_piece import OptimizerPiece
from vtrain.train.parameters import groups, own_rates, trained
from vtrain.train.piece import Piece
from vtrain.train.pieces import (
    ConfigPiece,
    CountersPiece,
    RegularizerPiece,
)
from vtrain.train.prefetch import Prefetcher
from vtrain.train.processes import Processes
from vtrain.train.resume import RunState, Start, encoder_marks, feature_marks, versions
from vtrain.train.rollout import RolloutDraws
from vtrain.train.saving import Interval, Saver
from vtrain.train.settings import settings
from vtrain.train.spikes import ReadingsPiece, readings_piece
from vtrain.train.statistics import Statistics
from vtrain.train.step import Step, Term, open_teachers

if TYPE_CHECKING:
    from vtrain.train.sharding import Shares


@dataclass(frozen=True)
class Trainer:
    """A run ready to go. denoiser, step: the model as trained and what wraps it.

    base, data, features, encoders: marks of what it stands on, as in RunState. pieces: what a checkpoint keeps of it and loads.
    samples: what it keeps of the data. held: what stays in memory beside them until the run ends: teachers that run at each step.
    resting: in its with block the denoiser is off the card, as far as [offload] lets it. average: of [ema], None without.
    check_optimizer: raises PartFault, after a step, where the optimizer's state would not come back. notes: what loading found
    that the plan could not know. values: for evaluation, None where those in training are. readings: what it keeps of losses that
    were read and of steps that were skipped. shares: with [parallel] shard, what this process has; `named` are its shares.
    """

    plan: Plan
    estimate: Estimate
    start: Start
    data: str
    batches: Batches
    processes: Processes
    denoiser: Denoiser
    base: str
    features: Mapping[str, str]
    encoders: Mapping[str, str]
    step: Step
    optimizer: torch.optim.Optimizer
    named: list[tuple[str, Tensor]]
    check_optimizer: Callable[[], None]
    pieces: tuple[Piece, ...]
    samples: SamplesPiece
    held: ExitStack
    readings: ReadingsPiece
    average: Average | None = None
    resting: Callable[[], AbstractContextManager[None]] = nullcontext
    notes: tuple[str, ...] = ()
    values: EvalWeights | None = None
    shares: Shares | None = None
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        config, beside = self.plan.config, self.processes.device.accelerated
        saver = Saver(config.run.output_dir / CHECKPOINTS, config.checkpoint.keep, self.processes, beside=beside)
        object.__setattr__(self, "saver", saver)
        self.held.push(saver.close)

    def run(
        self,
        requests: Requests,
        validate: Validate | None = None,
        also: Sequence[Piece] = (),
        owed: Callable[[int, bool], bool] = lambda done, due: False,
    ) -> Iterator[Event]:
        """Train to the last step, or until it is asked to stop. also: pieces that others keep in the checkpoints.

        owed: as `Ends` has it.
        """
        config, state, per_epoch = self.plan.config, self.start.state, self.estimate.steps_per_epoch
        spec = config.sampler.registered.spec
        assert isinstance(spec, SamplerSpec)
        table = config.validation
        interval = Interval(table.every, per_epoch, time.monotonic()) if table else None
        if validate is not None and self.values is not None:
            validate = validating_with(self.values, self.named, validate)
        with self.held:
            prefetcher = Prefetcher(
                self.batches,
                self.plan.family,
                self.plan.sampler,
                config.run.seed,
                self.processes.device,
                self.step.needed,
                spec.timesteps_of,
                rollout_draws(config, per_epoch),
            )
            loop = Loop(
                self.processes.wrap(self.step, sharded=self.shares is not None),
                self.optimizer,
                [parameter for _, parameter in self.named],
                lr_factor(config.lr_schedule, self.estimate.steps, per_epoch),
                prefetcher,
                self.processes,
                config.train,
                # Of the step itself: DDP's wrapper has its forward alone.
                Ends(
                    _Saves(self, also),
                    validate,
                    requests,
                    self.step.observe,
                    owed,
                    self.check_optimizer,
                    self.readings.watch.see,
                    partial(recorded, self.plan, self.named, prefetcher, self.processes),
                    self.readings.skipped,
                ),
                first=state.step,
                last=self.estimate.steps,
                micro_batch=state.micro_batch,
                steps_per_epoch=per_epoch,
                seed=config.run.seed,
                average=self.average,
                statistics=Statistics(self.denoiser.blocks, self.named) if config.train.statistics else None,
                shares=self.shares,
            )
            yield from loop.run(config.checkpoint, interval, at_start=table.at_start if table else False)

    @property
    def predicting(self) -> Denoiser:
        """The denoiser for who only predicts with it."""
        return self.denoiser if self.shares is None else self.shares.denoiser

    def changes(self) -> Iterator[Noted]:
        """What loading found, and the data and features of a resumed run, where they are not what they were.

        Raises CheckpointError.
        """
        yield from map(Noted, self.notes)
        before, folder = self.start.state, self.start.folder
        if folder is None:
            return
        if (self.average is not None) != has_average(folder):
            yield Noted(average_changed(before.step, on=self.average is not None))
        yield from data_changes(before.data, self.data, SampleMarks.read(folder), SampleMarks.of(self.samples.index))
        for name, mark in self.features.items():
            if before.features.get(name, mark) != mark:
                what = "its encoder's weights or an option that shapes them changed"
                text = f"the features of {name} changed since the checkpoint: {what}"
                yield Noted(f"{text}; training continues with its saved weights")

    def save(self, also: Sequence[Piece], step: int, micro_batch: int, *, now: bool) -> Iterator[Event]:
        """Begin the checkpoint of `step`, as `Saver.save` does."""
        values = {key: setting.value for key, setting in settings(self.plan).items()}
        config = self.plan.config
        marks = (self.data, self.base, self.features, self.encoders)
        folder, origin = str(config.path.parent.absolute()), self.start.state.adapter
        state = RunState(step, micro_batch, values, *marks, folder, versions(config), origin, self.processes.machine)
        pieces = (*self.pieces, *also, self.samples, self.readings, CountersPiece(state), ConfigPiece(config.text))

        yield from self.saver.save(step, pieces, now=now)


@dataclass(frozen=True)
class _Saves:
    """The loop's way to a trainer's checkpoints. also: pieces that others keep in them."""

    trainer: Trainer
    also: Sequence[Piece]

    @property
    def writing(self) -> bool:
        return self.trainer.saver.writing

    @property
    def written(self) -> bool:
        return self.trainer.saver.written

    def save(self, step: int, micro_batch: int, *, now: bool) -> Iterator[Event]:
        yield from self.trainer.save(self.also, step, micro_batch, now=now)

    def settle(self) -> Iterator[Event]:
        yield from self.trainer.saver.settle()

    def left(self) -> Iterator[Event]:
        yield from self.trainer.saver.left()


def rollout_draws(config: Config, per_epoch: float) -> RolloutDraws | None:
    """As [train.rollout] asks for them."""
    table = config.train.rollout
    if table is None:
        return None
    return RolloutDraws(table, config.run.seed, table.ramp.in_steps(per_epoch) or 0 if table.ramp else 0)


def assemble(
    plan: Plan, estimate: Estimate, start: Start, index: Index, caches: Caches, processes: Processes
) -> Trainer:
    """Load and build everything a run needs on this process's device.

    Raises ModelError, CheckpointError or ConfigError where the parts do not fit together.
    """
    config, device = plan.config, processes.device
    away = config.offload.group is not None and device.accelerated
    sharded = config.parallel.shard and processes.count > 1
    denoiser, base, notes = load_model(plan, start, "cpu" if away or sharded else str(device))
    if start.folder is None and (origin := start_adapter(plan, denoiser)):
        start = replace(start, state=replace(start.state, adapter=origin))
    where = config.where("precision", "gradient_checkpointing")
    checkpoint_gradients(denoiser, config.precision, where)
    modules = build_regularizers(plan, processes.device)
    # The first process alone: gigabytes of weights may be hashed, and the hashes are kept in SQLite.
    features, encoders = processes.from_first(lambda: (feature_marks(plan), encoder_marks(plan)))
    with ExitStack() as held:  # what is in memory goes again if something below fails
        offloaded = offload(denoiser, config.offload, device, held) if away else None
        teachers = open_teachers(plan, str(processes.device), held)
        terms = {name: Term(modules[name], part.needs().taps, teachers.get(name)) for name, part in plan.regularizers}
        step = Step(denoiser, plan.sampler, terms, RunLength(estimate.steps, estimate.steps_per_epoch))
        # from_pretrained leaves a model in eval mode, in which dropout does nothing.
        step.train()
        shaped = trained(step)
        learned = (
            weights := weights_piece(plan, denoiser),
            *(RegularizerPiece(name, module) for name, module in modules.items()),
        )
        if start.folder is not None:
            checkpoint.load(start.folder, learned)
        shares = _shares(step, processes) if sharded else None
        named = shaped if shares is None else shares.named
        host = HostWeights(named, device) if config.offload.optimizer and device.accelerated else None
        moved = named if host is None else host.named
        optimizer = build_optimizer(plan, groups(moved, own_rates(modules), denoiser, dict(shaped)))
        values = eval_weights(optimizer, named, moved)
        pieces = (
            weights,
            *([AveragedPiece(weights, values, named, shares)] if values is not None else []),
            *learned[1:],
            kept := optimizer_piece(plan, optimizer, moved, shares),
        )
        # After the optimizer is built: its piece fills the state of these very parameters.
        if start.folder is not None:
            checkpoint.load(start.folder, [kept])
        if host is not None:
            host.step_here(optimizer)
        # After the weights are the checkpoint's: an average that it does not hold begins with them.
        average, averages = averaged(plan, denoiser, start, device, values, shares)
        if average is not None:
            held.callback(average.close)
        readings = readings_piece(plan, start)
        batches = Batches(plan, caches, index)
        held.callback(batches.close)
        return Trainer(
            plan, estimate, start, index.mark(), batches, processes, denoiser, base, features, encoders, step, optimizer,
            named, kept.check, (*pieces, *averages), SamplesPiece(index), held.pop_all(), readings, average,
            partial(resting, denoiser.module, offloaded, to_cpu=config.offload.model_cpu, device=device), notes, values,
            shares,
        )  # fmt: skip


def build_optimizer(plan: Plan, parameters: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """The optimizer of these parameters. Raises PartFault for what is none, or does not move all of them."""
    part = plan.config.optimizer
    assert isinstance(part.registered.spec, OptimizerSpec)
    optimizer: object = part.registered.spec.build(part.options, parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        found = repr(optimizer) if optimizer is None or isinstance(optimizer, type) else type(optimizer).__name__
        raise PartFault("optimizer", "", f"its build gave {found}, not a torch.optim.Optimizer")
    moved = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    left = [name for group in parameters for name, weight in group.parameters if id(weight) not in moved]
    if left:
        more = ", ..." if len(left) > 3 else ""
        what = f"its build was given {counted(len(left), 'parameter')} that no group of it has ({', '.join(left[:3])}{more})"
        raise PartFault("optimizer", "", what)
    if any("lr" not in group for group in optimizer.param_groups):
        raise PartFault("optimizer", "", 'a group of it has no "lr", which the learning-rate schedule sets')
    return optimizer


def _shares(step: Step, processes: Processes) -> Shares:
    """Spread the step over the processes; what this one has."""
    from vtrain.train.sharding import Shares  # torch.distributed.tensor takes seconds to import

    return Shares(step, processes.device, processes.count)


def optimizer_piece(
    plan: Plan, optimizer: torch.optim.Optimizer, named: list[tuple[str, Tensor]], shares: Shares | None = None
) -> OptimizerPiece:
    """What a checkpoint keeps of it. Raises PartFault where it keeps what no checkpoint brings back."""
    part = plan.config.optimizer
    assert isinstance(part.registered.spec, OptimizerSpec)
    stateful = part.registered.spec.state_bytes > 0
    piece = OptimizerPiece(optimizer, named, own_keys(part.options), stateful, shares=shares)
    piece.check(stepped=False)
    return piece


def own_keys(options: Options) -> frozenset[str]:
    """Settings of an optimizer that the configuration file gives: a checkpoint never overrides them."""
    return frozenset(type(options).model_fields)


def build_regularizers(plan: Plan, device: Device) -> dict[str, nn.Module]:
    """Each regularizer's own module, its first weights a function of the run's seed."""
    modules = {}
    for name, regularizer in plan.regularizers:
        # Seeded and drawn on the CPU, then moved: the same first weights on every device.
        Device().seed(derive(plan.config.run.seed, f"regularizer {name}"))
        module = regularizer.load(dict.fromkeys(regularizer.needs().taps, plan.family.block_width))
        check_part("loss module", module, name)
        modules[name] = module.to(device.torch)
    return modules
