"""The Wan transformer: diffusers' own class, unmodified."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtrain.contract import Condition, Device, DType, LatentShape, ModelError, NoiseLevel, Problem, fill_module
from vtrain_wan.config import TransformerConfig
from vtrain_wan.text import TEXT_TOKENS

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from torch import Tensor, nn

TRANSFORMER = "transformer"
LORA_FILE = "pytorch_lora_weights.safetensors"


class WanDenoiser:
    """The denoiser, and SupportsLora."""

    def __init__(self, module: WanTransformer3DModel, config: TransformerConfig) -> None:
        self._module = module
        self._config = config

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return tuple(self._module.blocks)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """All Linear layers of a block: what kohya-ss/musubi-tuner and DiffSynth-Studio train by default."""
        return ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        """v = e - x0, in the type that the module computes in.

        level.timestep: (B,) in 0..1000, or (B, f), one for each latent frame (Wan 2.2 TI2V). Inputs take the weights' type
        unless autocast chooses. Raises ValueError for latents that the patches would not cover.
        """
        from torch.nn import functional

        self._check(noisy, condition)
        # No mask reaches the module: behind the text stand zeros, up to the length that it was trained with.
        text = condition.text.embeds * condition.text.mask[..., None]
        text = functional.pad(text, (0, 0, 0, TEXT_TOKENS - text.shape[1]))
        if not Device.of(noisy).autocasting:
            dtype = self._module.patch_embedding.weight.dtype
            noisy, text = noisy.to(dtype), text.to(dtype)
        timestep = level.timestep
        if timestep.ndim == 2:  # for each token, in the order of the patches
            _, height, width = self._grid(LatentShape(*noisy.shape[1:]))
            timestep = timestep.repeat_interleave(height * width, dim=1)
        prediction: Tensor = self._module(noisy, timestep, text, return_dict=False)[0]
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
        """Write folder/transformer, as WanTransformer3DModel.from_pretrained reads it."""
        from accelerate import init_empty_weights

        with init_empty_weights():
            holder: Any = type(self._module).from_config(self._module.config)
        holder.load_state_dict(dict(state), strict=True, assign=True)  # assign: nothing is copied
        holder.save_pretrained(folder / TRANSFORMER)

    def save_lora(self, folder: Path, state: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
        """Write folder/pytorch_lora_weights.safetensors, as WanPipeline.load_lora_weights reads it."""
        from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

        if absent := {"r", "lora_alpha"} - settings.keys():
            raise ValueError(f"settings of an adapter without {', '.join(sorted(absent))}")
        WanLoraLoaderMixin.save_lora_weights(
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
            raise ModelError(Problem(str(path), f"this is no adapter of a Wan transformer: it has {odd[0]}."))
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
            raise ValueError(f"Wan is conditioned on text alone, not on {', '.join(sorted(condition.extras))}")


def load(folder: Path, config: TransformerConfig, device: str, dtype: DType) -> WanDenoiser:
    """Load the transformer of `folder`; what its class keeps in fp32 is fp32, as from_pretrained has it. Raises ModelError."""
    from accelerate import init_empty_weights
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    # Buffers for real: the rotary tables are in no file, and on the meta device they would be lost.
    with init_empty_weights(include_buffers=False):
        module = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
    fill_module(module, folder, "diffusion_pytorch_model", dtype, device)
    return WanDenoiser(module.to(device).eval(), config)


_ORIGINAL = (
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".to_q", ".q"),
    (".to_k", ".k"),
    (".to_v", ".v"),
    (".to_out.0", ".o"),
)


def original_name(name: str) -> str:
    """A module or key of the denoiser as Wan's own code calls it, and with it ComfyUI."""
    for ours, theirs in _ORIGINAL:
        name = name.replace(ours, theirs)
    return name
