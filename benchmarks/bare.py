"""The loop that vtrain is measured against: torch, diffusers, and nothing around them.

As a script it takes one step and prints its CPU-seconds: python bare.py FAMILY TRANSFORMER DTYPE SAMPLES RANK, where FAMILY
is one of FAMILIES, SAMPLES a file of samples, and RANK 0 trains all weights.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sample:
    """One clip, in memory. latents (1, C, f, h, w) fp32; embeds (1, L, D); mask (1, L) bool, None if the model takes none."""

    latents: Tensor
    embeds: Tensor
    mask: Tensor | None


def sana_level(device: torch.device) -> tuple[Tensor, Tensor]:
    """(sigma, timestep), both (1,): logit-normal on 1000 levels, shift 3, as SANA-Video was trained."""
    s = (torch.randn(1, device=device).sigmoid() * 1000).floor() / 1000
    sigma = 3 * s / (1 + 2 * s)
    return sigma, (1000 * sigma).floor()


def wan_level(device: torch.device) -> tuple[Tensor, Tensor]:
    """(sigma, timestep), both (1,): logit-normal, shift 3, which vtrain-wan has for Wan 2.1; WanPipeline's timesteps."""
    s = torch.randn(1, device=device).sigmoid()
    sigma = 3 * s / (1 + 2 * s)
    return sigma, 1000 * sigma


@dataclass(frozen=True)
class Family:
    """What differs from one model to another: diffusers' class, what an adapter is put on, and the levels."""

    module: str
    transformer: str
    lora_targets: tuple[str, ...]
    draw_level: Callable[[torch.device], tuple[Tensor, Tensor]]

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        model = getattr(importlib.import_module(self.module), self.transformer)
        return model.from_pretrained(folder, torch_dtype=dtype)


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SANA = Family(
    "diffusers.models.transformers.transformer_sana_video", "SanaVideoTransformer3DModel", ATTENTION, sana_level
)
WAN = Family(
    "diffusers.models.transformers.transformer_wan",
    "WanTransformer3DModel",
    (*ATTENTION, "ffn.net.0.proj", "ffn.net.2"),
    wan_level,
)
FAMILIES = {"sanavideo": SANA, "wan21": WAN}
"""By vtrain's names."""


def prepare(family: Family, model: Any, lora_rank: int | None) -> Any:
    """Ready to train: everything, or an fp32 adapter on frozen weights."""
    if lora_rank is not None:
        from peft import LoraConfig

        model.requires_grad_(False)
        targets = list(family.lora_targets)
        model.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=targets))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model.train()


def decay_groups(model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """(decays, does not) of what is trained, by name: vectors and scale tables do not decay."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    plain = [each for each in named if each[1].ndim <= 1 or each[0].endswith("scale_shift_table")]
    return [each for each in named if not any(each is other for other in plain)], plain


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """torch's fused AdamW."""
    decayed, plain = ([weight for _, weight in group] for group in decay_groups(model))
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def train(
    family: Family,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    *,
    accumulate: int = 1,
    average: bool = False,
) -> Iterator[Tensor]:
    """Steps without end, one at each `next`, on the model's device. Gives the last loss, detached and unread.

    accumulate: samples of a step, one after the other. average: keep a moving average of what is trained, in fp32.
    """
    device, endless = samples[0].latents.device, cycle(samples)
    weights = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    shadow = [weight.float().clone() for weight in weights] if average else []
    while True:
        for _ in range(accumulate):
            loss = loss_of(family, model, next(endless), device)
            (loss / accumulate if accumulate > 1 else loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if shadow:
            torch._foreach_lerp_(shadow, weights, 0.001)
        yield loss.detach()


def loss_of(family: Family, model: nn.Module, sample: Sample, device: torch.device) -> Tensor:
    """Of one clip, under bf16 autocast."""
    clean, noise = sample.latents, torch.randn_like(sample.latents)
    sigma, timestep = family.draw_level(device)
    spread = sigma[:, None, None, None, None]
    masked = {} if sample.mask is None else {"encoder_attention_mask": sample.mask}
    with torch.autocast(device.type, torch.bfloat16):
        prediction = model(
            (1 - spread) * clean + spread * noise,
            encoder_hidden_states=sample.embeds,
            timestep=timestep,
            return_dict=False,
            **masked,
        )[0]
        return nn.functional.mse_loss(prediction.float(), noise - clean)


def main() -> None:
    name, folder, dtype, samples, rank = sys.argv[1:]
    family = FAMILIES[name]
    model = prepare(family, family.load(Path(folder), getattr(torch, dtype)), int(rank) or None)
    stored = torch.load(samples, weights_only=True)
    loss = next(train(family, model, adamw(model, 1e-5), [Sample(*each) for each in stored]))
    assert loss.isfinite()
    sys.stdout.write(f"cpu {time.process_time()}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
