"""The table of storage types says what optimum-quanto really keeps."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from vtrain.contract.adapters import matches
from vtrain.contract.precision import STORAGE, StorageName, is_layer
from vtrain.train.precision import held_bytes, quantise_block

QUANTISED = [name for name, storage in STORAGE.items() if storage.quantised]


def test_every_name_is_in_the_table() -> None:
    assert list(STORAGE) == list(get_args(StorageName))
    assert all(name == storage.name for name, storage in STORAGE.items())


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_what_is_not_quantised_takes_what_torch_takes(name: StorageName) -> None:
    dtype = getattr(torch, STORAGE[name].torch)
    assert STORAGE[name].bytes((96, 32, 3, 1)) == torch.empty(96, 32, 3, 1, dtype=dtype).nbytes


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(96, 96),
        nn.Linear(256, 384),  # int4: torch's own kernel, with groups of 128
        nn.Linear(288, 97),  # an odd number of groups of 96
        nn.Linear(131, 64),
        nn.Conv2d(64, 128, 1),
        nn.Conv2d(128, 128, 3, groups=128),
        nn.Conv2d(640, 64, 1),
        nn.Conv2d(96, 96, (3, 1)),
    ],
    ids=str,
)
def test_bytes_of_a_weight_are_those_that_are_held_or_the_layer_is_refused(name: StorageName, layer: nn.Module) -> None:
    storage, shape = STORAGE[name], tuple(layer.weight.shape)  # type: ignore[union-attr,arg-type]
    block, kept = nn.Sequential(type(layer)(**_arguments(layer))).bfloat16(), {}
    quantise_block(block, "", storage, (), kept)
    (weight, *_) = block.parameters()
    if storage.fault(shape):
        assert kept == {"0": storage.fault(shape)}
        assert held_bytes(weight) == STORAGE["bf16"].bytes(shape)
    else:
        assert held_bytes(weight) == storage.bytes(shape) < STORAGE["bf16"].bytes(shape)


def _arguments(layer: nn.Module) -> dict[str, object]:
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    assert isinstance(layer, nn.Conv2d)
    names = ("in_channels", "out_channels", "kernel_size", "groups")
    return {name: getattr(layer, name) for name in names}


def test_int4_refuses_rows_that_no_group_divides_and_all_refuse_a_single_output() -> None:
    assert "not divisible by 128, 96, 64, 32" in STORAGE["int4"].fault((64, 131))
    assert not STORAGE["int8"].fault((64, 131))
    assert all(STORAGE[name].fault((1, 64)) for name in QUANTISED)


def test_layers_are_those_of_linear_and_conv2d_and_targets_match_as_peft_matches_them() -> None:
    assert is_layer("blocks.0.to_q.weight", (8, 8))
    assert is_layer("blocks.0.conv.weight", (8, 8, 1, 1))
    assert not is_layer("blocks.0.norm.weight", (8,))
    assert not is_layer("blocks.0.scale_shift_table", (6, 8))
    assert matches("blocks.0.attn1.to_out.0", "to_out.0")
    assert not matches("blocks.0.attn1.to_out.0", "out.0")
