# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from vtrain.contract import ClipShape, ModelError
from vtrain_sanavideo.family import SanaVideoFamily

Families = Callable[..., SanaVideoFamily]


def video(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def vae(checkpoint: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(checkpoint, subfolder="vae").eval()


def norms(vae: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def test_latents_are_the_posterior_mode_normalised_by_the_configs_numbers(
    family: SanaVideoFamily, vae: AutoencoderKLWan
) -> None:
    pixels = video(2, 3, 9, 48, 64)
    mean, std = norms(vae)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    with family.open_video_codec("cpu") as codec:
        latents = codec.encode(pixels, std=True)
        assert codec.encode(pixels).std is None
    assert torch.equal(latents.mean, (posterior.mode() - mean) / std)
    assert latents.std is not None
    assert torch.equal(latents.std, posterior.std / std)


def test_decode_is_bit_for_bit_what_the_pipeline_decodes(family: SanaVideoFamily, vae: AutoencoderKLWan) -> None:
    latents = video(1, 16, 3, 6, 8)
    mean, std = norms(vae)
    with torch.no_grad():
        wanted = vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
    with family.open_video_codec("cpu") as codec:
        assert torch.equal(codec.decode(latents), wanted)


@pytest.mark.parametrize("clip", [ClipShape(1, 16, 32), ClipShape(5, 48, 80), ClipShape(17, 32, 16)])
def test_the_arithmetic_of_latents_equals_a_real_encode(family: SanaVideoFamily, clip: ClipShape) -> None:
    with family.open_video_codec("cpu") as codec:
        latents = codec.encode(video(1, 3, *clip))
    assert tuple(latents.mean.shape[1:]) == family.latent_shape(clip)


def test_bf16_is_near_fp32_and_is_returned_as_fp32(checkpoint: Path, family_of: Families) -> None:
    pixels = video(1, 3, 5, 32, 32)
    both = []
    for precision in ("fp32", "bf16"):
        with family_of(checkpoint, vae_precision=precision).open_video_codec("cpu") as codec:
            both.append(codec.encode(pixels).mean)
            assert codec.decode(both[-1]).dtype == both[-1].dtype == torch.float32
    assert not torch.equal(both[0], both[1])
    assert (both[0] - both[1]).norm() / both[0].norm() < 0.05


def test_tiling_changes_large_latents_and_is_off_unless_asked(checkpoint: Path, family_of: Families) -> None:
    pixels = video(1, 3, 1, 256, 288)
    both = []
    for tiling in (False, True):
        with family_of(checkpoint, vae_tiling=tiling).open_video_codec("cpu") as codec:
            both.append(codec.encode(pixels).mean)
    assert both[0].shape == both[1].shape
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (video(1, 3, 4, 32, 32), "4k\\+1"),
        (video(1, 3, 5, 36, 32), "multiples of 8"),
        (video(1, 3, 5, 32, 20), "multiples of 8"),
        (video(1, 4, 5, 32, 32), "pixels are floats"),
        (video(1, 3, 5, 32, 32) * 255, "in \\[-1, 1\\]"),
        (video(1, 3, 5, 32, 32).log(), "in \\[-1, 1\\]"),
        (torch.zeros(1, 3, 5, 32, 32, dtype=torch.uint8), "pixels are floats"),
    ],
    ids=["frames", "height", "width", "channels", "range", "nan", "integers"],
)
def test_pixels_the_vae_would_cut_or_mistake_are_refused(
    family: SanaVideoFamily, pixels: torch.Tensor, words: str
) -> None:
    with family.open_video_codec("cpu") as codec, pytest.raises(ValueError, match=words):
        codec.encode(pixels)


def test_two_threads_get_the_latents_that_one_gets(family: SanaVideoFamily) -> None:
    clips = [video(1, 3, 13, 32, 32, seed=seed) for seed in range(4)]
    with family.open_video_codec("cpu") as codec:
        alone = [codec.encode(clip).mean for clip in clips]
        found: dict[int, torch.Tensor] = {}
        start = threading.Barrier(len(clips))

        def work(number: int) -> None:
            start.wait()
            found[number] = codec.encode(clips[number]).mean

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(clips))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[number], alone[number]) for number in range(len(clips)))


def test_after_the_with_block_the_vae_is_gone(family: SanaVideoFamily) -> None:
    with family.open_video_codec("cpu") as codec:
        model = codec._vae
        assert model is not None
        codec.encode(video(1, 3, 5, 16, 16))
        seen = weakref.ref(model)
        del model
    gc.collect()
    assert seen() is None
    with pytest.raises(RuntimeError, match="closed"):
        codec.decode(torch.zeros(1, 16, 1, 2, 2))


def test_latents_can_be_used_in_training(family: SanaVideoFamily) -> None:
    with family.open_video_codec("cpu") as codec:
        latents = codec.encode(video(1, 3, 5, 16, 16)).mean
    weight = torch.ones((), requires_grad=True)
    (latents * weight).sum().backward()  # fails for tensors of inference mode
    assert weight.grad is not None


def test_a_vae_without_one_of_its_weights_is_an_error(own_checkpoint: Path, family_of: Families) -> None:
    from safetensors.torch import load_file, save_file

    path = own_checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state.pop("quant_conv.weight")
    save_file(state, path)
    with (
        pytest.raises(ModelError, match=r"quant_conv\.weight is missing"),
        family_of(own_checkpoint).open_video_codec("cpu"),
    ):
        pass
