"""What the Wan VAE computes when it encodes and decodes: measured again on fake tensors, against the stored figures."""

# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode

from vtrain.contract import ClipShape, DType, LatentShape
from vtrain.testing.memory import codec_memory
from vtrain_sanavideo.family import SanaVideoFamily

HEIGHT, WIDTH = 64, 96
CLIPS = [
    (ClipShape(frames, HEIGHT, WIDTH), LatentShape(16, (frames - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8))
    for frames in (17, 33)
]
KINDS = {
    "codec 8 8 1x1x1x1 16": {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "codec 96 96 1x2x4x4 16": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("key", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_stored_work_of_the_video_codec_is_what_is_measured(key: str, precision: DType) -> None:
    """Slow (6 s each): every chunk of frames goes through the whole VAE."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    torch.set_default_dtype(dtype)  # fake weights cannot be cast
    try:
        with FakeTensorMode():
            vae = AutoencoderKLWan(**KINDS[key]).eval()
            torch.set_default_dtype(torch.float32)
            found = codec_memory(
                lambda pixels: vae.encode(pixels.to(dtype)).latent_dist.mode().float(),
                lambda latents: vae.decode(latents.to(dtype)).sample.float(),
                CLIPS,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    stored = SanaVideoFamily.measured[key][precision]
    assert [size for each in found for size in (each.area, each.pixel)] == pytest.approx(stored, rel=0.02)
