"""What the plan says of the denoiser's storage type, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

from vtrain.contract import ConfigError
from vtrain.contract.precision import STORAGE
from vtrain.plan import precision

LORA = 'use = "toy"\ntrain = "lora"'


@pytest.mark.parametrize("base", ["int8", "fp8", "int4"])
def test_quantised_weights_are_not_trained_in_full(plan_of: Callable[..., Any], base: str) -> None:
    with pytest.raises(ConfigError, match=f"full training of weights in {base}: .* would not move at all") as raised:
        plan_of(precision=f'base = "{base}"')
    assert "config.toml:" in str(raised.value)
    assert 'model.train = "lora"' in str(raised.value)


def test_a_quantised_base_is_read_in_bf16(plan_of: Callable[..., Any]) -> None:
    plan = plan_of(model=LORA, precision='base = "int4"')
    assert (plan.base, plan.loaded, plan.storage) == ("int4", "bf16", STORAGE["int4"])


def test_without_the_library_the_plan_names_the_command(
    plan_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(precision, "version", absent)
    with pytest.raises(ConfigError, match=r'pip install "vtrain\[quanto\]"'):
        plan_of(model=LORA, precision='base = "int8"')
    plan_of(model=LORA, precision='base = "bf16"')


def test_quantize_on_without_anything_to_quantise_is_pointed_out(plan_of: Callable[..., Any]) -> None:
    (warning,) = [each for each in plan_of(precision='quantize_on = "accelerator"').warnings if "quantize_on" in each]
    assert warning == 'precision.quantize_on has no effect: base = "fp32" is not quantised'
    assert not any("quantize_on" in each for each in plan_of().warnings)


class Shaped:
    """A family that knows its weights."""

    parameters = 200_000

    def __init__(self, **layers: tuple[int, ...]) -> None:
        self.layers = layers

    def block_weights(self) -> dict[str, tuple[int, ...]]:
        return {f"blocks.0.{name}.weight": shape for name, shape in self.layers.items()}


def test_layers_that_stay_are_named_and_counted() -> None:
    family: Any = Shaped(to_q=(64, 256), odd=(64, 131), conv=(64, 64, 1, 1), norm=(64,))
    found = precision.quantised(family, STORAGE["int4"], ("conv",))
    assert found is not None
    assert (found.layers, found.numbers, found.rest) == (1, 64 * 256, 200_000 - 64 * 256)
    assert found.total_bytes == STORAGE["int4"].bytes((64, 256)) + 2 * found.rest
    words = precision.kept_words(found.kept, STORAGE["int4"])
    assert words.startswith("2 layers of blocks cannot be quantised to int4 and stay bf16")
    assert "blocks.0.odd: 131 numbers an output channel" in words
    assert "blocks.0.conv: an adapter is put on it" in words


def test_a_base_of_which_nothing_can_be_quantised_is_refused(plan_of: Callable[..., Any]) -> None:
    config = plan_of(model=LORA, precision='base = "int4"').config
    family: Any = Shaped(odd=(64, 131))
    (problem,) = precision.layer_problems(config, family)
    assert "no layer of this model can be quantised to int4" in problem.what
    assert not precision.layer_problems(config, Shaped(to_q=(64, 64)))  # type: ignore[arg-type]


def test_what_is_unlike_all_choices_is_not_taken_for_its_opposite(plan_of: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match='expected "cpu" or "accelerator", got "gpu"') as raised:
        plan_of(model=LORA, precision='base = "int8"\nquantize_on = "gpu"')
    assert "Did you mean" not in str(raised.value)


def test_dora_asks_for_whole_weights(plan_of: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="DoRA needs the lengths of the base's weights, which int8 has not") as raised:
        plan_of(model=f"{LORA}\nlora = {{ dora = true }}", precision='base = "int8"')
    (problem,) = raised.value.problems
    assert problem.remedy == 'Set precision.base = "bf16", or dora = false.'
    plan_of(model=f"{LORA}\nlora = {{ dora = true }}", precision='base = "bf16"')
