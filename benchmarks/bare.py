"""The loop that vtrain is measured against: torch, diffusers, and nothing around them.

As a script it takes one step and tells its CPU-seconds: python bare.py TRANSFORMER DTYPE FOLDER RANK, where FOLDER
holds samples.pt and RANK 0 trains all weights.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel
from torch import Tensor, nn

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Sample:
    """One clip, in memory. latents (1, C, f, h, w) fp32; embeds (1, L, D); mask (1, L) bool."""

    latents: Tensor
    embeds: Tensor
    mask: Tensor


def load_model(transformer: Path, dtype: torch.dtype) -> SanaVideoTransformer3DModel:
    return SanaVideoTransformer3DModel.from_pretrained(transformer, torch_dtype=dtype)


def prepare(model: SanaVideoTransformer3DModel, lora_rank: int | None) -> SanaVideoTransformer3DModel:
    """Ready to train: everything, or an fp32 adapter on frozen weights."""
    if lora_rank is not None:
        from peft import LoraConfig

        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=LORA_TARGETS))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model.train()


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """torch's fused AdamW; vectors and scale tables do not decay."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    decayed = [weight for name, weight in named if weight.ndim > 1 and not name.endswith("scale_shift_table")]
    plain = [weight for name, weight in named if weight.ndim <= 1 or name.endswith("scale_shift_table")]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def draw_level(device: torch.device) -> tuple[Tensor, Tensor]:
    """(sigma, timestep), both (1,): logit-normal on 1000 levels, shift 3, as SANA-Video was trained."""
    s = (torch.randn(1, device=device).sigmoid() * 1000).floor() / 1000
    sigma = 3 * s / (1 + 2 * s)
    return sigma, (1000 * sigma).floor()


def train(
    model: SanaVideoTransformer3DModel, optimizer: torch.optim.Optimizer, samples: Sequence[Sample]
) -> Iterator[Tensor]:
    """Steps without end, one at each `next`, on the model's device. Gives the loss, detached and unread."""
    device = samples[0].latents.device
    for sample in cycle(samples):
        clean, noise = sample.latents, torch.randn_like(sample.latents)
        sigma, timestep = draw_level(device)
        spread = sigma[:, None, None, None, None]
        with torch.autocast(device.type, torch.bfloat16):
            prediction = model(
                (1 - spread) * clean + spread * noise,
                encoder_hidden_states=sample.embeds,
                timestep=timestep,
                encoder_attention_mask=sample.mask,
                return_dict=False,
            )[0]
            loss = nn.functional.mse_loss(prediction.float(), noise - clean)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.detach()


def main() -> None:
    folder, dtype, samples, rank = sys.argv[1:]
    model = prepare(load_model(Path(folder), getattr(torch, dtype)), int(rank) or None)
    stored = torch.load(Path(samples) / "samples.pt", weights_only=True)
    loss = next(train(model, adamw(model, 1e-5), [Sample(*each) for each in stored]))
    assert loss.isfinite()
    sys.stdout.write(f"cpu {time.process_time()}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
