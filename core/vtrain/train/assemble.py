"""Puts a run together: denoiser, adapter, regularizers, optimizer and loop, from the model folder or a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vtrain.contract import (
    CheckpointError,
    Denoiser,
    Device,
    Event,
    OptimizerSpec,
    Options,
    Problem,
    RunLength,
    Saved,
    SupportsFeatures,
    SupportsLora,
    Warned,
)
from vtrain.data.batches import Batches
from vtrain.data.caching.caches import Caches
from vtrain.data.caching.hashes import FILE, FileHashes
from vtrain.data.index import Index
from vtrain.data.seeds import derive
from vtrain.plan.price import Prices
from vtrain.plan.records import Plan
from vtrain.train import checkpoint
from vtrain.train.adapters import add_lora, base_mark, load_lora_state, lora_settings, lora_state
from vtrain.train.feed import Feed
from vtrain.train.loop import Ends, Loop, Requests, Validate
from vtrain.train.optimizer_state import load_optimizer, save_optimizer
from vtrain.train.parameters import groups, own_rates, trained
from vtrain.train.processes import Processes
from vtrain.train.resume import RunState, Start, settings, write_state
from vtrain.train.schedule import Interval, lr_factor
from vtrain.train.step import Step, Term
from vtrain.train.teachers import open_teachers


@dataclass(frozen=True)
class Trainer:
    """A run ready to go. denoiser, step: the model as trained and what wraps it.

    base, data, features: marks of what it stands on, as in RunState.
    held: what stays in memory beside them until the run ends: teachers that run at each step.
    """

    plan: Plan
    prices: Prices
    start: Start
    data: str
    batches: Batches
    processes: Processes
    denoiser: Denoiser
    base: str
    features: Mapping[str, str]
    step: Step
    optimizer: torch.optim.Optimizer
    named: list[tuple[str, Tensor]]
    held: ExitStack

    def run(self, requests: Requests, validate: Validate | None = None) -> Iterator[Event]:
        """Train to the last step, or until it is asked to stop."""
        config, state, per_epoch = self.plan.config, self.start.state, self.prices.steps_per_epoch
        table = config.validation
        interval = Interval(table.every, per_epoch, time.monotonic()) if table else None
        with self.held:
            loop = Loop(
                self.processes.wrap(self.step),
                self.optimizer,
                [parameter for _, parameter in self.named],
                lr_factor(config.lr_schedule, self.prices.steps, per_epoch),
                Feed(self.batches, self.plan.sampler, config.run.seed, self.processes.device, self.step.needed),
                self.processes,
                config.train,
                Ends(self.save, validate, requests, self.step.observe),
                first=state.step,
                last=self.prices.steps,
                micro_batch=state.micro_batch,
                steps_per_epoch=per_epoch,
                seed=config.run.seed,
            )
            yield from loop.run(config.checkpoint, interval, at_start=table.at_start if table else False)

    def save(self, step: int, micro_batch: int) -> Iterator[Event]:
        """Write the checkpoint of `step` on the first process and let old ones go. Raises CheckpointError on all."""

        def write() -> tuple[Saved, str]:
            parent = self.plan.config.run.output_dir / "checkpoints"
            folder = checkpoint.write(parent, step, lambda folder: self.fill(folder, step, micro_batch))
            try:
                return Saved(
                    step, folder, tuple(checkpoint.prune(parent, self.plan.config.checkpoint.keep, folder))
                ), ""
            except OSError as error:
                return Saved(step, folder), f"an older checkpoint could not be deleted: {error}"

        saved, trouble = self.processes.from_first(write)
        yield saved
        if trouble:
            yield Warned(trouble)

    def fill(self, folder: Path, step: int, micro_batch: int) -> None:
        """The files of a checkpoint."""
        config = self.plan.config
        lora = config.model.table.lora
        if lora is not None:
            assert isinstance(self.denoiser, SupportsLora)
            self.denoiser.save_lora(folder, lora_state(self.denoiser.module), lora_settings(self.denoiser, lora))
        else:
            self.denoiser.save(folder)
        for name, module in self.step.regularizers.items():
            (folder / "regularizers").mkdir(exist_ok=True)
            save_file(module.state_dict(), folder / "regularizers" / f"{name}.safetensors")
        save_optimizer(folder, self.optimizer, self.named, own_keys(config.optimizer.options))
        values = {key: setting.value for key, setting in settings(self.plan).items()}
        write_state(folder, RunState(step, micro_batch, values, self.data, self.base, self.features))
        (folder / "config.toml").write_text(config.text, encoding="utf-8")


def assemble(plan: Plan, prices: Prices, start: Start, index: Index, caches: Caches, processes: Processes) -> Trainer:
    """Load and build everything a run needs on this process's device.

    Raises ModelError, CheckpointError or ConfigError where the parts do not fit together.
    """
    denoiser, base = load_model(plan, start, str(processes.device))
    denoiser.gradient_checkpointing(plan.config.precision.gradient_checkpointing)
    modules = load_regularizers(plan, start, processes.device)
    features = processes.from_first(lambda: feature_marks(plan))
    with ExitStack() as held:  # what is in memory goes again if something below fails
        teachers = open_teachers(plan, str(processes.device), held)
        terms = {name: Term(modules[name], part.needs().taps, teachers.get(name)) for name, part in plan.regularizers}
        step = Step(denoiser, plan.sampler, terms, RunLength(prices.steps, prices.steps_per_epoch))
        step.train()
        named = trained(step)
        part = plan.config.optimizer
        assert isinstance(part.registered.spec, OptimizerSpec)
        optimizer = part.registered.spec.build(part.options, groups(named, own_rates(modules)))
        if start.folder is not None:
            load_optimizer(start.folder, optimizer, named, own_keys(part.options))
        batches = Batches(plan, caches, index)
        held.callback(batches.close)
        return Trainer(
            plan, prices, start, index.mark(), batches, processes, denoiser, base, features, step, optimizer, named,
            held.pop_all(),
        )  # fmt: skip


def own_keys(options: Options) -> frozenset[str]:
    """Settings of an optimizer that the configuration file gives: a checkpoint never overrides them."""
    return frozenset(type(options).model_fields)


def load_model(plan: Plan, start: Start, device: str) -> tuple[Denoiser, str]:
    """The denoiser as it starts: of the model folder or a checkpoint, with its adapter under LoRA; and the base's mark."""
    config = plan.config
    lora = config.model.table.lora
    weights = None if lora else start.folder
    denoiser = plan.family.load_denoiser(device, plan.base, weights)
    if lora is None:
        denoiser.module.requires_grad_(True)
        return denoiser, ""
    base = base_mark(denoiser.module)
    if start.folder is not None and base != start.state.base:
        what = f"its adapter was trained on other weights than {plan.config.where('model', 'path')} gives now."
        raise CheckpointError(Problem(str(start.folder), what, "Restore the model, or start anew elsewhere."))
    seed = derive(config.run.seed, "adapter")
    add_lora(denoiser, lora, seed, config.where("model", "lora", "targets"))
    if start.folder is not None:
        assert isinstance(denoiser, SupportsLora)
        odd = load_lora_state(denoiser.module, denoiser.load_lora(start.folder))
        if odd:
            what = f"the adapter there does not fit this model: {', '.join(odd[:5])}."
            raise CheckpointError(Problem(str(start.folder), what))
    return denoiser, base


