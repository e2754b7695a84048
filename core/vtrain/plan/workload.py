"""What of a plan decides over memory, as numbers for the arithmetic (plan/memory.py): the one place where options become bytes."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from vtrain.config.record import Config
from vtrain.contract import (
    BlockMemory,
    ClipShape,
    DType,
    Family,
    SupportsBlockMemory,
    SupportsBlockWeights,
    SupportsFeatureMemory,
    SupportsFeatures,
    takes_frame_levels,
)
from vtrain.contract.adapters import SupportsAdapterNames
from vtrain.contract.measured import dtype_bytes
from vtrain.contract.protocols import SupportsEncoderMemory
from vtrain.plan.adapter import adapter_parameters
from vtrain.plan.conditions import given_latents
from vtrain.plan.datasets import token_grid
from vtrain.plan.memory import MemoryEstimate, MemorySettings, Place, Recompute, Workload, estimate_of, pinned_share
from vtrain.plan.optimizer import spec_of
from vtrain.plan.precision import adapter_targets, quantised, storage_of
from vtrain.plan.records import Plan
from vtrain.plan.teachers import Teacher

FLOAT32 = 4.0

RECOMPUTE: dict[bool | str, Recompute] = {True: "blocks", "feed_forward": "feed-forward", False: "nothing"}
"""precision.gradient_checkpointing -> what is computed again."""


def memory_estimate(plan: Plan, *, on_cpu: bool = False) -> MemoryEstimate:
    """Of all phases of a plan's run. on_cpu: the CPU trains, where nothing leaves for its own memory."""
    return estimate_of(workload(plan), memory_settings(plan.config, plan.family, plan.processes, on_cpu=on_cpu))


def memory_settings(config: Config, family: Family, processes: int, *, on_cpu: bool = False) -> MemorySettings:
    """The settings of a run that decide over its memory."""
    precision, offload, ema = config.precision, config.offload, config.ema
    adapter, storage = config.model.table.train == "lora", storage_of(config)
    trained: DType = "fp32" if adapter or storage.name == "fp32" else "bf16"
    host: Place = "device" if on_cpu else "host"
    average_on = host if ema is not None and ema.on == "cpu" else "device"
    shown = ema is not None and ema.validation != "raw"
    return MemorySettings(
        stored=_stored(config, family),
        trained=FLOAT32 if trained == "fp32" else 2.0,
        adapter=adapter,
        recompute=RECOMPUTE[precision.gradient_checkpointing],
        every=precision.gradient_checkpointing_interval,
        cast=storage.name == "fp32" and precision.mixed == "bf16",
        quantised=storage.quantised,
        state=spec_of(config).bytes_of_state(trained),
        state_on=host if offload.optimizer else "device",
        ema=FLOAT32 if ema is not None else 0.0,
        ema_on=average_on,
        resident=1.0 if on_cpu else _resident(config, family),
        rest_on="host" if offload.disk is None else "disk",
        away=offload.model_cpu and not on_cpu,
        both=spec_of(config).eval_weights,
        # Exchanged where they are of one type and place, which takes no room.
        aside=shown and (average_on == "host" or trained != "fp32"),
        batch=config.train.batch_size,
        accumulate=config.train.accumulate,
        processes=processes,
        shards=processes if config.parallel.shard else 1,
        video_batch=config.cache.video_batch,
    )


def _stored(config: Config, family: Family) -> float:
    """Bytes of a weight of the base, on average."""
    storage = storage_of(config)
    own = family.lora_targets if isinstance(family, SupportsAdapterNames) else None
    found = quantised(family, storage, adapter_targets(config, own)) if storage.quantised else None
    return storage.bits / 8 if found is None else found.total_bytes / family.parameters


def _resident(config: Config, family: Family) -> float:
    """The share of the blocks' frozen weights that are on the device at once. Layer by layer it is nearly a block as well: in the
    backward pass a block's layers are called for again before the first of them is done with."""
    table = config.offload
    if table.group is None:
        return 1.0
    together = table.blocks_per_group * (1 + table.stream) if table.group == "block" else 1
    return min(1.0, together / family.block_count)


