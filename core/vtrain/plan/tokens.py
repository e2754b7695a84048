"""Which of a clip's frames its tokens stand for. No torch."""

from __future__ import annotations

from vtrain.contract import ClipShape, Family, SupportsTokenGrid, TokenGrid


def token_grid(family: Family, clip: ClipShape) -> TokenGrid | None:
    """The grid of a clip's tokens, None if the family does not say."""
    return family.token_grid(family.latent_shape(clip)) if isinstance(family, SupportsTokenGrid) else None


def token_frames(family: Family, latent_frames: int, grid: TokenGrid) -> tuple[int, ...]:
    """For each frame of tokens the pixel frame that stands for it: the last of those that it covers.

    A causal codec knows all of a latent frame's pixels only with that one (arXiv 2506.09229 leaves the choice open).
    """
    each = latent_frames // grid.frames
    return tuple(family.pixel_frames(each * (number + 1) - 1)[-1] for number in range(grid.frames))