def load_regularizers(plan: Plan, start: Start, device: Device) -> dict[str, nn.Module]:
    """Each regularizer's own module, its first weights a function of the run's seed."""
    modules = {}
    for name, regularizer in plan.regularizers:
        Device().seed(derive(plan.config.run.seed, f"regularizer {name}"))
        module = regularizer.load(dict.fromkeys(regularizer.needs().taps, plan.family.block_width))
        if start.folder is not None:
            _restore(module, start.folder / "regularizers" / f"{name}.safetensors")
        modules[name] = module.to(device.torch)
    return modules


def _restore(module: nn.Module, file: Path) -> None:
    try:
        module.load_state_dict(load_file(file))
    except RuntimeError as error:
        # torch tells each weight on a line of its own, after one that names the class.
        lines = [line.strip().rstrip(".") for line in str(error).splitlines()[1:]]
        what = f"what this regularizer has learned does not fit it as it is now: {'; '.join(lines)}."
        remedy = (
            "Restore what it was made with, such as its encoder's files, or start anew with another run.output_dir."
        )
        raise CheckpointError(Problem(str(file), what, remedy)) from error


def feature_marks(plan: Plan) -> dict[str, str]:
    """Regularizer -> fingerprint of its features, of those that read some. Raises ModelError."""
    hash_file = FileHashes(plan.config.cache.dir / FILE)
    return {
        name: part.feature_fingerprint(hash_file)
        for name, part in plan.regularizers
        if part.needs().features is not None and isinstance(part, SupportsFeatures)
    }
