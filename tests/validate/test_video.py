"""Writing videos."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.video_processor import VideoProcessor

from vtrain.contract import Size
from vtrain.validate.generate import fitted
from vtrain.validate.videos import write_mp4


@pytest.mark.parametrize("size", [(64, 48), (80, 48), (66, 66), (200, 100)])
def test_a_video_in_another_size_covers_it_as_in_diffusers_pipelines(size: tuple[int, int]) -> None:
    """None is smaller than the video: there diffusers' is not antialiased."""
    pixels = torch.rand(3, 2, 48, 64, generator=torch.Generator().manual_seed(0))
    theirs = VideoProcessor.resize_and_crop_tensor(pixels[None], *size)[0]
    assert torch.allclose(fitted(pixels, Size(*size)), theirs, atol=1e-6)


def test_a_smaller_video_is_antialiased_and_no_edge_is_a_pixel_short() -> None:
    """diffusers' rounds 51.99 down, and then cuts 52 out of it."""
    stripes = torch.arange(64).remainder(2).float().expand(3, 1, 48, 64)
    small = fitted(stripes, Size(20, 15))
    assert small.shape == (3, 1, 15, 20)
    assert (small - 0.5).abs().max() < 0.1
    for width in range(2, 64, 6):
        for height in range(2, 48, 6):
            assert fitted(stripes, Size(width, height)).shape == (3, 1, height, width)


def test_the_same_frames_are_the_same_file_whatever_lies_in_memory(tmp_path: Path) -> None:
    """With B-frames x264 wrote two to six different files of these."""
    coarse = torch.rand(1, 3, 9, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(9, 64, 64), mode="trilinear")[0]
    frames = (smooth * 255).byte().permute(1, 2, 3, 0).contiguous()
    files = set()
    for number in range(40):
        litter = [torch.rand(64 * 64 * 2) for _ in range(50)]
        write_mp4(tmp_path / f"{number}.mp4", frames, 8)
        files.add((tmp_path / f"{number}.mp4").read_bytes())
        del litter
    assert len(files) == 1
