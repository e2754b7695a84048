"""The SANA-Video transformer: diffusers' own class, unmodified."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtrain.contract import (
    Condition,
    Device,
    DType,
    LatentShape,
    ModelError,
    NoiseLevel,
    Problem,
    fill_module,
    timesteps,
)
from vtrain_sanavideo.geometry import SCALE_SHIFT_TABLE, TransformerConfig

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel
    from torch import Tensor, nn

TRANSFORMER = "transformer"
LORA_FILE = "pytorch_lora_weights.safetensors"


class SanaVideoDenoiser:
    """The denoiser, SupportsLora and SupportsDecayRule."""

    def __init__(self, module: SanaVideoTransformer3DModel, config: TransformerConfig) -> None:
        self._module = module
        self._config = config

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return tuple(self._module.transformer_blocks)

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        """v = e - x0, in the type that the module computes in.

        level.timestep: (B,) in 0..1000, or (B, f), one for each latent frame. Inputs take the weights' type unless autocast
        chooses. Raises ValueError for latents that the patches would not cover: the module would cut them in silence.
        """

        self._check(noisy, condition)
        embeds, mask = condition.text.embeds, condition.text.mask
        if not Device.of(noisy).autocasting:
            dtype = self._module.patch_embedding.weight.dtype
            noisy, embeds = noisy.to(dtype), embeds.to(dtype)
        timestep = timesteps(level)
        if timestep.ndim == 2:
            grid = self._grid(LatentShape(*noisy.shape[1:]))
            # For each token, in the order of the patches: (B, f) is refused by the module.
            timestep = timestep.repeat_interleave(grid[1] * grid[2], dim=1)
        prediction: Tensor = self._module(
            noisy,
            encoder_hidden_states=embeds,
            timestep=timestep,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return prediction

    def fold(self, tap: Tensor, latents: LatentShape) -> Tensor:
        """(B, f * h/2 * w/2, D) -> (B, f, h/2, w/2, D)."""
        folded: Tensor = tap.unflatten(1, self._grid(latents))
        return folded

    def gradient_checkpointing(self, on: bool) -> None:
        if on:
            self._module.enable_gradient_checkpointing()
        else:
            self._module.disable_gradient_checkpointing()

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write folder/transformer, as SanaVideoTransformer3DModel.from_pretrained reads it.

        By diffusers itself, so that files, shards and index are its own, from a second module without memory of its own that
        only holds the tensors of `state`. Raises RuntimeError for a state with other names or shapes.
        """
        from accelerate import init_empty_weights

        with init_empty_weights():
            holder: Any = type(self._module).from_config(self._module.config)
        holder.load_state_dict(dict(state), strict=True, assign=True)  # assign: nothing is copied
        holder.save_pretrained(folder / TRANSFORMER)

    def decays(self, name: str, shape: tuple[int, ...]) -> bool | None:
        """SupportsDecayRule: shift, scale and gate are vectors, though a table of them has two dimensions."""
        return False if name.endswith(SCALE_SHIFT_TABLE) else None

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """The projections of self- and cross-attention: all its Linear layers in blocks. The feed-forward is convolutions."""
        return ("to_q", "to_k", "to_v", "to_out.0")

    def save_lora(self, folder: Path, state: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
        """Write folder/pytorch_lora_weights.safetensors, as SanaVideoPipeline.load_lora_weights reads it.

        settings: peft's own (r, lora_alpha, target_modules ...); without lora_alpha in the file, tools take alpha = r.
        Raises ValueError if r or lora_alpha is not given.
        """
        from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin

        if absent := {"r", "lora_alpha"} - settings.keys():
            raise ValueError(f"settings of an adapter without {', '.join(sorted(absent))}")
        SanaLoraLoaderMixin.save_lora_weights(
            folder,
            transformer_lora_layers={name: value.detach().cpu().contiguous() for name, value in state.items()},
            transformer_lora_adapter_metadata=dict(settings),
        )

    def load_lora(self, folder: Path) -> dict[str, Tensor]:
        """Peft's keys and weights. Raises ModelError for a missing or broken file, or one of another kind."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / LORA_FILE
        try:
            stored = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(Problem(str(path), f"the adapter cannot be read: {error}.")) from error
        if odd := sorted(name for name in stored if not name.startswith(f"{TRANSFORMER}.")):
            raise ModelError(Problem(str(path), f"this is no adapter of a SANA-Video transformer: it has {odd[0]}."))
        return {name.removeprefix(f"{TRANSFORMER}."): value.clone() for name, value in stored.items()}

    def _grid(self, latents: LatentShape) -> tuple[int, int, int]:
        """Tokens in time, height and width."""
        time, height, width = self._config.patch_size
        return latents.frames // time, latents.height // height, latents.width // width

    def _check(self, noisy: Tensor, condition: Condition) -> None:
        _, high, wide = self._config.patch_size
        if noisy.ndim != 5 or noisy.shape[1] != self._config.in_channels:
            raise ValueError(f"latents are (B, {self._config.in_channels}, f, h, w), not {tuple(noisy.shape)}")
        if noisy.shape[3] % high or noisy.shape[4] % wide:
            raise ValueError(f"latents of {tuple(noisy.shape[3:])} cannot be cut into patches of {(high, wide)}")
        if condition.extras:
            raise ValueError(f"SANA-Video is conditioned on text alone, not on {', '.join(sorted(condition.extras))}")


def load(folder: Path, config: TransformerConfig, device: str, dtype: DType) -> SanaVideoDenoiser:
    """Load the transformer of `folder`. Its rotary tables stay fp32, as from_pretrained leaves them. Raises ModelError."""
    from accelerate import init_empty_weights
    from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel

    # Buffers for real: the rotary tables are in no file, and on the meta device they would be lost.
    with init_empty_weights(include_buffers=False):
        module = SanaVideoTransformer3DModel.from_config(SanaVideoTransformer3DModel.load_config(folder))
    fill_module(module, folder, "diffusion_pytorch_model", dtype, device, (SCALE_SHIFT_TABLE,))
    return SanaVideoDenoiser(module.to(device).eval(), config)
