"""The stored VAE of the tiny world."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from vtrain.contract import CausalCodecConfig, NormalizedCodec, load_autoencoder

STORED = Path(__file__).parents[2] / "examples" / "world" / "vae"


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(STORED, torch_dtype=torch.float32).eval()


def unseen(world: ModuleType, train_vae: ModuleType, count: int, seed: int = 4_000_000) -> torch.Tensor:
    """Clips of all words, the new ones in each second."""
    rng = np.random.default_rng(seed)
    words = [world.any_words(rng) for _ in range(count - count // 2)]
    words += [
        world.Words(world.NEW_COLOUR, world.NEW_SHAPE, str(rng.choice(list(world.DIRECTIONS))))
        for _ in range(count // 2)
    ]
    return train_vae.pixels([world.draw(world.stage(each, rng)) for each in words])


def test_it_is_at_most_two_megabytes_and_names_no_place_on_a_disk() -> None:
    assert sum(path.stat().st_size for path in STORED.iterdir()) <= 2_000_000
    config = (STORED / "config.json").read_text(encoding="utf-8")
    assert "_name_or_path" not in config


def test_unseen_clips_come_back_at_32_db_or_more(
    world: ModuleType, train_vae: ModuleType, vae: AutoencoderKLWan
) -> None:
    ratios = train_vae.psnr(vae, unseen(world, train_vae, 8))
    assert ratios.mean() >= 32
    assert ratios.min() >= 28


def test_the_judge_reads_clips_that_went_through_it(
    world: ModuleType, train_vae: ModuleType, judge: ModuleType, vae: AutoencoderKLWan
) -> None:
    rng = np.random.default_rng(5)
    words = [world.any_words(rng) for _ in range(32)]
    clips = train_vae.pixels([world.draw(world.stage(each, rng)) for each in words])
    with torch.inference_mode():
        again = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in clips.split(8)])
    frames = ((again + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()
    right = [judge.judge(clip).hits(each)["all"] for clip, each in zip(frames, words, strict=True)]
    assert all(right)


def test_latents_are_normalised_by_its_own_mean_and_std(world: ModuleType, train_vae: ModuleType) -> None:
    config = CausalCodecConfig.model_validate(dict(AutoencoderKLWan.load_config(STORED)))
    vae = load_autoencoder(AutoencoderKLWan, STORED, "fp32", "cpu")
    own = NormalizedCodec(vae, config.latents_mean, config.latents_std, config.geometry(), "the VAE")
    with closing(own) as codec:
        latents = torch.cat([codec.encode(part).mean for part in unseen(world, train_vae, 48, seed=6).split(8)])
    assert latents.shape == (48, 16, 3, 8, 8)
    each = latents.transpose(0, 1).flatten(1)
    assert each.mean(dim=1).abs().max() < 0.25
    assert (each.std(dim=1) - 1).abs().max() < 0.25


def test_training_steps_are_those_of_encode_and_decode(
    world: ModuleType, train_vae: ModuleType, vae: AutoencoderKLWan
) -> None:
    clips = unseen(world, train_vae, 2)
    with torch.inference_mode():
        mean, log_variance = train_vae.moments(vae, clips)
        posterior = vae.encode(clips).latent_dist
        assert torch.equal(mean, posterior.mean)
        assert torch.equal(log_variance.clamp(-30, 20), posterior.logvar)
        assert torch.equal(train_vae.decoded(vae, mean).clamp(-1, 1), vae.decode(mean).sample)