def _layers(family: Family) -> list[int]:
    """Numbers of each weight of the blocks; [] where the family does not tell."""
    return (
        [prod(shape) for shape in family.block_weights().values()] if isinstance(family, SupportsBlockWeights) else []
    )


def workload(plan: Plan) -> Workload:
    """What a plan's run works on: by the buckets that its data may have, of which the largest counts."""
    family, drawn = plan.family, plan.validation
    shapes = [ClipShape(each.frames, size.height, size.width) for each in plan.datasets for size in each.sizes]
    tokens = {shape: _tokens(family, shape) for shape in shapes}
    largest = max(shapes, key=lambda shape: (tokens[shape], prod(shape)))
    adapter, guessed = _adapter(plan)
    layers = _layers(family)
    return Workload(
        parameters=family.parameters,
        blocks=family.block_count,
        in_blocks=sum(layers) / family.parameters if layers else 1.0,
        layer=max(layers, default=0),
        pinned=pinned_share(layers),
        adapter=adapter,
        guessed=guessed,
        tokens=tokens[largest],
        latents=prod(family.latent_shape(largest)),
        kept=block_memory(plan),
        encoders=family.encoder_memory() if isinstance(family, SupportsEncoderMemory) else {},
        largest=largest,
        video=drawn.shape if drawn is not None else None,
        video_tokens=_tokens(family, drawn.shape) if drawn is not None else 0,
        guided=drawn is not None and drawn.guidance > 1,
        running=tuple(name for name, _ in plan.regularizers),
        filling=tuple(each.name for each in plan.encoded),
        teachers=tuple(_teachers(plan, largest)),
    )


def _teachers(plan: Plan, clip: ClipShape) -> Iterator[Teacher]:
    """The encoders of regularizers' features, with as many clips at once as each is given."""
    config, grid = plan.config, token_grid(plan.family, clip)
    for name, part in plan.regularizers:
        source = part.needs().features
        if source is None or grid is None or not isinstance(part, SupportsFeatures):
            continue
        clips = {"cached": config.cache.video_batch, "source": config.train.batch_size, "decoded": 1}[source]
        memory = part.feature_memory(clips, clip, grid) if isinstance(part, SupportsFeatureMemory) else None
        features = prod(part.feature_shape(clip, grid)) * dtype_bytes(part.feature_dtype)
        yield Teacher(name, source, clips, memory, grid.frames / clip.frames, features)


def _tokens(family: Family, shape: ClipShape) -> int:
    grid = token_grid(family, shape)
    return prod(grid) if grid is not None else 0


def _adapter(plan: Plan) -> tuple[int, bool]:
    """(numbers of the adapter, whether that is a guess)."""
    table, family = plan.config.model.table.lora, plan.family
    if table is None:
        return 0, False
    if isinstance(family, SupportsAdapterNames) and (found := adapter_parameters(family, table)):
        return found, False
    return usual_adapter(family, table.rank), True


def usual_adapter(family: Family, rank: int) -> int:
    """Numbers of an adapter on six square layers of each block, each of 2 x rank x width."""
    return 12 * rank * family.block_width * family.block_count


def block_memory(plan: Plan) -> BlockMemory | None:
    """What the denoiser keeps for each token, as its family measured it, with a level for each frame where draws have one."""
    family = plan.family
    if not isinstance(family, SupportsBlockMemory):
        return None
    compute: DType = "bf16" if plan.config.precision.mixed == "bf16" else plan.loaded
    pictures = any(dataset.image_to_video for dataset in plan.datasets)
    levels = pictures and bool(given_latents(plan.conditions)) and takes_frame_levels(family)
    return family.block_memory(weights=plan.loaded, compute=compute, frame_levels=levels)
