"""What gpu_sana2b.py measures: the 2B model, the bare loop, and vtrain with and without CREPA, on random inputs in memory."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bare
import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel
from gpu_rows import LR, RANK, ROWS, plan_of
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from vtrain.config.tables import CheckpointTable
from vtrain.contract import (
    CausalCodecConfig,
    ClipShape,
    Device,
    Duration,
    FeatureShape,
    FrameRule,
    LatentGeometry,
    Latents,
    LatentShape,
    Logged,
    NormalizedCodec,
    OptimizerSpec,
    RunLength,
    Text,
    TokenGrid,
)
from vtrain.data.batches import Batch
from vtrain.plan.records import Plan
from vtrain.run.inbox import Inbox
from vtrain.train.checkpointing import checkpoint_gradients
from vtrain.train.ema import Average
from vtrain.train.host_optimizer import HostWeights
from vtrain.train.loop import Ends, Loop
from vtrain.train.offload import offload
from vtrain.train.parameters import add_lora, groups, trained
from vtrain.train.precision import quantise
from vtrain.train.prefetch import Prefetcher
from vtrain.train.processes import Processes
from vtrain.train.saving import Unsaved
from vtrain.train.spikes import Skipped
from vtrain.train.step import Step, Teacher, Term
from vtrain_sanavideo.crepa import Crepa
from vtrain_sanavideo.crepa_options import CrepaOptions
from vtrain_sanavideo.denoiser import SanaVideoDenoiser
from vtrain_sanavideo.flow import SanaVideoFlow
from vtrain_sanavideo.options import SanaVideoFlowOptions

TEXT_TOKENS, REAL_TOKENS = 300, 120
FORWARD_TFLOP, FORWARD_TOKENS = 121.0, 32_760
NEVER = 10**9

REAL = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 20, "attention_head_dim": 112, "num_layers": 20,
    "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240,
    "caption_channels": 2304, "mlp_ratio": 3.0, "attention_bias": False, "sample_size": 30, "patch_size": (1, 2, 2),
    "norm_elementwise_affine": False, "guidance_embeds": False, "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}  # fmt: skip
"""transformer/config.json of SANA-Video_2B_480p: 2,056,862,144 parameters."""

GIANT = {
    "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True, "image_size": 518,
    "patch_size": 14,
}  # fmt: skip
"""config.json of facebook/dinov2-giant: 1.1 B parameters."""

TINY = REAL | {
    "num_attention_heads": 2, "attention_head_dim": 48, "num_layers": 2, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 48, "cross_attention_dim": 96, "caption_channels": 64,
}  # fmt: skip

TINY_TEACHER = GIANT | {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}

Block = Callable[[], None]
"""Runs a block of steps and reads their loss, so that they are done."""


@dataclass(frozen=True)
class Clip:
    """Size of what is trained on, in pixels."""

    width: int
    height: int
    frames: int

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """(C, f, h, w)."""
        return 16, (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        _, frames, height, width = self.latents
        return frames * (height // 2) * (width // 2)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True)
class Setup:
    """What is measured. mode: "lora" or "full". steps: of a block. turns: whether sides take turns where that is possible."""

    mode: str
    clip: Clip
    config: dict[str, Any]
    device: torch.device
    steps: int
    checkpointing: bool = True
    turns: bool = True

    def plan(self, row: str) -> Plan:
        """Of a row in this setup. Raises ConfigError."""
        clip = (self.clip.width, self.clip.height, self.clip.frames)
        return plan_of(row, self.mode, self.config, clip, steps=self.steps, checkpointing=self.checkpointing)

    @property
    def is_real(self) -> bool:
        return self.config is REAL

    @property
    def geometry(self) -> LatentGeometry:
        return LatentGeometry(self.config["in_channels"], FrameRule(4, 1), 8, self.config["patch_size"])

    @property
    def in_turn(self) -> bool:
        """Whether two models with their states are held at once."""
        return self.turns and (self.mode == "lora" or self.device.type == "cpu")

    def tflop(self) -> float | None:
        """Work of a step; None for a model that is not the real one."""
        if not self.is_real:
            return None
        forwards = (3 if self.mode == "full" else 2) + self.checkpointing
        return FORWARD_TFLOP * forwards * self.clip.tokens / FORWARD_TOKENS


def build(setup: Setup, dtype: torch.dtype | None = None) -> SanaVideoTransformer3DModel:
    """The transformer with random weights, made on the device. Its rotary tables are computed, so they are real.

    dtype: None for the mode's own, bf16 under LoRA.
    """
    with init_empty_weights(include_buffers=False):
        model = SanaVideoTransformer3DModel(**setup.config)
    dtype = dtype or (torch.bfloat16 if setup.mode == "lora" else torch.float32)
    state = {}
    for name, weight in model.named_parameters():
        made = torch.empty(weight.shape, dtype=dtype, device=setup.device)
        is_norm = weight.ndim == 1 and name.endswith("weight")
        state[name] = made.fill_(1.0 if is_norm else 0.0) if weight.ndim == 1 else made.normal_(std=0.02)
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(setup.device)


class RandomBatches:
    """In the place of vtrain's Batches: batches[m] of batch 1 from a few random samples in memory."""

    def __init__(self, setup: Setup, samples: int = 4, features: FeatureShape | None = None) -> None:
        """features: of a clip, as cached for CREPA."""
        random = torch.Generator().manual_seed(0)
        width = setup.config["caption_channels"]
        self.latents = [torch.randn((1, *setup.clip.latents), generator=random) for _ in range(samples)]
        self.embeds = [torch.randn((1, TEXT_TOKENS, width), generator=random).bfloat16() for _ in range(samples)]
        self.mask = torch.arange(TEXT_TOKENS)[None] < REAL_TOKENS
        self.features: list[dict[str, Tensor]] = [{} for _ in range(samples)]
        if features is not None:
            for each in self.features:
                each["crepa"] = torch.randn((1, *features), generator=random).bfloat16()

    def __getitem__(self, number: int) -> Batch:
        return self.get(number)

    def get(self, number: int, _features: Collection[str] | None = None) -> Batch:
        which = number % len(self.latents)
        text = Text.of(self.embeds[which], self.mask)
        latents, samples = Latents(self.latents[which]), (f"random/{which}",)
        return Batch(number, latents, text, (number,), samples, (False,), (False,), features=self.features[which])

    def close(self) -> None:
        """Nothing was started."""


