"""The denoiser of a run as it is trained: loaded, with its adapter, its base quantised; and what a checkpoint keeps of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtrain.contract import CheckpointError, Denoiser, Device, Problem, SupportsBlockWeights, SupportsLora
from vtrain.data.seeds import derive
from vtrain.plan.precision import adapter_targets
from vtrain.plan.records import Plan
from vtrain.registry.spelling import check_part
from vtrain.train import checkpoint
from vtrain.train.ema import Average, AveragePiece, has_average
from vtrain.train.eval_weights import EvalWeights
from vtrain.train.parameters import DENOISER, add_lora, base_mark, lora_settings, trained
from vtrain.train.pieces import AdapterPiece, DenoiserPiece
from vtrain.train.precision import quantise
from vtrain.train.resume import Start

if TYPE_CHECKING:
    from vtrain.train.sharding import Shares


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
    plan: Plan, denoiser: Denoiser, start: Start, device: Device, values: EvalWeights | None, shares: Shares | None
) -> tuple[Average | None, tuple[AveragePiece, ...]]:
    """The average of what is trained of the denoiser, as [ema] asks and the checkpoint has it, and its piece.

    What regularizers learn is not averaged: nothing that is shown or exported uses it. Every process keeps one: with the same
    weights they are the same, and each generates its share of the videos.
    """
    table, lora = plan.config.ema, plan.config.model.table.lora
    if table is None:
        return None, ()
    shown = None if values is None else values.of_denoiser()
    named = trained(denoiser.module)
    if shares is not None:
        own = dict(shares.named)
        named = [(name, own[DENOISER + name]) for name, _ in named]
    average = Average(named, table, device, shown)
    settings = None if lora is None else lora_settings(denoiser, lora)
    piece = AveragePiece(
        denoiser, average, settings, lambda folder: plan.family.load_denoiser("cpu", "fp32", folder), shares
    )
    if start.folder is not None and has_average(start.folder):
        checkpoint.load(start.folder, [piece])
    return average, (piece,)


def average_changed(step: int, *, on: bool) -> str:
    """What is said where a run has an average and its checkpoint none, or the other way round."""
    if on:
        return f"the checkpoint has no average (ema): it starts from the weights of step {step}"
    return (
        "[ema] is not in the configuration any more: the checkpoint's average ends here, and new checkpoints have none"
    )
