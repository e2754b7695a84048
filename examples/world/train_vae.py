"""Train the tiny world's VAE: a real AutoencoderKLWan (x8 space, x4 time, 16 channels) of 0.7 M parameters.

    python examples/world/train_vae.py train FOLDER        about 20 minutes of one core
    python examples/world/train_vae.py measure [FOLDER]    PSNR on unseen clips, from the stored weights

Clips are drawn on the fly, so that every batch is new. First single frames (the causal first latent frame), then whole clips.
The loss is the squared error, with noise on the latents, so that the decoder forgives the small errors of a denoiser, and
a tiny KL term. What is stored is a running mean of the weights in fp16, with the latents' mean and std over the world.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import world
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, patchify, unpatchify
from torch import Tensor

STORED = Path(__file__).parent / "vae"
UNSEEN = 1_000_000
"""Seed of the clips for measuring; training draws from its own seed."""

LATENT_NOISE = 0.1
"""Noise on latents while training, in units of their channel's root mean square."""
KL = 1e-6


@dataclass(frozen=True)
class Schedule:
    """steps of `batch` clips of `frames` frames; the learning rate falls from lr by a cosine to a fiftieth."""

    frames: int
    steps: int
    batch: int
    lr: float

    def exact(self, step: int) -> bool:
        """The last tenth runs in fp32; before, bf16 costs less and does no harm."""
        return step >= 0.9 * self.steps

    def rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / 50)
        return warm * self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