@contextmanager
def bare_side(setup: Setup, _processes: Processes) -> Iterator[Block]:
    batches = RandomBatches(setup)
    samples = [
        bare.Sample(latents.to(setup.device), embeds.to(setup.device), batches.mask.to(setup.device))
        for latents, embeds in zip(batches.latents, batches.embeds, strict=True)
    ]
    model = bare.prepare(bare.SANA, build(setup), RANK if setup.mode == "lora" else None)
    if setup.checkpointing:
        model.enable_gradient_checkpointing()
    losses = bare.train(bare.SANA, model, bare.adamw(model, LR), samples)

    def block() -> None:
        for _ in range(setup.steps):
            loss = next(losses)
        check(float(loss))

    yield block


@dataclass(frozen=True)
class Geometry:
    """What a teacher asks of the family."""

    patch: tuple[int, int, int]

    def token_grid(self, latents: LatentShape) -> TokenGrid:
        time, height, width = self.patch
        return TokenGrid(latents.frames // time, latents.height // height, latents.width // width)

    def pixel_frames(self, latent_frame: int) -> range:
        return range(max(0, 4 * latent_frame - 3), 4 * latent_frame + 1)


def crepa(setup: Setup, teacher: str) -> Crepa:
    """CREPA as its defaults are. The encoder's folder is written once a process, into the folder for temporary files."""
    folder = Path(tempfile.gettempdir()) / f"vtrain-dinov2-{os.getpid()}-{'giant' if setup.is_real else 'tiny'}"
    if not folder.exists():
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        with setup.device:
            Dinov2Model(Dinov2Config(**(GIANT if setup.is_real else TINY_TEACHER))).bfloat16().save_pretrained(folder)
    block = 10 if setup.is_real else 1
    online = {"teacher": "online", "drop_vae_encoder": True} if teacher == "decoded" else {}
    return Crepa(CrepaOptions.model_validate({"block": block, "encoder": str(folder), **online}))


def video_codec(setup: Setup) -> NormalizedCodec:
    """The Wan VAE with random weights in fp32, without its encoder; a narrow one for a tiny model."""
    with setup.device:
        vae = AutoencoderKLWan(**({} if setup.is_real else {"base_dim": 8}))
    config = CausalCodecConfig.model_validate(dict(vae.config))
    mean, std, geometry = config.latents_mean, config.latents_std, config.geometry()
    codec = NormalizedCodec(vae.eval().requires_grad_(False), mean, std, geometry, "the Wan VAE")
    codec.drop_encoder()
    return codec


@contextmanager
def crepa_side(setup: Setup, processes: Processes, *, teacher: str) -> Iterator[Block]:
    """vtrain_side with CREPA."""
    part = crepa(setup, teacher)
    geometry = Geometry(setup.config["patch_size"])
    (block,) = part.needs().taps
    module = part.load({block: setup.config["num_attention_heads"] * setup.config["attention_head_dim"]})
    module.to(setup.device)
    with ExitStack() as stack:
        teach, shape = None, None
        if teacher == "decoded":
            encoder = stack.enter_context(part.open_feature_encoder(str(setup.device)))
            teach = Teacher(geometry, encoder, video_codec(setup))  # type: ignore[arg-type]
        else:
            clip = ClipShape(setup.clip.frames, setup.clip.height, setup.clip.width)
            shape = part.feature_shape(clip, geometry.token_grid(LatentShape(*setup.clip.latents)))
        yield stack.enter_context(vtrain_side(setup, processes, {"crepa": Term(module, (block,), teach)}, shape))


@contextmanager
def vtrain_side(
    setup: Setup,
    processes: Processes,
    terms: Mapping[str, Term] | None = None,
    features: FeatureShape | None = None,
    *,
    row: str = "vtrain",
) -> Iterator[Block]:
    """row: of ROWS; its settings are those of the plan of its configuration file."""
    plan = setup.plan(row)
    config, device = plan.config, processes.device
    named_part = config.optimizer.registered.spec
    assert isinstance(named_part, OptimizerSpec)
    with ExitStack() as held:
        denoiser = loaded(setup, plan, device, held)
        sampler = SanaVideoFlow(SanaVideoFlowOptions(), {})
        step = Step(denoiser, sampler, terms or {}, RunLength(NEVER, 10.0))
        step.train()
        named = trained(step)
        host = HostWeights(named, device) if config.offload.optimizer else None
        parts = groups(host.named if host else named, denoiser=denoiser)
        optimizer = named_part.build(config.optimizer.options, parts)
        assert isinstance(optimizer, torch.optim.Optimizer)
        if host is not None:
            host.step_here(optimizer)
        average = Average(trained(denoiser.module), config.ema, device) if config.ema else None
        if average is not None:
            held.callback(average.close)
        loop = Loop(
            processes.wrap(step),
            optimizer,
            [parameter for _, parameter in named],
            lambda _step: 1.0,
            Prefetcher(
                RandomBatches(setup, features=features),  # type: ignore[arg-type]
                None,  # type: ignore[arg-type]
                sampler,
                0,
                device,
                timesteps_of="sanavideo",
            ),
            processes,
            config.train,
            Ends(Unsaved(), None, Inbox(), skipped=Skipped(config.train.skip_nonfinite)),
            first=0,
            last=NEVER,
            micro_batch=0,
            steps_per_epoch=4.0,
            seed=0,
            average=average,
        )
        events = loop.run(CheckpointTable(every=Duration(NEVER, "steps")), None, at_start=False)

        def block() -> None:
            event = next(each for each in events if isinstance(each, Logged))
            assert len(event.steps) == setup.steps
            check(event.steps[-1].loss)

        held.callback(processes.let_go)  # else the next side is measured with this one's model in memory
        held.callback(events.close)  # type: ignore[attr-defined]
        yield block


def loaded(setup: Setup, plan: Plan, device: Device, held: ExitStack) -> SanaVideoDenoiser:
    """As vtrain loads it for the plan, with random weights. What a run makes on the CPU is made on the card, which is faster, and
    moved; the peak counts from then on."""
    config, quantised, away = plan.config, plan.storage.quantised, plan.config.offload.group is not None
    model = build(setup, torch.float32 if plan.loaded == "fp32" else torch.bfloat16)
    if quantised or away:
        model.cpu()
        device.release()
        device.reset_peak()
    denoiser = SanaVideoDenoiser(model, setup.geometry)
    if quantised:
        there = config.precision.quantize_on == "accelerator"
        quantise(denoiser, plan.storage, denoiser.lora_targets, str(device), there=there)
    if config.model.table.lora is not None:
        add_lora(denoiser, config.model.table.lora, 0, "")
    checkpoint_gradients(denoiser, config.precision, "")
    if away:
        offload(denoiser, config.offload, device, held)
    return denoiser


SIDES: dict[str, Callable[[Setup, Processes], AbstractContextManager[Block]]] = {
    "bare": bare_side,
    "vtrain": vtrain_side,
    "CREPA cached": partial(crepa_side, teacher="cached"),
    "CREPA decoded": partial(crepa_side, teacher="decoded"),
}


SAVING: dict[str, Callable[[Setup, Processes], AbstractContextManager[Block]]] = {
    name: partial(vtrain_side, row=name) for name in ROWS if name != "vtrain"
}
"""vtrain in other precisions and with what saves memory."""


def applies(side: str, setup: Setup) -> bool:
    """Whether the row is of this mode; and what offloads needs every block to be recomputed."""
    return side not in ROWS or (setup.mode in ROWS[side].modes and (setup.checkpointing or " offload" not in side))


def check(loss: float) -> None:
    assert loss == loss, "the loss is not a number"
