"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft, on any family that supports them."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

from vtrain.config.tables import LoraTable
from vtrain.contract import ConfigError, Denoiser, Device, Problem, SupportsLora

ADAPTER = "default"


def lora_settings(denoiser: Denoiser, table: LoraTable) -> dict[str, object]:
    """What a file of the adapter carries about itself: rank, alpha, targets, dropout, under peft's names."""
    targets = table.targets or (denoiser.lora_targets if isinstance(denoiser, SupportsLora) else ())
    return {
        "r": table.rank,
        "lora_alpha": table.alpha if table.alpha is not None else table.rank,
        "target_modules": sorted(targets),
        "lora_dropout": table.dropout,
    }


def add_lora(denoiser: Denoiser, table: LoraTable, seed: int, where: str) -> None:
    """Freeze the denoiser and add an adapter, fp32, in place. seed: of the adapter's first weights.

    Raises ConfigError when the family has no adapters or no module matches the targets.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not isinstance(denoiser, SupportsLora):
        raise ConfigError(Problem(where, "this family has no adapters.", 'Use train = "full".'))
    names = [name for name, _ in denoiser.module.named_modules()]
    for target in table.targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(
                Problem(where, f'no module of the model is called "{target}".', "Correct [model.lora] targets.")
            )
    denoiser.module.requires_grad_(False)
    Device().seed(seed)  # peft makes its weights on the CPU: the same on every device
    try:
        inject_adapter_in_model(LoraConfig(**lora_settings(denoiser, table)), denoiser.module, ADAPTER)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(Problem(where, f"no adapter can be added: {error}", "See [model.lora] targets.")) from error
    for name, parameter in denoiser.module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def lora_state(module: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights under peft's names, without the adapter's name."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(module, adapter_name=ADAPTER))


def load_lora_state(module: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Put `state` (as `lora_state` gives it) into the adapter. Gives the keys that did not fit, [] when all did."""
    from peft import set_peft_model_state_dict

    expected = {key: value.shape for key, value in lora_state(module).items()}
    odd = [key for key in expected if key not in state or state[key].shape != expected[key]]
    odd += [key for key in state if key not in expected]
    if not odd:
        set_peft_model_state_dict(module, state, adapter_name=ADAPTER)
    return sorted(odd)


def base_mark(module: nn.Module) -> str:
    """Names the weights that an adapter is put on: a hash of every tensor's name, shape and first 256 values.

    Enough to tell one model from another or from its fine-tune, without reading gigabytes at every start.
    """
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
