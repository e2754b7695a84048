"""Averages of the weights, and what takes the place of the weights for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

from vtrain.train.ema import swapped


def layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


TYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("of_values", TYPES)
@pytest.mark.parametrize("of_weights", TYPES[:2])
def test_inside_the_block_the_weights_are_the_values_and_afterwards_both_have_their_own_bits(
    of_weights: torch.dtype, of_values: torch.dtype
) -> None:
    module = layers(of_weights)
    values = {name: torch.randn_like(value, dtype=of_values) for name, value in module.named_parameters()}
    before, other = bits(module), {name: value.clone() for name, value in values.items()}
    places = [value.data_ptr() for value in module.parameters()]
    with swapped(module.named_parameters(), values):
        assert same(bits(module), {name: value.to(of_weights) for name, value in other.items()})
        assert [value.data_ptr() for value in module.parameters()] == places
    assert same(bits(module), before)
    assert same(values, other)
    assert all(value.requires_grad for value in module.parameters())


class Stop(BaseException):
    """As Ctrl-C is: no Exception."""


def test_an_exception_brings_the_weights_back_and_goes_on() -> None:
    module = layers()
    before = bits(module)
    with pytest.raises(Stop), swapped(module.named_parameters(), {n: v.double() + 1 for n, v in before.items()}):
        raise Stop
    assert same(bits(module), before)


def test_values_that_fail_half_way_change_nothing() -> None:
    module = layers()
    before = bits(module)

    class Failing(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            if name == "1.bias":
                raise Stop
            return torch.zeros_like(before[name])

        def __iter__(self) -> Iterator[str]:
            return iter(before)

        def __len__(self) -> int:
            return len(before)

        def __contains__(self, name: object) -> bool:
            return name in before

    with pytest.raises(Stop), swapped(module.named_parameters(), Failing()):
        pytest.fail("the block ran")
    assert same(bits(module), before)


def test_a_value_of_another_shape_is_refused_by_name_and_changes_nothing() -> None:
    module = layers()
    before = bits(module)
    values = {"0.weight": torch.zeros(7, 5), "1.weight": torch.zeros(7, 3)}
    message = r"1\.weight is \(3, 7\), and its value \(7, 3\)"
    with pytest.raises(ValueError, match=message), swapped(module.named_parameters(), values):
        pytest.fail("the block ran")
    assert same(bits(module), before)


def test_a_parameter_without_a_value_keeps_its_weights() -> None:
    module = layers()
    before = bits(module)
    with swapped(module.named_parameters(), {"1.bias": torch.ones(3)}):
        assert same(bits(module), before | {"1.bias": torch.ones(3)})


def test_training_goes_on_as_if_nothing_had_been_swapped() -> None:
    """Also with gradients and an optimizer's state there."""

    def trained(*, swapping: bool) -> dict[str, Tensor]:
        module = layers()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        for step in range(4):
            module(torch.full((2, 5), float(step))).square().mean().backward()
            if swapping:
                with swapped(module.named_parameters(), {n: v.double() * 0 for n, v in module.named_parameters()}):
                    assert float(module(torch.ones(1, 5)).detach().abs().sum()) == 0
            optimizer.step()
            optimizer.zero_grad()
        return bits(module)

    assert same(trained(swapping=True), trained(swapping=False))
