"""Options of the families `wan21` and `wan22-ti2v`."""

from __future__ import annotations

from typing import Literal

from vtrain.contract import DType, ModelSource, Options, fixed


class WanOptions(Options):
    """[model] with use = "wan22-ti2v"."""

    path: ModelSource = fixed(
        description="the checkpoint: a folder in diffusers layout, or a hub id such as "
        '"Wan-AI/Wan2.1-T2V-1.3B-Diffusers" or "Wan-AI/Wan2.2-TI2V-5B-Diffusers"'
    )
    revision: str | None = fixed(
        None, min_length=1, description="branch, tag or commit of a hub id; absent: its main branch"
    )
    text_precision: DType = fixed("bf16", description="storage type of the text encoder and of encoded text")
    vae_precision: DType = fixed("fp32", description="storage type of the VAE; diffusers advises fp32")
    vae_tiling: bool = fixed(
        False, description="encode and decode large videos in tiles: less memory, slightly other latents"
    )


class Wan21Options(WanOptions):
    """[model] with use = "wan21"."""

    size: Literal["1.3B", "14B"] | None = fixed(
        None, description="which size the checkpoint must be; absent: whichever it is"
    )
