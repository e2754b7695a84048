"""Writing videos."""

from __future__ import annotations

from pathlib import Path

import torch

from vtrain.validate.videos import write_mp4


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
