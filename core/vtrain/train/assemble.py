"""Puts a run together: denoiser, adapter, regularizers, optimizer and loop, from the model folder or a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from vtrain.config.record import Config
from vtrain.contract import (
    CheckpointError,
    Denoiser,
    Device,
    Event,
    Noted,
    OptimizerSpec,
    Options,
    ParameterGroup,
    Problem,
    RunLength,
    SamplerSpec,
    Saved,
    SupportsBlockWeights,
    SupportsLora,
    Warned,
)
from vtrain.data.batches import Batches
from vtrain.data.caching.caches import Caches
from vtrain.data.index import Index
from vtrain.data.seeds import derive
from vtrain.estimate.estimate import Estimate
from vtrain.estimate.render import counted
from vtrain.plan.optimizer import lr_factor
from vtrain.plan.places import CHECKPOINTS
from vtrain.plan.precision import adapter_targets
from vtrain.plan.records import Plan
from vtrain.registry.blame import PartFault
from vtrain.registry.spelling import check_part
from vtrain.train import checkpoint
from vtrain.train.adapter import start_adapter
from vtrain.train.changes import SampleMarks, SamplesPiece, data_changes
from vtrain.train.checkpoint import Piece
from vtrain.train.checkpointing import checkpoint_gradients
from vtrain.train.ema import Average, AveragePiece, has_average
from vtrain.train.eval_weights import AveragedPiece, EvalWeights, eval_weights, validating_with
from vtrain.train.failures import recorded
from vtrain.train.host_optimizer import HostWeights
from vtrain.train.loop import Ends, Interval, Loop, Requests, Validate
from vtrain.train.offload import offload, resting
from vtrain.train.parameters import add_lora, base_mark, groups, lora_settings, own_rates, trained
from vtrain.train.pieces import (
    AdapterPiece,
    ConfigPiece,
    CountersPiece,
    DenoiserPiece,
    OptimizerPiece,
    RegularizerPiece,
)
from vtrain.train.precision import quantise
from vtrain.train.prefetch import Prefetcher
from vtrain.train.processes import Processes
from vtrain.train.readback import remarks
from vtrain.train.resume import RunState, Start, encoder_marks, feature_marks, versions
from vtrain.train.rollout import RolloutDraws
from vtrain.train.settings import settings
from vtrain.train.spikes import ReadingsPiece, readings_piece
from vtrain.train.statistics import Statistics
from vtrain.train.step import Step, Term, open_teachers


@dataclass(frozen=True)
class Trainer:
    """A run ready to go. denoiser, step: the model as trained and what wraps it.

    base, data, features, encoders: marks of what it stands on, as in RunState. pieces: what a checkpoint keeps of it and loads.
    samples: what it keeps of the data. held: what stays in memory beside them until the run ends: teachers that run at each step.
    resting: in its with block the denoiser is off the card, as far as [offload] lets it. average: of [ema], None without.
    check_optimizer: raises PartFault, after a step, where the optimizer's state would not come back. notes: what loading found
    that the plan could not know. values: for evaluation, None where those in training are. readings: what it keeps of losses that
    were read and of steps that were skipped.
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
                self.processes.wrap(self.step),
                self.optimizer,
                [parameter for _, parameter in self.named],
                lr_factor(config.lr_schedule, self.estimate.steps, per_epoch),
                prefetcher,
                self.processes,
                config.train,
                # Of the step itself: DDP's wrapper has its forward alone.
                Ends(
                    partial(self.save, also),
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
            )
            yield from loop.run(config.checkpoint, interval, at_start=table.at_start if table else False)

    def changes(self) -> Iterator[Noted]:
        """What loading found, and the data and features of a resumed run, where they are not what they were.

        Raises CheckpointError.
        """
        yield from map(Noted, self.notes)
        before, folder = self.start.state, self.start.folder
        if folder is None:
            return
        if (self.average is not None) != has_average(folder):
            yield Noted(_average_changed(before.step, on=self.average is not None))
        yield from data_changes(before.data, self.data, SampleMarks.read(folder), SampleMarks.of(self.samples.index))
        for name, mark in self.features.items():
            if before.features.get(name, mark) != mark:
                what = "its encoder's weights or an option that shapes them changed"
                text = f"the features of {name} changed since the checkpoint: {what}"
                yield Noted(f"{text}; training continues with its saved weights")

    def save(self, also: Sequence[Piece], step: int, micro_batch: int) -> Iterator[Event]:
        """Write the checkpoint of `step` on the first process and let old ones go. Raises CheckpointError on all."""
        values = {key: setting.value for key, setting in settings(self.plan).items()}
        config = self.plan.config
        marks = (self.data, self.base, self.features, self.encoders)
        folder, origin = str(config.path.parent.absolute()), self.start.state.adapter
        state = RunState(step, micro_batch, values, *marks, folder, versions(config), origin, self.processes.machine)
        pieces = (*self.pieces, *also, self.samples, self.readings, CountersPiece(state), ConfigPiece(config.text))

        def write() -> tuple[Saved, list[str]]:
            parent = config.run.output_dir / CHECKPOINTS
            folder = checkpoint.write(parent, step, pieces)
            said = remarks(folder, pieces)
            try:
                return Saved(step, folder, tuple(checkpoint.prune(parent, config.checkpoint.keep, folder))), said
            # The new checkpoint is whole and has verified: old ones that stay cost disk alone.
            except OSError as error:
                return Saved(step, folder), [*said, f"an older checkpoint could not be deleted: {error}"]

        # The pieces in the order in which `checkpoint.write` gathers them on the first process: each may be collective.
        if not self.processes.first:
            for piece in pieces:
                piece.gather(keep=False)
        saved, troubles = self.processes.from_first(write)
        yield saved
        yield from map(Warned, troubles)


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
    denoiser, base, notes = load_model(plan, start, "cpu" if away else str(device))
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
        named = trained(step)
        host = HostWeights(named, device) if config.offload.optimizer and device.accelerated else None
        moved = named if host is None else host.named
        optimizer = build_optimizer(plan, groups(moved, own_rates(modules), denoiser))
        values = eval_weights(optimizer, named, moved)
        pieces = (
            weights := weights_piece(plan, denoiser),
            *([AveragedPiece(weights, values, named)] if values is not None else []),
            *(RegularizerPiece(name, module) for name, module in modules.items()),
            kept := optimizer_piece(plan, optimizer, moved),
        )
        # After the optimizer is built: its piece fills the state of these very parameters.
        if start.folder is not None:
            checkpoint.load(start.folder, pieces)
            if host is not None:
                host.take()  # what the checkpoint has put into the weights
        if host is not None:
            host.step_here(optimizer)
        # After the weights are the checkpoint's: an average that it does not hold begins with them.
        average, averages = averaged(plan, denoiser, start, device, values)
        if average is not None:
            held.callback(average.close)
        readings = readings_piece(plan, start)
        batches = Batches(plan, caches, index)
        held.callback(batches.close)
        return Trainer(
            plan, estimate, start, index.mark(), batches, processes, denoiser, base, features, encoders, step, optimizer,
            named, kept.check, (*pieces, *averages), SamplesPiece(index), held.pop_all(), readings, average,
            partial(resting, denoiser.module, offloaded, to_cpu=config.offload.model_cpu, device=device), notes, values,
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


def optimizer_piece(plan: Plan, optimizer: torch.optim.Optimizer, named: list[tuple[str, Tensor]]) -> OptimizerPiece:
    """What a checkpoint keeps of it. Raises PartFault where it keeps what no checkpoint brings back."""
    part = plan.config.optimizer
    assert isinstance(part.registered.spec, OptimizerSpec)
    piece = OptimizerPiece(optimizer, named, own_keys(part.options), part.registered.spec.state_bytes > 0)
    piece.check(stepped=False)
    return piece


def own_keys(options: Options) -> frozenset[str]:
    """Settings of an optimizer that the configuration file gives: a checkpoint never overrides them."""
    return frozenset(type(options).model_fields)


def load_model(plan: Plan, start: Start, device: str) -> tuple[Denoiser, str, tuple[str, ...]]:
    """The denoiser with its first weights, of the model folder or a checkpoint, with a new adapter under LoRA; the base's mark,
    and what could not be quantised where the plan does not know it."""
    config = plan.config
    lora = config.model.table.lora
    weights = None if lora else start.folder  # a checkpoint of LoRA holds the adapter alone
    # What is quantised goes to the device as such: there its bf16 weights may have no room.
    denoiser = plan.family.load_denoiser("cpu" if plan.storage.quantised else device, plan.loaded, weights)
    check_part("denoiser", denoiser)
    if lora is None:
        denoiser.module.requires_grad_(True)
        return denoiser, "", ()
    # Before the adapter: it renames the modules that it wraps, and its own weights change with each step. Before quantising too:
    # it names the model's weights, however they are stored.
    base = base_mark(denoiser.module)
    if start.folder is not None and base != start.state.base:
        what = f"its adapter was trained on other weights than {plan.config.where('model', 'path')} gives now."
        raise CheckpointError(Problem(str(start.folder), what, "Restore the model, or start again elsewhere."))
    notes = quantised_base(plan, denoiser, device) if plan.storage.quantised else ()
    seed = derive(config.run.seed, "adapter")
    add_lora(denoiser, lora, seed, config.where("model", "lora", "targets"))
    return denoiser, base, notes


def quantised_base(plan: Plan, denoiser: Denoiser, device: str) -> tuple[str, ...]:
    """Quantise it in place; what could not be, where the plan has not said it."""
    targets = adapter_targets(plan.config, denoiser.lora_targets if isinstance(denoiser, SupportsLora) else None)
    there = plan.config.precision.quantize_on == "accelerator"
    words = quantise(denoiser, plan.storage, targets, device, there=there)
    said = isinstance(plan.family, SupportsBlockWeights)
    return () if said or not words else (f"precision.base: {words}",)


def weights_piece(plan: Plan, denoiser: Denoiser) -> DenoiserPiece | AdapterPiece:
    """What is trained of the denoiser."""
    lora = plan.config.model.table.lora
    if lora is not None:
        return AdapterPiece(denoiser, lora_settings(denoiser, lora))
    return DenoiserPiece(denoiser, lambda folder: plan.family.load_denoiser("cpu", "fp32", folder))


def averaged(
    plan: Plan, denoiser: Denoiser, start: Start, device: Device, values: EvalWeights | None
) -> tuple[Average | None, tuple[AveragePiece, ...]]:
    """The average of what is trained of the denoiser, as [ema] asks and the checkpoint has it, and its piece.

    What regularizers learn is not averaged: nothing that is shown or exported uses it. Every process keeps one: with the same
    weights they are the same, and each generates its share of the videos.
    """
    table, lora = plan.config.ema, plan.config.model.table.lora
    if table is None:
        return None, ()
    shown = None if values is None else values.of_denoiser()
    average = Average(trained(denoiser.module), table, device, shown)
    settings = None if lora is None else lora_settings(denoiser, lora)
    piece = AveragePiece(denoiser, average, settings, lambda folder: plan.family.load_denoiser("cpu", "fp32", folder))
    if start.folder is not None and has_average(start.folder):
        checkpoint.load(start.folder, [piece])
    return average, (piece,)


def _average_changed(step: int, *, on: bool) -> str:
    if on:
        return f"the checkpoint has no average (ema): it starts from the weights of step {step}"
    return (
        "[ema] is not in the configuration any more: the checkpoint's average ends here, and new checkpoints have none"
    )


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