def make_vae() -> AutoencoderKLWan:
    """Wan 2.2's residual form with a 2x2 pixel patch: a quarter of the work of the plain form for the same factors."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Another order of the weights in memory: convolutions take a fifth less time on a CPU."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return vae


def pixels(clips: list[np.ndarray]) -> Tensor:
    """uint8 clips (F, H, W, 3) -> (B, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1  # channels last in memory


def batches(seed: int, batch: int, frames: int) -> Iterator[Tensor]:
    """Clips of all words, the new ones included. One frame: taken from anywhere in its clip."""
    rng = np.random.default_rng(seed)
    while True:
        clips = [world.draw(world.stage(world.any_words(rng), rng), max(frames, world.FRAMES)) for _ in range(batch)]
        if frames == 1:
            clips = [clip[[rng.integers(len(clip))]] for clip in clips]
        yield pixels(clips)


def moments(vae: AutoencoderKLWan, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance (B, C, f, h, w), with gradients: the steps of `vae.encode`."""
    vae.clear_cache()
    patched = patchify(clips, vae.config.patch_size)
    chunks = patched.split([1] + [4] * ((clips.shape[2] - 1) // 4), dim=2)
    encoded = []
    for chunk in chunks:
        encoded.append(vae.encoder(chunk, feat_cache=vae._enc_feat_map, feat_idx=[0]))
    vae.clear_cache()
    mean, log_variance = vae.quant_conv(torch.cat(encoded, dim=2)).chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decoded(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The steps of `vae.decode`, without its clamp, which would stop gradients at white and black."""
    vae.clear_cache()
    frames = []
    for number, latent in enumerate(vae.post_quant_conv(latents).split(1, dim=2)):
        frames.append(vae.decoder(latent, feat_cache=vae._feat_map, feat_idx=[0], first_chunk=number == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, dim=2), vae.config.patch_size)


def loss(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    mean, log_variance = (part.float() for part in moments(vae, clips))
    size = mean.detach().square().mean(dim=(0, 2, 3, 4), keepdim=True).sqrt()
    spread = torch.randn_like(mean) * (0.5 * log_variance).exp() + torch.randn_like(mean) * size * LATENT_NOISE
    error = (decoded(vae, mean + spread).float() - clips).square().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error + KL * kl


def psnr(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in dB, through the VAE's own encode and decode."""
    ratios = []
    with torch.inference_mode():
        for clip in clips.split(8):
            again = vae.decode(vae.encode(clip).latent_dist.mode()).sample
            error = ((again - clip) / 2).square().mean(dim=(1, 2, 3, 4))
            ratios.append(-10 * error.log10())
    return torch.cat(ratios)


def train(folder: Path, schedules: list[Schedule], seed: int, start: Path | None) -> None:
    """Run the schedules one after the other; the running mean is stored every minute."""
    torch.manual_seed(seed)
    vae = channels_last(AutoencoderKLWan.from_pretrained(start) if start else make_vae())
    mean = copy.deepcopy(vae).eval().requires_grad_(False)
    unseen = next(batches(UNSEEN, 16, world.FRAMES))
    begun = spoken = time.monotonic()
    for number, schedule in enumerate(schedules):
        optimizer = torch.optim.AdamW(vae.parameters(), lr=schedule.lr, betas=(0.9, 0.99), weight_decay=1e-4)
        data = batches(seed + 1 + number, schedule.batch, schedule.frames)
        for step in range(schedule.steps):
            optimizer.param_groups[0]["lr"] = schedule.rate(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=not schedule.exact(step)):
                value = loss(vae, next(data))
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            follow(mean, vae, min(0.998, (1 + step) / (10 + step)))
            last = step + 1 == schedule.steps
            if last or time.monotonic() - spoken > 60:
                spoken = time.monotonic()
                test = unseen if schedule.frames > 1 else unseen[:, :, :1]
                print(
                    f"{spoken - begun:6.0f} s  {time.process_time():6.0f} CPU-s  {schedule.frames} frames  step {step + 1:5}"
                    f"  loss {value.item():.5f}  unseen {psnr(mean, test).mean():.2f} dB",
                    flush=True,
                )
                mean.save_pretrained(folder / "running")
    store(mean, folder)


def follow(mean: AutoencoderKLWan, vae: AutoencoderKLWan, decay: float) -> None:
    for kept, new in zip(mean.parameters(), vae.parameters(), strict=True):
        kept.data.lerp_(new.data, 1 - decay)


def store(vae: AutoencoderKLWan, folder: Path) -> None:
    """Measure the latents' mean and std per channel over clips of the world, and write config and fp16 weights."""
    latents = []
    data = batches(UNSEEN + 1, 32, world.FRAMES)
    with torch.inference_mode():
        for _ in range(8):
            latents.append(vae.encode(next(data)).latent_dist.mode())
    over = torch.cat(latents).transpose(0, 1).flatten(1)
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in over.mean(dim=1).tolist()],
        latents_std=[round(value, 4) for value in over.std(dim=1).tolist()],
    )
    for parameter in vae.parameters():
        parameter.data = parameter.data.half()
    vae.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # where it was trained is nobody's business
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, clips: int) -> None:
    """PSNR by word over unseen clips, and what the normalised latents look like."""
    vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).eval()
    rng = np.random.default_rng(UNSEEN + 2)
    words = [world.any_words(rng) for _ in range(clips)]
    unseen = pixels([world.draw(world.stage(each, rng)) for each in words])
    ratios = psnr(vae, unseen)
    print(f"{clips} unseen clips: mean {ratios.mean():.2f} dB, worst {ratios.min():.2f}, best {ratios.max():.2f}")
    for name in (*world.COLOURS, *world.SHAPES, *world.DIRECTIONS):
        mine = [place for place, each in enumerate(words) if name in (each.colour, each.shape, each.direction)]
        print(f"  {name:10} {ratios[mine].mean():.2f} dB over {len(mine)}")
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.inference_mode():
        latents = (torch.cat([vae.encode(part).latent_dist.mode() for part in unseen.split(8)]) - mean) / std
    each = latents.transpose(0, 1).flatten(1)
    print(f"normalised latents: means {each.mean(1).min():.3f} to {each.mean(1).max():.3f}, ", end="")
    print(f"stds {each.std(1).min():.3f} to {each.std(1).max():.3f}, largest {each.abs().max():.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or measure the tiny world's VAE.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train and write FOLDER/config.json and weights")
    training.add_argument("folder", type=Path)
    training.add_argument("--start", type=Path, help="go on from the weights of this folder")
    training.add_argument("--image-steps", type=int, default=300)
    training.add_argument("--clip-steps", type=int, default=4000)
    training.add_argument("--lr", type=float, default=2e-3)
    training.add_argument("--seed", type=int, default=0)
    measuring = commands.add_parser("measure", help="PSNR of stored weights on unseen clips")
    measuring.add_argument("folder", type=Path, nargs="?", default=STORED)
    measuring.add_argument("--clips", type=int, default=128)
    chosen = parser.parse_args()
    if chosen.command == "measure":
        measure(chosen.folder, chosen.clips)
        return
    images = Schedule(frames=1, steps=chosen.image_steps, batch=16, lr=chosen.lr)
    clips = Schedule(frames=world.FRAMES, steps=chosen.clip_steps, batch=4, lr=chosen.lr)
    train(chosen.folder, [images, clips], chosen.seed, chosen.start)


if __name__ == "__main__":
    main()
