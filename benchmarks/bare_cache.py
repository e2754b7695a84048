"""What `vtrain cache fill` is measured against: a loop of PyAV and diffusers' VAE, as one writes it for one's own clips.

    python bare_cache.py CLIPS VAE OUT WIDTH HEIGHT FRAMES FPS SKIP

Each clip is decoded and brought to WIDTHxHEIGHT@FRAMES at FPS as vtrain does it (frame k is the one on screen at k / FPS,
cut in the middle, one antialiased resample), encoded, normalised and written to OUT as safetensors. It checks, hashes and
remembers nothing. Tells CPU- and wall seconds a clip, without those of the first SKIP clips.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import av
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional


def decode(path: Path, width: int, height: int, frames: int, fps: float) -> Tensor:
    """fp32 (1, 3, F, h, w) in [-1, 1]."""
    pictures: list[Tensor] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        last: av.VideoFrame | None = None
        for frame in container.decode(stream):
            while last is not None and len(pictures) < frames and frame.time > len(pictures) / fps + 1e-6:
                pictures.append(fitted(last, width, height))
            last = frame
            if len(pictures) == frames:
                break
        while last is not None and len(pictures) < frames:
            pictures.append(fitted(last, width, height))
    return torch.stack(pictures, 1)[None].float() / 127.5 - 1


def fitted(frame: av.VideoFrame, width: int, height: int) -> Tensor:
    """uint8 (3, h, w): the middle of the picture with that aspect, resampled."""
    scale = min(frame.width / width, frame.height / height)
    part_width, part_height = round(width * scale), round(height * scale)
    left, top = (frame.width - part_width) // 2, (frame.height - part_height) // 2
    part = frame.to_ndarray(format="rgb24")[top : top + part_height, left : left + part_width]
    pixels = torch.from_numpy(part).permute(2, 0, 1)[None]
    return functional.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)[0]


def main() -> None:
    clips, vae_folder, out = map(Path, sys.argv[1:4])
    width, height, frames = map(int, sys.argv[4:7])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKLWan.from_pretrained(vae_folder).to(device).eval()
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    out.mkdir(parents=True, exist_ok=True)
    files, skip = sorted(clips.glob("*.mp4")), int(sys.argv[8])
    with torch.inference_mode():
        for number, path in enumerate(files):
            if number == skip:
                cpu, wall = time.process_time(), time.perf_counter()
            pixels = decode(path, width, height, frames, float(sys.argv[7]))
            latents = (vae.encode(pixels.to(device)).latent_dist.mode() - mean) / std
            save_file({"mean": latents[0].float().cpu().contiguous()}, out / f"{path.stem}.safetensors")
    counted = len(files) - skip
    sys.stdout.write(f"loop {(time.process_time() - cpu) / counted} {(time.perf_counter() - wall) / counted}\n")


if __name__ == "__main__":
    main()
