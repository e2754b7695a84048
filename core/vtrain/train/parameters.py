"""What of a model is trained: its low-rank adapter (LoRA, arXiv 2106.09685) or its weights, in groups."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtrain.config.tables import LoraTable
from vtrain.contract import (
    ConfigError,
    Denoiser,
    Device,
    ParameterGroup,
    Problem,
    SupportsDecayRule,
    SupportsLearningRate,
    SupportsLora,
)
from vtrain.contract.adapters import GROUPED, matches

ADAPTER = "default"


def lora_settings(denoiser: Denoiser, table: LoraTable) -> dict[str, object]:
    """What a file of the adapter carries about itself: rank, alpha, targets, kind, under peft's names.

    No dropout: that is training's own, and tools that read it here would drop in inference too (peft builds its layers so).
    """
    targets = table.targets or (denoiser.lora_targets if isinstance(denoiser, SupportsLora) else ())
    return {
        "r": table.rank,
        "lora_alpha": table.alpha if table.alpha is not None else table.rank,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        # Not of plain LoRA, so that its files are what they were.
        **({"use_dora": True} if table.dora else {}),
        **({"use_rslora": True} if table.rslora else {}),
    }


_INIT: Mapping[str, bool | str] = {"kaiming": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}
"""[model.lora] init -> peft's init_lora_weights. Not pissa, olora and loftq, which change the base, so that the adapter would fit
no other copy of it; not eva, corda and lora_ga, which need data; not mica, which trains one of the two matrices alone."""


def add_lora(denoiser: Denoiser, table: LoraTable, seed: int, where: str) -> None:
    """Freeze the denoiser and add an adapter, fp32, in place. seed: of the adapter's first weights.

    Raises ConfigError when the family has no adapters or no module matches the targets.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not isinstance(denoiser, SupportsLora):
        raise ConfigError(Problem(where, "this family has no adapters.", 'Use train = "full".'))
    if problems := list(target_faults(denoiser.module, table.targets or denoiser.lora_targets, where)):
        raise ConfigError(problems)
    denoiser.module.requires_grad_(False)
    Device().seed(seed)  # peft makes its weights on the CPU: the same on every device
    try:
        own: dict[str, Any] = {**lora_settings(denoiser, table), "lora_dropout": table.dropout}
        inject_adapter_in_model(
            # With a start the first weights are overwritten, and peft must be able to make any.
            LoraConfig(**own, init_lora_weights=_INIT[table.init if table.start is None else "kaiming"]),  # type: ignore[arg-type]
            denoiser.module,
            ADAPTER,
        )
    except ValueError as error:
        raise ConfigError(Problem(where, f"no adapter can be added: {error}", "See [model.lora] targets.")) from error
    for name, parameter in denoiser.module.named_parameters():
        if "lora_" in name:
            # Whatever the base is stored in: bf16 weights at a rate of 1e-4 do not move at all under AdamW (tried).
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    if table.dora:
        _set_magnitudes(denoiser.module)


def target_faults(module: nn.Module, targets: Sequence[str], where: str) -> Iterator[Problem]:
    """Targets of an adapter that name no layer, or something that can have none. Of several peft is content if one matches."""
    for target in targets:
        found = {name: each for name, each in module.named_modules() if matches(name, target)}
        if not found:
            yield Problem(where, f'no module of the model is called "{target}".', "Correct [model.lora] targets.")
        for name, each in found.items():
            if not isinstance(each, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                also = "also " if len(found) > 1 else ""
                what = f'targets: "{target}" is {also}{name}, a {type(each).__name__}, which can have no adapter.'
                yield Problem(where, what, "Name the layers that are meant.")
                break
            if getattr(each, "groups", 1) > 1:
                yield Problem(where, GROUPED.format(name), "Leave it out of [model.lora] targets.")
                break


def _set_magnitudes(module: nn.Module) -> None:
    """DoRA's magnitudes, the length of each output's weights, in fp32 (arXiv:2402.09353, equation 4).

    peft takes them in the base's type: in bf16 they are up to 0.4% off, and the model is another one before its first step.
    """
    for name, magnitude in module.named_parameters():
        if f".lora_magnitude_vector.{ADAPTER}." in name:
            weight = module.get_parameter(name.partition(".lora_magnitude_vector.")[0] + ".base_layer.weight")
            with torch.no_grad():
                magnitude.copy_(weight.float().flatten(1).norm(dim=1).reshape(magnitude.shape))


def lora_state(module: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights under peft's names, without the adapter's name."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(module, adapter_name=ADAPTER))


def adapter_names(module: nn.Module) -> dict[str, str]:
    """Name of a weight of the adapter in `lora_state` -> its parameter's in the module, as peft pairs them."""
    from peft import get_peft_model_state_dict

    state = module.state_dict()
    own = {id(value): name for name, value in state.items()}
    given = get_peft_model_state_dict(module, state_dict=state, adapter_name=ADAPTER)
    return {key: own[id(value)] for key, value in given.items()}


def load_lora_state(module: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Put `state` (as `lora_state` gives it) into the adapter. Gives the keys that did not fit, [] when all did."""
    from peft import set_peft_model_state_dict

    expected = {key: value.shape for key, value in lora_state(module).items()}
    odd = [key for key in expected if key not in state or state[key].shape != expected[key]]
    odd += [key for key in state if key not in expected]
    # Only a state that fits: peft loads with strict=False, and leaves what it lacks as it is.
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
        # numpy has no bf16.
        digest.update(value.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def trained(module: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, parameter) of all that take a gradient, in the module's order."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


DENOISER = "denoiser_module."
"""Begins the names of a denoiser's parameters in a Step."""


def groups(
    named: Iterable[tuple[str, Tensor]],
    factors: Mapping[str, float] | None = None,
    denoiser: Denoiser | None = None,
    whole: Mapping[str, Tensor] | None = None,
) -> list[ParameterGroup]:
    """By two: matrices and kernels decay, vectors (norms, biases) do not, if the denoiser does not know better.

    factors: beginning of a name -> learning-rate factor, for parameters with a rate of their own. denoiser: whose parameters
    have names that begin with DENOISER. whole: name -> what a parameter's shape is taken from, where it is a share of it.
    """
    rule = denoiser.decays if isinstance(denoiser, SupportsDecayRule) else None
    found: dict[tuple[float, bool], list[tuple[str, Tensor]]] = {}
    for name, parameter in named:
        factor = next((value for start, value in (factors or {}).items() if name.startswith(start)), 1.0)
        found.setdefault((factor, _decays(name, (whole or {}).get(name, parameter), rule)), []).append(
            (name, parameter)
        )
    # The denoiser's groups first: the rate that is logged is that of group 0.
    order = sorted(found, key=lambda key: (key[0] != 1.0, key[0], not key[1]))
    return [ParameterGroup(tuple(found[key]), decay=key[1], lr_factor=key[0]) for key in order]


def own_rates(regularizers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Beginning of the names of a regularizer's parameters in a Step -> its learning-rate factor."""
    return {
        f"regularizers.{name}.": module.lr_factor
        for name, module in regularizers.items()
        if isinstance(module, SupportsLearningRate)
    }


def _decays(name: str, parameter: Tensor, rule: Callable[[str, tuple[int, ...]], bool | None] | None) -> bool:
    own = rule(name.removeprefix(DENOISER), tuple(parameter.shape)) if rule and name.startswith(DENOISER) else None
    return parameter.ndim > 1 if own is None else own
